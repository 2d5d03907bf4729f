"""The command line ``lares-fast``."""

from __future__ import annotations

import os
import re
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from lares_fast import __version__, _settings
from lares_fast._errors import InputError, LaresFastError

# Command -> (its module here, what it does); a module is imported when its command is chosen.
_COMMANDS = {
    "train": ("train", "train a model: phase 1 (SPT), phase 2 (RPT) or both"),
    "eval": ("evaluate", "rank every item for a trained run and print the results table"),
    "recommend": ("recommend", "recommend items to one user, one history or a whole file"),
    "demo": ("demo", "train on a synthetic log in a few minutes and show the results"),
    "report": ("report", "hold every op on every backend of this machine to the tolerance law"),
    "warmup": ("warmup", "compile the GPU kernels of published model sizes and try them"),
    "tune": ("tune", "measure how this GPU launches the kernels of a model best, and use that from then on"),
    "gpu-day": ("gpu_day", "find out all that a GPU can tell about the kernels, into one report file"),
    "doctor": ("doctor", "say what is installed, what was built and what would run"),
}


class _Parser(ArgumentParser):
    """Complains in one sentence."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code: 0, 2 for what the user can mend, 130 for an interrupted run."""
    _settings.set_passive_omp()
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except SystemExit as stop:  # --help and --version
        return int(stop.code or 0)
    except LaresFastError as error:
        stopped = type(error).__name__ == "Interrupted"
        _complain(str(error), "" if stopped else "error: ")
        return 130 if stopped else 2
    except KeyboardInterrupt:
        _complain("aborted; what was saved before stands.")
        return 130
    except UnicodeEncodeError as error:
        _complain(
            f"{error.object[error.start : error.end]!r} cannot be written in {error.encoding}: set PYTHONIOENCODING=utf-8.",
            "error: ",
        )
        return 2
    except BrokenPipeError:
        # The reader of our output has left; keep the interpreter from flushing into the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        _complain(f"{error.filename or 'writing'}: {error.strerror or error}.", "error: ")
        return 2
    except (MemoryError, RuntimeError) as error:
        if (asked := _memory_asked(error)) is None:
            raise
        _complain(
            f"there is not enough memory{asked}: lower the batch sizes, or the sizes of the model or of the log.", "error: "
        )
        return 2


def _memory_asked(error: Exception) -> str | None:
    """How much memory could not be had, in words, or ``None`` if ``error`` is about something else."""
    text = str(error)
    if found := re.search(r"tried to allocate ([\d.]+ ?\w+)|allocate ([\d.]+ \w+)", text, re.IGNORECASE):
        size = found[1] or found[2]
        number, _, unit = size.partition(" ")
        return f" for {int(number):,} bytes" if unit == "bytes" and number.isdigit() else f" for {size}"
    if isinstance(error, MemoryError) or re.search(r"out of memory|calculation overflowed|multiplication overflow", text):
        return ""
    return None


def _run(argv: list[str]) -> int:
    parser = _Parser(prog="lares-fast", description="Latent-reasoning sequential recommendation (LARES).")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (module, what) in _COMMANDS.items():
        chosen = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.", allow_abbrev=False)
        if argv[:1] == [name]:
            command = import_module(f"lares_fast.cli.{module}")
            command.add_arguments(chosen)
            chosen.set_defaults(command=command.command)
    if not argv:
        parser.print_help()
        return 0
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        commands.choices[argv[0]].error(f"unrecognized arguments: {' '.join(unknown)}")
    return int(arguments.command(arguments))


def _complain(text: str, kind: str = "") -> None:
    print(f"lares-fast: {kind}{' '.join(text.split())}", file=sys.stderr)
