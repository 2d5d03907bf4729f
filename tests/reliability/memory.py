"""Compare predicted and measured peaks of memory, and run commands with too little memory."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.reliability.counts import ROOT, Counts

MIB = 2**20
# The largest error of a prediction, as a share of the measured peak.
TOLERANCE = 0.15
PREDICTED, REFUSED, ACCEPTED = "predictions of a peak", "runs that cannot fit", "runs that fit"
LIMITED, PLANTED = "commands with too little memory", "planted faults"


@dataclass(frozen=True)
class Case:
    """A configuration: the sizes of its log, and its settings."""

    name: str
    users: int
    length: int
    items: int
    settings: tuple[str, ...]

    def arguments(self) -> list[str]:
        """Return the settings as flags of the command line. The depth is the deepest one in every step."""
        fixed = ("model.depth_sampling=constant", "rpt.data_filter=false", "evaluation.test=false", *self.settings)
        return [word for setting in fixed for word in ("--set", setting)]


def _case(name: str, log: tuple[int, int, int], model: str, batches: tuple[int, int, int]) -> Case:
    """Return a case with a ``log`` of (users, length, items), settings of the model, and batches of spt, rpt and evaluation."""
    names = ("spt.batch_size", "rpt.batch_size", "evaluation.batch_size")
    sizes = tuple(f"{key}={size}" for key, size in zip(names, batches, strict=True))
    return Case(name, *log, (*(f"model.{part}" for part in model.split()), *sizes))


CASES = (
    _case("small", (300, 20, 2_000), "mean_depth=2", (128, 64, 256)),
    _case("published size", (2_000, 30, 20_000), "mean_depth=4", (1024, 400, 256)),
    _case("long histories", (500, 150, 5_000), "hidden_size=128 inner_size=512 mean_depth=3 max_len=100", (256, 64, 256)),
    _case("deep", (500, 60, 10_000), "hidden_size=128 inner_size=512 mean_depth=8 max_len=50", (256, 64, 256)),
    _case("large batch", (2_000, 50, 50_000), "mean_depth=4", (4096, 2048, 1024)),
    _case("large catalog", (1_000, 1_000, 1_000_000), "mean_depth=4", (256, 128, 256)),
    _case(
        "wide, cosine",
        (500, 400, 200_000),
        "hidden_size=256 inner_size=1024 mean_depth=4 similarity=cos tau=0.1",
        (256, 64, 256),
    ),
)


class Done(NamedTuple):
    """The end of a command: its exit code, its output, its errors, and the largest resident size of its process in bytes."""

    code: int
    out: str
    err: str
    peak: int


def measure(counts: Counts) -> None:
    """Count predictions, refusals and allocation failures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _predict(counts, folder, CASES[:1] if counts.quick else CASES)
        _refuse(counts, folder, CASES[:1] if counts.quick else CASES[:4])
        _limit(counts, folder)
        _plant(counts)


def run(*arguments: object, limit: int | None = None, code: str | None = None) -> Done:
    """Run the command line in a process, with at most ``limit`` bytes of address space. ``code`` replaces the command line."""

    def restrict() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    start = ["-m", "lares_fast"] if code is None else ["-c", code]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        command = [sys.executable, *start, *map(str, arguments)]
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment, preexec_fn=restrict)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    return Done(process.returncode, texts[0], texts[1], usage.ru_maxrss * 1024)


def write_log(path: Path, case: Case) -> Path:
    """Write a log in which every item occurs, in random order."""
    events = np.resize(np.arange(1, case.items + 1), case.users * case.length)
    table = np.random.default_rng(0).permutation(events).reshape(case.users, case.length)
    path.write_text("".join(f"{user} {' '.join(map(str, row))}\n" for user, row in enumerate(table.tolist(), 1)))
    return path


