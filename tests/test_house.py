"""The house as planned: imports go downhill, every option says what it is, README.md says what is true."""

import ast
import dataclasses
import importlib
import json
import os
import re
import runpy
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import cli
import ppo
import pretrain
from test_errors import restore_process
from training import Ranks

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted([*ROOT.glob("*.py"), *ROOT.glob("data/*.py")])
FLOORS = [                      # a module imports from lower floors only; one not named here stands on top
    ["cli"],
    ["data", "data.read"],
    ["model", "tokenizer", "metrics", "optim"],
    ["batches", "checkpoint"],
    ["records", "training"],
    ["ratings"],
    ["data.rules", "data.clean", "data.dedup", "data.filters", "data.download"],
    ["data.world"],
    ["data.prepare", "data.instructions", "generate"],
    ["data.gold"],
]
EXTRAS = ["matplotlib", "fastapi", "uvicorn", "tensorboard", "wandb", "safetensors", "onnx", "transformers",
          "tokenizers", "pytest"]
LARGEST = 1_000_000             # bytes of a tracked file
OWN_MACHINE = re.compile(r"/(?:work|root|home|Users)/\w")
COLUMNS = 110                   # characters of a line, at most
LONG = 5                        # lines; a public function of more says what it does


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = [module_of(path) for path in SCRIPTS]


def tracked():
    """Paths of all files under version control."""
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


# ---- imports

def floor(module):
    return next((i for i, names in enumerate(FLOORS) if module in names), len(FLOORS))


def imports(source):
    """Yield (what a source imports, the function it does so in or "")."""
    def walk(node, function):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, function) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                module = "." * child.level + (child.module or "")
                yield from ((module if module != "data" else f"data.{a.name}", function) for a in child.names)
            yield from walk(child, child.name if isinstance(child, ast.FunctionDef) else function)
    return list(walk(ast.parse(source), ""))


def uphill(module, source, modules):
    """Imports of one of `modules` that do not go downhill, and those of tests."""
    return [name for name, _ in imports(source)
            if name.startswith(("tests", "conftest", "pytest", "."))
            or name in modules and floor(name) >= floor(module)]


@pytest.mark.parametrize("path", SCRIPTS, ids=MODULES)
def test_imports_go_downhill(path):
    assert uphill(module_of(path), path.read_text(encoding="utf-8"), MODULES) == []


def test_gold_is_hidden_from_training():
    """Only the simulated annotators and the evaluation may know the true marks."""
    knowing = {module_of(path) for path in SCRIPTS
               if any(name.startswith("data.gold") for name, _ in imports(path.read_text(encoding="utf-8")))}
    assert knowing <= {"feedback", "evaluate"}
    assert [name for name, _ in imports("from data import gold\n"
                                        "def f():\n    import data.gold")] == ["data.gold"] * 2


@pytest.mark.parametrize("module, source", [
    ("cli", "import model"), ("model", "import training"), ("model", "from optim import LAMB"),
    ("batches", "from checkpoint import write"), ("training", "def f():\n    from generate import stream"),
    ("data.read", "from data import prepare"), ("data.read", "import data.prepare"),
    ("pretrain", "import sft"),
    ("sft", "from pretrain import train"), ("generate", "import pretrain"),
    ("tokenizer", "from records import pack"), ("data.read", "def f():\n    import tokenizer"),
    ("dpo", "from tests.ranks import run"),
    ("data.gold", "from . import world"),
])
def test_uphill_is_seen(module, source):
    assert len(uphill(module, source, [*MODULES, "sft"])) == 1


def test_downhill_is_let_through():
    assert not uphill("dpo", "import json, torch\nfrom generate import stream\nfrom training import check",
                      MODULES)
    assert not uphill("tokenizer", "def main(config):\n    from data.read import documents", MODULES)


def test_importing_runs_nothing_and_prints_nothing(tmp_path):
    """All files in one process: no output, no files, no optional package."""
    program = (f"import sys\nfor name in {MODULES}:\n    __import__(name)\n"
               f"print(sorted(set({EXTRAS}) & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-B", "-c", program], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")
    assert list(tmp_path.iterdir()) == []


# ---- options

CONFIGS = {f"{name}.{cls.__name__}": cls
           for name in MODULES for cls in vars(importlib.import_module(name)).values()
           if dataclasses.is_dataclass(cls) and cls.__module__ == name
           and ("Config" in cls.__name__ or any("help" in f.metadata for f in dataclasses.fields(cls)))}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_option_has_a_help_text(name):
    """And every configuration a docstring, which `--help` shows."""
    assert [f.name for f in dataclasses.fields(CONFIGS[name]) if len(f.metadata.get("help",
                                                                                    "").strip()) < 4] == []
    assert CONFIGS[name].__doc__ and not CONFIGS[name].__doc__.startswith(f"{CONFIGS[name].__name__}(")


