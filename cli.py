"""Command lines from dataclasses, and errors that a user can mend. The lowest floor: imports nothing of ours.

A stage's configuration is one dataclass; each field is one flag of the same name. The same dataclass is what
a notebook builds (`PretrainConfig(n_layers=2)`) and what a checkpoint's `config.json` stores.
"""

import argparse
import difflib
import errno
import importlib.util
import json
import math
import os
import sys
from contextlib import contextmanager
from dataclasses import MISSING, field, fields
from pathlib import Path
from typing import get_type_hints

from tqdm import tqdm


FULL = ("ENOSPC", "EFBIG", "EDQUOT")                       # the ways in which a disk has no room


class UserError(ValueError):
    """Something the user can mend: the text names the thing, its value and the mend, on one line."""


def option(default, help):
    """One option, one line: `name: type = option(default, "meaning and unit")`."""
    return field(default=default, metadata={"help": help})


def need(module, package):
    """Import an optional module, or say in one line how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{module} is not installed; pip install {package}")


def python_function(spec, flag):
    """The function that "FILE.py:NAME" names, for the flag of that name."""
    path, _, name = spec.rpartition(":")
    if not path or not Path(path).is_file():
        raise UserError(f"{flag} {spec!r}: no such file; give FILE.py:NAME")
    module_spec = importlib.util.spec_from_file_location(flag, path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{flag} {path} cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{flag} {spec!r}: {path} has no function {name}")
    return function


def numbers(text, flag, kind, least, example):
    """The numbers of "200,1000", each kind(part) and at least `least`, for the flag of that name."""
    try:
        found = [kind(part) for part in text.split(",")]
        if not all(least <= number < math.inf for number in found):
            raise ValueError
    except ValueError:
        raise UserError(f"{flag} {text!r} is not a list of numbers from {least} up, such as "
                        f"{example}") from None
    return found


def progress_bar(**options):
    """A tqdm bar; where stderr is no terminal, a line every half minute of long work."""
    pause = 0.1 if sys.stderr.isatty() else 30
    return tqdm(**options, mininterval=pause, delay=0 if sys.stderr.isatty() else pause)


class Parser(argparse.ArgumentParser):
    """argparse that answers a wrong flag with one line instead of a page of usage."""

    def error(self, message):
        """Raise what argparse finds wrong, as it is told by `run`."""
        if message.startswith("unrecognized arguments:"):
            flag = message.split(": ", 1)[1].split()[0].split("=")[0]
            flags = list(self._option_string_actions)
            near = ([f for f in flags if len(flag) > 2 and f.startswith(flag)]
                    or difflib.get_close_matches(flag, flags, 1))
            message = f"unknown flag {flag}" + (f"; did you mean {near[0]}?" if near else "")
        raise UserError(f"{message} (see {self.prog} --help)")


def parse_config(cls, argv=None, presets=None, kept=()):
    """Make a `cls` from the command line.

    presets: name -> {field: value}, chosen by `--config`; a preset replaces defaults, an explicit flag beats
        it.
    kept: the fields that may change when `--resume` continues a run; every other value then comes from the
        `config.json` of the newest checkpoint in `--out_dir`.
    """
    parser = Parser(description=cls.__doc__, allow_abbrev=False)
    types = get_type_hints(cls)
    if presets:
        parser.add_argument("--config", choices=list(presets), default=argparse.SUPPRESS,
                            help="a row of PRESETS: its values replace the defaults below, flags beat both")
    for f in fields(cls):
        help = f.metadata.get("help", "") + (
            f" (default: {f.default!r})" if f.default is not MISSING else " (required)")
        common = dict(default=argparse.SUPPRESS, help=help.replace("%", "%%"), required=f.default is MISSING)
        if types[f.name] is bool:
            parser.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, **common)
        else:
            parser.add_argument(f"--{f.name}", type=types[f.name], metavar=types[f.name].__name__.upper(),
                                **common)
    given = vars(parser.parse_args(argv))
    if given.get("resume"):
        refused = [name for name in given if name not in {"resume", "out_dir", *kept}]
        if refused:
            raise UserError(f"--{refused[0]} {given[refused[0]]} cannot change when a run is resumed; "
                            f"beside --resume and --out_dir only {', '.join('--' + k for k in kept)} can")
        return cls(**{**stored_config(given.get("out_dir", cls.out_dir), cls), **given})
    name = given.pop("config", "smoke" if given.get("smoke") else "")
    preset = presets[name] if name else {}
    return cls(**{**preset, **given})


def stored_config(out_dir, cls):
    """The fields of `cls` as the newest checkpoint under out_dir has them."""
    found = sorted(Path(out_dir).glob("checkpoints/[0-9]*/config.json"), reverse=True)
    for path in found:
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))["config"]
            return {f.name: stored[f.name] for f in fields(cls) if f.name in stored}
        except (ValueError, KeyError, TypeError, OSError):
            continue                                        # torn: checkpoint.newest() will name it
    raise UserError(f"--resume: no {'usable ' if found else ''}checkpoint under {out_dir}/checkpoints; "
                    "start without --resume, in another --out_dir if there is something in this one")


def run(main):
    """Call main(); a user's mistake ends in one line on stderr and exit status 2, ours in a traceback."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8")            # a Windows pipe would not take Chinese
    try:
        main()
    except UserError as error:
        sys.exit(complain(str(error)))
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        full = errno.errorcode.get(error.errno) in FULL
        mend = "; make room there" if full else "; give another path" if error.filename else ""
        sys.exit(complain(f"{error.filename or 'writing'}: {error.strerror}{mend}"))
    except KeyboardInterrupt:
        complain("interrupted")
        sys.exit(130)


@contextmanager
def about(path):
    """Give an OSError inside the block the name of the file that the user knows; a failed write has none."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def write_text(path, text):
    """Write a file under a temporary name, then rename it, so that a half-written one never has its name."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        with about(path):
            temporary.write_text(text, encoding="utf-8", newline="\n")
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def complain(message):
    """Print one line to stderr; returns the exit status of a user's error."""
    print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return 2
