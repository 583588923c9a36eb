"""Checkpoints: one directory each, written beside its final name, synced, then renamed; verified before use.

    OUT/checkpoints/00000500/   config.json  model.pt  training.pt  tokenizer/  checksums.json
    OUT/weights/00000500/       the same without training.pt, for curves (--keep_every)
    OUT/best                    the name of the best one

So a run killed at any moment leaves whole checkpoints and perhaps a `.tmp-*`, which the next start removes.
Every random draw is derived from (seed, purpose, step, row): no generator state is stored, and a resumed run
continues bit for bit. Knows no stage: what `training.pt` holds is the caller's.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import torch

from cli import UserError, about
from model import LanguageModel, ModelConfig, ScalarModel
from tokenizer import Tokenizer

KEPT = 2                                        # newest checkpoints that stay, beside the best


def begin(config, model, optimizer, scaler, tokenizer, ranks):
    """Start a run as its flags say: fresh, from the weights of --init_from, or where --resume finds it.

    Returns the run's state: {"step", "tokens", and what the stage put there}.
    """
    git_commit()                            # of the source as it is now: files may be edited during the run
    out_dir = Path(config.out_dir)
    if not config.resume and any(out_dir.glob("checkpoints/[0-9]*")):
        raise UserError(f"--out_dir {out_dir} holds a run already; go on with --resume or choose another "
                        "directory")
    if config.resume or config.init_from:
        path = resolve(out_dir if config.resume else config.init_from, ranks.say)
        load_weights(model, torch.load(path / "model.pt", map_location="cpu", weights_only=True), path)
        if Tokenizer.load(path / "tokenizer").sha256 != tokenizer.sha256:
            raise UserError(f"checkpoint {path}: its tokenizer is not that of the data, so its ids mean "
                            f"other texts; prepare the data with --tokenizer {path / 'tokenizer'}")
        ranks.say(f"weights of {path}")
    if ranks.is_main:
        out_dir.mkdir(parents=True, exist_ok=True)
        clean(out_dir)
    ranks.barrier()
    if not config.resume:
        return {"step": 0, "tokens": 0}
    training = torch.load(path / "training.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(training["optimizer"])
    scaler.load_state_dict(training["scaler"])
    return training["state"]


def source(config, say=print):
    """(ModelConfig, tokenizer) that a run starts from: those of --init_from, on --resume those of the run.

    Dropout and max_seq_len (0 = as it is) may differ: no weight depends on them.
    """
    if not (config.resume or config.init_from):
        raise UserError("--init_from is missing; name the pretraining run or checkpoint to start from")
    path = resolve(config.out_dir if config.resume else config.init_from, say)
    found = model_config(read_config(path)["config"])
    given = vars(config)                                            # PPO has neither flag
    found = replace(found, dropout=given.get("dropout", 0.0),
                    max_seq_len=given.get("max_seq_len", 0) or found.max_seq_len)
    return found, Tokenizer.load(path / "tokenizer")


def save_run(stage, config, model, optimizer, scaler, tokenizer, state, ranks, **extra):
    """Write the checkpoint of a run's state on rank 0, the others wait; `extra` goes into config.json."""
    if ranks.is_main:
        record = {"stage": stage, "config": vars(config) | vars(model.config),
                  "tokens": state["tokens"], **extra}
        training = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "state": state}
        save(config.out_dir, state["step"], record, model.state_dict(), training, tokenizer,
             best=state.get("best_step") == state["step"], keep_every=config.keep_every)
    ranks.barrier()


def save(out_dir, step, config, model_state, training_state, tokenizer, best=False, keep_every=0):
    """Write the checkpoint of `step` and remove those that need not stay; returns its path.

    config: what config.json holds beside step, command and git commit: {"stage", "config", "tokens", ...}.
    training_state: anything torch loads with weights_only=True: optimizer, scaler, the stage's own.
    """
    out_dir = Path(out_dir)
    record = {**config, "step": step, "command": " ".join(sys.argv), "git_commit": git_commit()}
    if keep_every and step % keep_every == 0:
        write(out_dir / "weights" / f"{step:08d}", record, {"model.pt": model_state}, tokenizer)
    path = out_dir / "checkpoints" / f"{step:08d}"
    write(path, record, {"model.pt": model_state, "training.pt": training_state}, tokenizer)
    if best:
        write_file(out_dir / "best", lambda file: file.write(path.name.encode()))
    for old in checkpoints(out_dir)[:-KEPT]:
        if old.name != best_name(out_dir) and old.name < path.name:
            # Renamed first: there is never half a checkpoint by its name.
            doomed = old.rename(old.with_name(f".tmp-{old.name}-removed"))
            shutil.rmtree(doomed)
    return path


def write(path, record, states, tokenizer):
    """Write one checkpoint directory so that `path` appears whole or not at all.

    One that is there already and whole is the same one (a step replayed after a kill); a broken one is moved
    aside.
    """
    if path.exists():
        if not problem(path):
            return
        set_aside(path)
    temporary = path.with_name(f".tmp-{path.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        for name, state in states.items():
            write_file(temporary / name, lambda file: torch.save(state, file))
        write_file(temporary / "config.json", lambda file: file.write(json.dumps(record, indent=1).encode()))
        tokenizer.save(temporary / "tokenizer")
        sums = {name: sha256(temporary / name) for name in sorted(contents(temporary))}
        write_file(temporary / "checksums.json", lambda file: file.write(json.dumps(sums, indent=1).encode()))
        temporary.rename(path)
        sync_directory(path.parent)
    except (OSError, RuntimeError) as error:                # torch.save reports a full disk as RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"{path}: could not write the checkpoint of step {int(path.name)} ({error}); "
                        "make room, then go on from the one before with --resume")


