"""The chain by make: unbroken, and broken off at five random places, Ctrl-C or kill -9; the same numbers."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from checkpoint import newest

ROOT = Path(__file__).parents[1]


def make(out):
    """`make demo SIZE=smoke` in a process group of its own."""
    log = open(out.with_suffix(".txt"), "a")
    return subprocess.Popen(["make", "demo", "SIZE=smoke", f"OUT={out}"], cwd=ROOT, stdout=log, stderr=log,
                            start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def numbers(out):
    """What the chain came to: each stage's log without times, the evaluation, the files of feedback."""
    found = {"evaluation": (out / "evaluation.json").read_text(encoding="utf-8").replace(str(out), "OUT")}
    for stage in "pretrain", "sft", "reward", "ppo":
        lines = (out / stage / "log.jsonl").read_text(encoding="utf-8").splitlines()
        found[stage] = [{k: v for k, v in json.loads(line).items()
                         if k not in ("time", "tokens_per_second", "mfu")} for line in lines]
        found[f"{stage} weights"] = (newest(out / stage) / "model.pt").read_bytes()
    found["rankings"] = (out / "feedback" / "judged.jsonl").read_text(encoding="utf-8")
    return found


@pytest.mark.full
@pytest.mark.skipif(not shutil.which("make") or os.name == "nt", reason="needs make and process groups")
def test_a_chain_broken_at_five_places_ends_as_if_it_had_not_been(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    started = time.monotonic()
    assert make(whole).wait() == 0, (tmp_path / "whole.txt").read_text()[-2000:]
    length, rng = time.monotonic() - started, random.Random(time.time_ns())
    for _ in range(5):
        running, how = make(broken), rng.choice([signal.SIGINT, signal.SIGKILL])
        try:
            running.wait(rng.uniform(0.05, 0.4) * length)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, how)
            running.wait()
    assert make(broken).wait() == 0, (tmp_path / "broken.txt").read_text()[-2000:]
    one, other = numbers(whole), numbers(broken)
    assert [name for name in one if one[name] != other[name]] == []