def config_of(script, flags, monkeypatch):
    """The configuration that a script's __main__ block makes of these flags."""
    started = []
    monkeypatch.setattr(cli, "run", started.append)
    monkeypatch.setattr(sys, "argv", [str(script), *flags])
    runpy.run_path(str(script), run_name="__main__")
    (start,) = started
    start.__globals__["main"] = lambda config: config
    return start()


@pytest.mark.parametrize("path", [p for p in SCRIPTS if "__main__" in p.read_text(encoding="utf-8")],
                         ids=module_of)
def test_help_lists_every_option(path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        config_of(path, ["--help"], monkeypatch)
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    own = [cls for cls in CONFIGS.values() if cls.__module__ == module_of(path) and "Config" in cls.__name__]
    names = [f.name for cls in own for f in dataclasses.fields(cls)]
    assert names and [name for name in names if f"--{name}" not in shown] == []


# ---- README.md

def readme(name="README.md"):
    path = ROOT / name
    if not path.is_file():
        pytest.skip("no README.md yet")
    return path.read_text(encoding="utf-8")


def commands(text):
    """Yield the words of every python, torchrun and make command in the fenced blocks of a text."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.M | re.S)
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        if not re.search(r"\b(python3?|torchrun|make) ", line):
            continue
        words = shlex.split(line, comments=True)
        ends = [i for i,
                word in enumerate(words) if word in ("|", "&&", ";", "&", ">", "2>&1")] + [len(words)]
        for start, end in zip([0] + [i + 1 for i in ends], ends):
            command = words[start:end]
            while command and re.fullmatch(r"\$|\w+=.*",
                                           command[0]):     # a prompt, or a variable for the command
                command.pop(0)
            if len(command) > 1 and Path(command[0]).name in ("python", "python3", "torchrun", "make"):
                yield [Path(command[0]).name, *command[1:]]


def wrong(command, monkeypatch):
    """What is wrong with a command, or ""."""
    name, *words = command
    if name == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        known = set(re.findall(r"^([\w-]+) *(?:\?=|:=|:)", makefile, flags=re.M))
        return " ".join(w for w in words if w.split("=")[0] not in known and not w.startswith("-"))
    if words[0] == "-m" and name != "torchrun":
        module, flags = words[1], words[2:]
        script = ROOT / (module.replace(".", "/") + ".py")
        if module in ("pytest", "pip", "venv"):
            return ""
    else:
        at = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
        if at is None or (at and name != "torchrun"):
            return "no script"
        script, flags = ROOT / words[at], words[at + 1:]
    if not script.is_file():
        return f"no file {script.name}"
    try:
        config_of(script, flags, monkeypatch)
    except SystemExit as ended:
        return "" if ended.code == 0 else str(ended)                   # --help
    except cli.UserError as error:
        return "" if str(error).startswith("--resume: no checkpoint") else str(error)
    return ""


def test_commands_in_the_readme_are_ones(monkeypatch, tmp_path):
    found = list(commands(readme()))
    if not found:
        pytest.skip("no commands in README.md yet")
    monkeypatch.chdir(tmp_path)
    assert {" ".join(command): text for command in found if (text := wrong(command, monkeypatch))} == {}


def test_both_readmes_have_the_same_commands_metrics_and_files():
    english, chinese = readme(), readme("README.zh.md")
    told_apart = {"Once upon a time", "从前"}
    assert [[w for w in c if w not in told_apart] for c in commands(english)] == [
        [w for w in c if w not in told_apart] for c in commands(chinese)]
    assert table_of_metrics(english) == table_of_metrics(chinese)
    files = [re.findall(r"`([\w/]+(?:\.\w+)?/?)`", text[text.index(start):text.index(end)])
             for text, start, end in ((english, "## The map", "## What it logs"),
                                      (chinese, "## 地图", "## 日志里的指标"))]
    assert files[0] == files[1] and all((ROOT / name).exists() for name in files[0]
                                        if "/" in name or name.endswith("py"))


@pytest.mark.parametrize("line", [
    "python pretrain.py --confg tiny", "python pretrain.py --config huge", "$ make dmo",
    "SIZE=smoke make demo SISE=tiny",
    "torchrun --nproc_per_node=2 pretrain.py --max_steps=ten", "python -m data.prepar --input x",
    "python nothing.py",
    "python generate.py --model out \\\n    --prompt a --tempo 3", "cd x && python pretrain.py --lr 3 > log",
    "python tokenizer.py --input a b  # two words"])
def test_a_wrong_command_is_seen(line, monkeypatch):
    (command,) = commands(f"text\n```sh\n{line}\n```\nmore")
    assert wrong(command, monkeypatch)


def table_of_metrics(text):
    """Names in the first column of the tables whose first heading is "metric"."""
    names, inside = set(), False
    for line in text.splitlines():
        first = line.strip("| ").split("|")[0]
        inside = line.startswith("|") and (inside or first.strip() == "metric")
        names.update(re.findall(r"`(\w+)`", first) if inside else [])
    return names


def test_every_metric_of_pretraining_is_in_the_readme(tmp_path):
    explained = table_of_metrics(readme())
    if not explained:
        pytest.skip("no table of metrics in README.md yet")
    sizes = dict(max_steps=2, eval_every=1, samples=0, d_model=16, n_heads=2, n_kv_heads=1, d_ff=16,
                 n_layers=1)
    pretrain.main(pretrain.PretrainConfig(**pretrain.PRESETS["smoke"] | sizes, out_dir=str(tmp_path),
                                          smoke=True))
    restore_process()
    lines = (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    written = {name for line in lines for name in json.loads(line)} - {"step", "time"}
    assert {"loss", "val_loss", "bits_per_byte_zh"} <= written
    assert written - explained == set()


def test_every_metric_of_ppo_is_in_the_readme(tmp_path):
    config = ppo.built_in(ppo.PPOConfig(out_dir=str(tmp_path), **ppo.PRESETS["smoke"] | {"max_steps": 1}),
                          Ranks())
    ppo.main(config)
    restore_process()
    written = {name for line in (tmp_path / "log.jsonl").read_text().splitlines()
               for name in json.loads(line)}
    assert {"kl", "first_ratio"} <= written
    assert written - {"step", "time"} - table_of_metrics(readme()) == set()


def test_names_of_metrics_are_read_off_a_table():
    text = ("| preset |\n|---|\n| `tiny` |\n\n"
            "| metric | x |\n|---|---|\n| `loss` | `y` |\n| `a`, `b` | |\n\n| `c` |")
    assert table_of_metrics(text) == {"loss", "a", "b"}


# ---- files

def test_tracked_files_are_small_and_from_no_machine():
    large = [str(path) for path in tracked() if path.stat().st_size > LARGEST]
    assert large == []
    found = [f"{path.relative_to(ROOT)}: {match.group()}" for path in tracked()
             if (match := OWN_MACHINE.search(path.read_bytes().decode("utf-8", "replace")))]
    assert found == []


def test_no_line_is_too_long():
    found = [f"{path.relative_to(ROOT)}:{number}: {len(line)} characters"
             for path in [*SCRIPTS, *sorted(ROOT.glob("tests/*.py"))]
             for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1)
             if len(line) > COLUMNS]
    assert found == []


def functions(source):
    """Functions and methods of a module, those inside functions apart."""
    for node in ast.parse(source).body:
        for child in [node, *(node.body if isinstance(node, ast.ClassDef) else [])]:
            if isinstance(child, ast.FunctionDef):
                yield child


def undocumented(source):
    """Public functions of more than LONG lines without a docstring; `main`'s is the module's."""
    return [f.name for f in functions(source) if not ast.get_docstring(f) and not f.name.startswith("_")
            and f.end_lineno - f.lineno + 1 > LONG and f.name not in ("main", "forward")]


@pytest.mark.parametrize("path", SCRIPTS, ids=MODULES)
def test_files_and_their_long_functions_say_what_they_do(path):
    source = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(source))
    assert undocumented(source) == []


def test_sizes():
    """Printed with pytest -s, and not held: a file of 500 lines wants a second look."""
    print(f"\n{'file':22}{'lines':>6}{'functions':>11}{'median':>8}{'longest':>9}")
    for path in [*SCRIPTS, *sorted(ROOT.glob("tests/*.py"))]:
        source = path.read_text(encoding="utf-8")
        lengths = sorted((f.end_lineno - f.lineno + 1, f.name) for f in functions(source)) or [(0, "")]
        print(f"{str(path.relative_to(ROOT)):22}{source.count(chr(10)):6}{len(lengths):11}"
              f"{statistics.median(n for n, _ in lengths):8.0f}{lengths[-1][0]:9} {lengths[-1][1]}")