def write_file(path, write_to):
    """Write a file under a temporary name, sync it, put it in place."""
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        with about(path):
            with open(temporary, "wb") as file:
                write_to(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sync_directory(path):
    """Make a rename inside `path` outlive a power cut; Windows has no such call."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def contents(path):
    """Names of all files below a checkpoint, checksums.json apart, relative to it."""
    return {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()} - {"checksums.json"}


def sha256(path):
    """Hex digest of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def problem(path):
    """What is wrong with a checkpoint, in words; "" for a whole one."""
    try:
        sums = json.loads((path / "checksums.json").read_text(encoding="utf-8"))
        json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"cannot be read ({' '.join(str(error).split())})"
    if not isinstance(sums, dict) or not {"model.pt", "config.json"} <= sums.keys():
        return "checksums.json is damaged"
    missing = sorted(sums.keys() - contents(path))
    if missing:
        return f"{missing[0]} is missing"
    broken = [name for name in sums if sha256(path / name) != sums[name]]
    return f"{broken[0]} does not match its checksum" if broken else ""


def checkpoints(out_dir):
    """Checkpoint directories under out_dir, oldest first; those set aside as broken are none."""
    return sorted(path for path in Path(out_dir).glob("checkpoints/*") if path.name.isdigit())


def newest(out_dir, say=print):
    """The newest checkpoint under out_dir that verifies, or None; broken ones are named and passed over."""
    for path in reversed(checkpoints(out_dir)):
        wrong = problem(path)
        if not wrong:
            return path
        say(f"passing over checkpoint {path}: {wrong}")
    return None


def set_aside(path):
    """Rename a broken checkpoint, so that its name is free and nothing is lost."""
    number = 1
    while (aside := path.with_name(f"{path.name}.broken-{number}")).exists():
        number += 1
    path.rename(aside)


def clean(out_dir):
    """Remove what a killed run left half-written."""
    for path in [*Path(out_dir).glob(".tmp-*"), *Path(out_dir).glob("*/.tmp-*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def best_name(out_dir):
    """The name in OUT/best, or ""."""
    path = Path(out_dir) / "best"
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""


def resolve(path, say=print):
    """A checkpoint directory that verifies, from an OUT directory (its newest) or from one checkpoint."""
    path = Path(path)
    if (path / "model.pt").exists() or (path / "checksums.json").exists():
        wrong = problem(path)
        if wrong:
            raise UserError(f"checkpoint {path}: {wrong}; use another one")
        return path
    found = newest(path, say)
    if found is None:
        raise UserError(f"{path}: no usable checkpoint in it (looked for {path}/checkpoints/*); "
                        "give an --out_dir of a training run or one checkpoint")
    return found


def read_config(path):
    """config.json of a checkpoint as a dict."""
    return json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))


def model_config(config):
    """The ModelConfig inside a stage's configuration, given as that dataclass or as config.json's dict."""
    values = config if isinstance(config, dict) else vars(config)
    return ModelConfig(**{f.name: values[f.name] for f in fields(ModelConfig) if f.name in values})


def load_model(path, device="cpu"):
    """Load (model in eval mode, tokenizer, config.json's dict) from an OUT directory or one checkpoint."""
    path = resolve(path)
    record = read_config(path)
    state = torch.load(path / "model.pt", map_location=device, weights_only=True)
    shape = model_config(record["config"])
    model = (ScalarModel(shape, record["config"].get("likelihood_coef", 0.0)) if "score.weight" in state
             else LanguageModel(shape))
    load_weights(model, state, path)
    return model.to(device).eval(), Tokenizer.load(path / "tokenizer"), record


def load_weights(model, state, path):
    """Put a state dict into a model; a name or shape that does not fit is named.

    A ScalarModel takes what it has a place for, of a language model the stream and perhaps the language head,
    beside which it keeps its own head.
    """
    own = model.state_dict()
    if "score.weight" in own:
        kept = {} if "score.weight" in state else {n: weight for n, weight in own.items() if "score" in n}
        state = kept | {name: weight for name, weight in state.items()
                        if name in own or name != "lm_head.weight"}
    for name in sorted(own.keys() | state.keys()):
        here, there = (tuple(s[name].shape) if name in s else "absent" for s in (own, state))
        if here != there:
            raise UserError(f"checkpoint {path}: {name} is {there} there but {here} in this model; "
                            "give the same model flags as that run, or another checkpoint")
    model.load_state_dict(state)


@cache
def git_commit():
    """The commit of the source that runs, with "+" when files differ from it; "" outside a checkout."""
    def git(*args):
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *args], capture_output=True,
                              text=True)
    try:
        head = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no").stdout.strip()
    except OSError:
        return ""
    return head.stdout.strip() + ("+" if changed else "") if head.returncode == 0 else ""
