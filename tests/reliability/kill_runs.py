"""A small training run, how it is continued after an interruption, and how its end is compared with an uninterrupted run."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lares_fast._errors import InputError
from lares_fast._weights import load_weights
from lares_fast.cli import settings
from lares_fast.train.state import load_run
from tests.reliability.counts import Counts
from tests.reliability.kill_calls import Plan
from tests.reliability.kill_child import Child, Ended

SETTINGS = [
    # With this seed, every validation of both phases exports a better model.
    *("--config", "tiny", "--set", "seed=3"),
    *("--set", "spt.epochs=2", "--set", "spt.batch_size=128", "--set", "rpt.epochs=1", "--set", "rpt.filter_top=30"),
    *("--set", "rpt.k=5", "--set", "evaluation.ks=[10]", "--set", "evaluation.depth_ratios=[1]"),
]
EVERY_STEP = ["--set", "checkpoint_minutes=0"]

# The log of events holds times, too.
# A process may be killed after it has appended to these files and before it has saved its state.
GROWING = {"events.jsonl", "steps-spt.csv", "steps-rpt.csv"}
_WALL_TIME = {"seconds", "data_wait", "ms_per_user", "waited", "events", "events_bytes"}


class Place:
    """A folder with a log and with uninterrupted runs, in which ``name`` is a new folder for each try."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log.csv"
        draw = random.Random(1)
        rows = [f"{user},{item},{n}" for user in range(60) for n, item in enumerate(draw.sample(range(40), draw.randint(6, 9)))]
        self.log.write_text("\n".join(["user_id,item_id,timestamp", *rows, ""]))
        # The time that the last uninterrupted run took.
        self.seconds = 0.0
        self._whole: dict[tuple[str, ...], tuple[Path, Ended]] = {}

    def new(self) -> Path:
        """Return a path in a new empty folder. Nothing is there."""
        return Path(tempfile.mkdtemp(dir=self.folder)) / "run"

    def first(self, out: Path, *more: str) -> list[Any]:
        """Return the arguments that begin a run in the folder ``out``."""
        return ["train", *SETTINGS, *EVERY_STEP, *more, "--data", self.log, "--out", out]

    def again(self, out: Path, *more: str) -> list[Any]:
        """Return the arguments that continue the run, or begin it if it has left no state."""
        return ["train", "--resume", out] if list(out.glob("state.pt*")) else self.first(out, *more)

    def start(self, argv: list[Any], out: Path, plan: Plan | None = None, *, own: bool = False) -> Child:
        """Start a process, whose calls in the parent folder of ``out`` are numbered."""
        return Child(argv, self.folder, out.parent, plan, own=own)

    def running(self, draw: random.Random, *, own: bool) -> tuple[Path, Child]:
        """Start a run, and return its folder and its process at a random moment after the folder is made."""
        span = self.seconds
        while True:
            out = self.new()
            child = self.start(self.first(out), out, own=own)
            while child.running and not out.exists():
                time.sleep(0.002)
            began, part = time.monotonic(), draw.random()
            while child.running and time.monotonic() - began < part * span:
                time.sleep(0.002)
            if child.running:
                return out, child
            # The machine is less busy than it was.
            span = time.monotonic() - began
            child.wait()

    def whole(self, *more: str) -> tuple[Path, Ended]:
        """Return the folder of an uninterrupted run, and how it ended."""
        if more not in self._whole:
            out = self.new()
            began = time.monotonic()
            ended = self.start(self.first(out, *more), out).wait()
            assert ended.code == 0, ended.err
            self.seconds = time.monotonic() - began
            self._whole[more] = out, ended
        return self._whole[more]

    def finish(self, out: Path, *more: str, faulty: str = "", steps: int | None = None) -> list[str]:
        """Continue the run in ``out`` to its end. Return what differs from an uninterrupted run.

        With ``steps``, the number of the steps that are already made, no step may be lost or made again.
        """
        ended = self.start(self.again(out, *more), out, Plan(fault=faulty)).wait()
        if ended.code:
            return [f"the run does not continue (code {ended.code}): {ended.err[-300:]}"]
        folder, whole = self.whole(*more)
        faults = differences(folder, out)
        if steps is not None and steps + ended.steps != whole.steps:
            faults.append(f"{steps} and {ended.steps} steps were made instead of {whole.steps}")
        if not faults:
            shutil.rmtree(out, ignore_errors=True)
        return faults