def compare(counts: Counts, what: str, predicted: int, measured: int) -> float:
    """Count one prediction, and return its error as a share of the measured peak."""
    error = predicted / measured - 1
    counts.tried(PREDICTED)
    print(f"memory: {what}: predicted {predicted / MIB:,.0f} MiB, measured {measured / MIB:,.0f} MiB, {error:+.1%}", flush=True)
    if abs(error) > TOLERANCE:
        counts.failed(PREDICTED, f"{what}: predicted {predicted / MIB:,.0f} MiB, measured {measured / MIB:,.0f} MiB")
    return error


def _predict(counts: Counts, folder: Path, cases: Sequence[Case]) -> None:
    errors, largest = [], 0
    for case in cases:
        log, out = write_log(folder / "log.txt", case), folder / f"run-{case.name.replace(' ', '-')}"
        peaks = json.loads(run("doctor", "--json", "--plan", "instruments", "--data", log, *case.arguments()).out)["peaks"]
        for what, measured in _peaks(case, log, out).items():
            errors.append(compare(counts, f"{case.name}, {what}", peaks[what], measured))
            largest = max(largest, measured)
    worst = max(errors, key=abs)
    counts.note(PREDICTED, f"worst error {worst:+.1%}, largest measured peak {largest / MIB:,.0f} MiB")


def _peaks(case: Case, log: Path, out: Path) -> dict[str, int]:
    """Return the measured peak of each phase, and of recommending to all users."""
    train = ("train", "--config", "instruments", "--data", log, "--out", out, *case.arguments())
    again = ("train", "--resume", out)
    done = [
        run(*train, "--phase", "spt", "--set", "spt.max_steps=1"),
        # Here the best weights of the first epoch are in memory, as in the rest of a long run.
        run(*again, "--phase", "spt", "--set", "spt.max_steps=2"),
        run(*again, "--phase", "rpt", "--set", "rpt.max_steps=2"),
        run("recommend", "--run", out, "--input", log, "--output", out / "answers.csv"),
    ]
    for each in done:
        assert each.code == 0, each
    return {"phase spt": max(done[0].peak, done[1].peak), "phase rpt": done[2].peak, "recommend": done[3].peak}


_SIZE = (
    "import sys, re; from lares_fast.cli import main; code = main(sys.argv[1:]) if sys.argv[1:] else 0;"
    "import lares_fast.cli.train; from lares_fast import _native; _native.available();"
    "print('VmPeak', re.search(r'VmPeak:\\s+(\\d+)', open('/proc/self/status').read())[1]); sys.exit(code)"
)
# The estimate is turned off, so that allocations fail.
_BLIND = (
    "import sys; from lares_fast import _device, _memory; from lares_fast.train import memory;"
    "memory.free_bytes = _device.free_bytes = lambda device: sys.maxsize;"
    "from lares_fast.cli import main; sys.exit(main(sys.argv[1:]))"
)
_API = """
import sys
from lares_fast import load
from lares_fast._errors import LaresFastError
from lares_fast.data import leave_one_out, read_log
from lares_fast.cli import settings
from lares_fast.train import Trainer, memory
memory.free_bytes = lambda device: sys.maxsize
log_file, out, *assignments = sys.argv[1:]
try:
    log = read_log(log_file)
    Trainer(settings.build("instruments", assignments), log, leave_one_out(log), out).run(("spt",))
    load(out).recommend([log.item_ids[log.history(user)] for user in range(log.n_users)])
except LaresFastError as error:
    print(f"lares-fast: error: {error}", file=sys.stderr)
    sys.exit(2)
"""


def _address_space(*arguments: object) -> int:
    """Return the largest address space that a command takes, in bytes, or that the imports take without arguments."""
    done = run(*arguments, code=_SIZE)
    assert done.code == 0, done
    return int(done.out.split()[-1]) * 1024


