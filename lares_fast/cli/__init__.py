"""The command line ``lares-fast``."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from lares_fast import __version__, _settings
from lares_fast._errors import InputError, LaresFastError
from lares_fast._memory import missing_memory
from lares_fast.cli.console import with_flag
from lares_fast.cli.streams import open_missing, unknown_characters
from lares_fast.train.config_file import known_keys
from lares_fast.train.suggestions import nearest

# Command -> (its module in this package, what it does). A module is imported when its command is chosen.
_COMMANDS = {
    "train": ("train", "train a model: phase 1 (SPT), phase 2 (RPT) or both"),
    "eval": ("evaluate", "evaluate a trained run by ranking all items, and print the results table"),
    "recommend": ("recommend", "recommend items for one user, one history or all users of a file"),
    "demo": ("demo", "train on a synthetic log in about a minute and show the results"),
    "report": ("report", "check every op on every backend against the tolerances"),
    "warmup": ("warmup", "compile the GPU kernels for the published model sizes and self-test them"),
    "tune": ("tune", "benchmark launch settings on this GPU and store the fastest"),
    "gpu-day": ("gpu_day", "run all GPU checks and write one report"),
    "gpu-bench": ("gpu_bench", "measure the speed on this GPU against the best rivals in PyTorch"),
    "doctor": ("doctor", "show what is installed, what was built and which backends run, or predict memory"),
}


class _Parser(ArgumentParser):
    """A parser that reports an error as one sentence."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    The code is 0 for success, 2 for an error that the user can correct, and 130 for an interrupted run. It is 1 if a check
    of ``report``, ``warmup`` or ``gpu-day`` or a row of ``gpu-bench`` failed, and if the reader of the output closed the pipe.
    """
    open_missing()
    _settings.set_passive_omp()
    try:
        _settings.set_strict()
        # A name of a file that the output cannot show is no reason to fail. Only ``recommend`` prints data.
        with unknown_characters("backslashreplace"):
            return _run(list(sys.argv[1:] if argv is None else argv))
    except SystemExit as stop:  # --help and --version
        return int(stop.code or 0)
    except LaresFastError as error:
        stopped = type(error).__name__ == "Interrupted"
        setting = error.setting if isinstance(error, InputError) else None
        _complain(with_flag(str(error), setting) if setting else str(error), "" if stopped else "error: ")
        return 130 if stopped else 2
    except KeyboardInterrupt:
        _complain("aborted; everything that was saved before is intact.")
        return 130
    except UnicodeEncodeError as error:
        _complain(
            f"the output cannot show {error.object[error.start : error.end]!r} in {error.encoding}: "
            "set PYTHONIOENCODING=utf-8.",
            "error: ",
        )
        return 2
    except BrokenPipeError:
        # The reader of the output has closed the pipe. Keep the interpreter from flushing into it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, MemoryError, RuntimeError, ImportError, SystemError) as error:
        return _system_error(error)


def _system_error(error: Exception) -> int:
    """Complain about missing memory or an error of the operating system. Return the exit code, or raise another error again."""
    if (missing := missing_memory(error)) is not None:
        clause = f" ({missing})" if missing else ""
        _complain(f"there is not enough memory{clause}: use smaller batches, a smaller model or a smaller log.", "error: ")
    elif isinstance(error, OSError):
        _complain(f"{error.filename or 'writing'}: {error.strerror or error}.", "error: ")
    else:
        raise error
    return 2


def _run(argv: list[str]) -> int:
    parser, commands = _parsers(argv[:1])
    if not argv:
        parser.print_help()
        return 0
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        _refuse(unknown, commands.get(argv[0], parser))
    return int(arguments.command(arguments))


def get_parser() -> ArgumentParser:
    """Return the parser with the arguments of all commands. A program that writes shell completions reads it."""
    return _parsers(list(_COMMANDS))[0]


def _parsers(wanted: Sequence[str]) -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    """Return the parser, and the parser of each command. Only those that are ``wanted`` have their arguments."""
    parser = _Parser(
        prog="lares-fast",
        description="Train, evaluate and serve LARES, a sequential recommender that reasons in latent space.",
        epilog="lares-fast COMMAND --help describes one command.",
    )
    parser.add_argument("--version", action="version", version=__version__, help="show the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (module, what) in _COMMANDS.items():
        chosen = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.", allow_abbrev=False)
        if name in wanted:
            command = import_module(f"lares_fast.cli.{module}")
            command.add_arguments(chosen)
            chosen.set_defaults(command=command.command)
    return parser, dict(commands.choices)


def _refuse(unknown: Sequence[str], parser: ArgumentParser) -> None:
    """Raise :class:`InputError` for arguments that ``parser`` does not know, with the option that may be meant."""
    first = next((word for word in unknown if word.startswith("--")), None)
    if first is None:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    name = first.partition("=")[0]
    options = {option.removeprefix("--") for option in parser._option_string_actions if option.startswith("--")}
    # The settings in their order, and then the options of the command itself.
    order = [*(key for key in known_keys() if key in options), *sorted(options.difference(known_keys()))]
    meant = nearest(name, order)
    parser.error(f"unrecognized argument {name}{f' (did you mean --{meant}?)' if meant else ''}")


def _complain(text: str, kind: str = "") -> None:
    # Two spaces in the name of a file stay two.
    print(f"lares-fast: {kind}{' '.join(line.strip() for line in text.splitlines())}", file=sys.stderr)