@contextmanager
def place() -> Iterator[Place]:
    """Make a :class:`Place` in a folder that is removed at the end."""
    # A folder in memory spares the disk thousands of synced writes. To a killed process both are the same.
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="lares-fast-kill-", dir=memory if os.access(memory, os.W_OK) else None))
    try:
        yield Place(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def count(counts: Counts, what: str, tries: list[tuple[str, Callable[[], list[str]]]]) -> None:
    """Make each try and count it. A try is a text about it and a function that returns what is wrong.

    Two tries run at the same time, in processes of their own.
    """
    if not tries:
        return
    with ThreadPoolExecutor(2) as pool:
        for (about, _), faults in zip(tries, pool.map(lambda one: one[1](), tries), strict=True):
            counts.tried(what, goal=len(tries))
            if faults:
                counts.failed(what, f"{about}: {'; '.join(faults)}"[:600], lost=_is_loss(faults))


def _is_loss(faults: list[str]) -> bool:
    """Return whether a fault is more than a wrong message, a wrong exit code or a file that is left."""
    return not all(re.search(r"is left$|the code is|error|does not say|traceback|exit code", text) for text in faults)


def differences(whole: Path, out: Path) -> list[str]:
    """Return how the finished run in ``out`` differs from the uninterrupted run in ``whole``, apart from times."""
    names = {path.name for path in whole.iterdir()}
    there = {path.name for path in out.iterdir()}
    faults = [f"{name} is missing" for name in sorted(names - there)]
    faults += [f"{name} is left" for name in sorted(there) if name.startswith(".")]
    if faults:
        return faults
    for name in ("model.safetensors", "item_ids.json", "config.yaml", "steps-spt.csv", "steps-rpt.csv"):
        if (whole / name).read_bytes() != (out / name).read_bytes():
            faults.append(f"{name} differs")
    if _table(whole) != _table(out):
        faults.append("metrics.csv differs")
    faults += [f"state.pt: {place}" for place in _unequal(*(load_run(folder / "state.pt") for folder in (whole, out)))]
    ends = {"results.svg": "</svg>", "report.html": "</html>"}
    faults += [f"{name} is cut" for name, end in ends.items() if not (out / name).read_text().rstrip().endswith(end)]
    return faults


def torn(out: Path) -> list[str]:
    """Return the files in ``out`` that are not whole. Temporary files and the log of events may be cut."""
    readers = {
        "state.pt": load_run,
        "model.safetensors": load_weights,
        "item_ids.json": lambda path: json.loads(path.read_text()),
        "config.yaml": settings.build,
        "metrics.csv": lambda path: [dict(row)["phase"] for row in csv.DictReader(path.open())],
    }
    faults = []
    for name, read in readers.items():
        if (out / name).exists():
            try:
                read(out / name)
            except (InputError, ValueError, KeyError) as error:
                faults.append(f"{name} is not whole ({error})")
    return faults


def changed(ended: Ended, before: dict[str, str], folder: Path) -> list[str]:
    """Return the files that are not what was last published under their names. ``before`` holds what was there at first."""
    expected = {**before, **ended.published}
    return [
        f"{Path(path).name} is not what was last written under this name"
        for path, digest in expected.items()
        if Path(path).is_relative_to(folder) and Path(path).name not in GROWING
        if not Path(path).exists() or sha256(Path(path)) != digest
    ]


def published(folder: Path) -> dict[str, str]:
    """Return the files in ``folder``, except those that grow and temporary files, with their SHA-256."""
    return {
        str(path): sha256(path)
        for path in sorted(folder.glob("*"))
        if path.is_file() and not path.name.startswith(".") and path.name not in GROWING
    }


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _table(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open() as file:
        return [{name: value for name, value in row.items() if name not in _WALL_TIME} for row in csv.DictReader(file)]


def _unequal(one: Any, other: Any, place: str = "") -> list[str]:
    """Return the places at which two nested values differ. Tensors must have equal bits."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        same = same and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
        return [] if same else [f"{place} differs"]
    if hasattr(one, "__dataclass_fields__"):
        one, other = vars(one), vars(other)
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return [f"{place} has other entries"]
        return [text for name in one if name not in _WALL_TIME for text in _unequal(one[name], other[name], f"{place}.{name}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return [f"{place} has another length"]
        return [text for n, pair in enumerate(zip(one, other, strict=True)) for text in _unequal(*pair, f"{place}[{n}]")]
    return [] if one == other else [f"{place} is {other!r:.60} instead of {one!r:.60}"]