def _refuse(counts: Counts, folder: Path, cases: Sequence[Case]) -> None:
    start = _address_space()
    for case in cases:
        log = write_log(folder / "log.txt", case)
        train = (
            "train",
            "--config",
            "instruments",
            "--data",
            log,
            "--set",
            "spt.max_steps=1",
            *case.arguments(),
            "--phase",
            "spt",
        )
        report = json.loads(run("doctor", "--json", "--plan", "instruments", "--data", log, *case.arguments()).out)
        lines = [line for line in report["lines"] if line["part"] == "phase spt"]
        needed = max(line["peak"] for line in lines) - lines[0]["kept"]
        out = folder / "refused"
        counts.tried(REFUSED)
        done = run(*train, "--out", out, limit=start + needed // 3)
        sentence = done.err.strip().splitlines()[-1:] or [""]
        if done.code != 2 or "needs about" not in sentence[0] or "are free: lower " not in sentence[0] or out.exists():
            counts.failed(REFUSED, f"{case.name}: {done.code}, {done.err[-300:]!r}")
        if counts.quick:
            continue
        counts.tried(ACCEPTED)
        done = run(*train, "--out", folder / f"accepted-{case.name}", limit=start + 2 * needed + 512 * MIB)
        if done.code:
            counts.failed(ACCEPTED, f"{case.name}: {done.code}, {done.err[-300:]!r}")


def judge(counts: Counts, what: str, done: Done) -> str:
    """Count a command that may lack memory, and return how it ended."""
    counts.tried(LIMITED)
    lines = done.err.strip().splitlines()
    if done.code == 0:
        return "succeeded"
    if done.code == 2 and lines and lines[-1].startswith("lares-fast: error: ") and "Traceback" not in done.err:
        return "refused" if "needs about" in lines[-1] else "told"
    counts.failed(LIMITED, f"{what}: code {done.code}, {done.err[-500:]!r}")
    return "failed"


def _limit(counts: Counts, folder: Path) -> None:
    case = CASES[0]
    log, out = write_log(folder / "log.txt", case), folder / "limited"
    settings = case.arguments()
    train = (
        "train",
        "--config",
        "instruments",
        "--data",
        log,
        "--set",
        "spt.max_steps=1",
        "--set",
        "rpt.max_steps=1",
        *settings,
    )
    # The imports that every command needs must succeed.
    low, high = _address_space(), _address_space(*train, "--out", out)
    tries = {
        "train": (4 if counts.quick else 30, None, [*train, "--out"]),
        "train without the estimate": (0 if counts.quick else 40, _BLIND, [*train, "--out"]),
        "eval": (0 if counts.quick else 20, _BLIND, ["eval", "--run", out, "--csv"]),
        "recommend": (0 if counts.quick else 20, _BLIND, ["recommend", "--run", out, "--input", log, "--output"]),
        "Trainer and Recommender": (0 if counts.quick else 20, _API, None),
    }
    ends: dict[str, int] = {}
    goal = sum(number for number, *_ in tries.values())
    for what, (number, code, command) in tries.items():
        for at, limit in enumerate(np.linspace(low, high, number).astype(int).tolist()):
            name = folder / f"limited-{what.replace(' ', '-')}-{at}"
            if command is None:
                words = [word for word in settings if word != "--set"]
                arguments: list[object] = [log, name, "spt.max_steps=1", *words]
            else:
                arguments = [*command, name.with_suffix(".csv") if command[0] != "train" else name]
            done = run(*arguments, limit=limit, code=code)
            end = judge(counts, f"{what} in {limit / MIB:,.0f} MiB of address space", done)
            ends[end] = ends.get(end, 0) + 1
            counts.tried(LIMITED, 0, goal=goal)
    counts.note(LIMITED, ", ".join(f"{number} {end}" for end, number in sorted(ends.items())))


def _plant(counts: Counts) -> None:
    """Check that wrong results are counted."""
    planted = Counts("planted", quick=True)
    compare(planted, "a planted prediction that is 16 % off", 116, 100)
    judge(planted, "a planted traceback", Done(1, "", "Traceback (most recent call last):", 0))
    judge(planted, "a planted crash", Done(-11, "", "", 0))
    counts.tried(PLANTED, 3)
    if sum(row.failed for row in planted.rows.values()) != 3:
        counts.failed(PLANTED, "a planted fault was not counted")
