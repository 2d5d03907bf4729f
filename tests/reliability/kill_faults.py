"""Faults to plant in a process. The tests of kills must find each of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from lares_fast import _files as files
from lares_fast.cli import recommend
from lares_fast.train import checkpoint, folder
from lares_fast.train.run import Run


def _write_in_place() -> None:
    @contextlib.contextmanager
    def replacing(path: Path) -> Iterator[IO[bytes]]:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            yield file

    files.replacing = recommend.replacing = replacing


def _no_sync() -> None:
    os.fsync = lambda descriptor: None


def _forget_a_step() -> None:
    resume = Run._resume

    def forgetful(run: Run, saved: Any) -> None:
        resume(run, saved)
        run.state.progress.step += run.state.progress.step > 0

    Run._resume = forgetful


def _forget_the_moments() -> None:
    resume = Run._resume

    def forgetful(run: Run, saved: Any) -> None:
        resume(run, saved)
        run._loaded_optimizer = None

    Run._resume = forgetful


def _no_lock() -> None:
    folder.locked = lambda path, tell: contextlib.nullcontext(path.mkdir(parents=True, exist_ok=True))


def _keep_leftovers() -> None:
    folder.remove_leftovers = lambda *_: None


def _hide_errors() -> None:
    write = files.atomic_write

    def quiet(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
        with contextlib.suppress(files.InputError):
            write(path, fill)

    files.atomic_write = checkpoint.atomic_write = quiet


FAULTS: dict[str, Callable[[], None]] = {
    "write in place": _write_in_place,
    "no sync": _no_sync,
    "forget a step": _forget_a_step,
    "forget the moments": _forget_the_moments,
    "no lock": _no_lock,
    "keep leftovers": _keep_leftovers,
    "hide errors": _hide_errors,
}
