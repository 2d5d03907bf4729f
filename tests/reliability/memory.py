"""Compare predicted and measured peaks of memory, and run commands with too little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.reliability.counts import Counts
from tests.reliability.limited import ENVIRONMENT, Done, Limited

MIB = 2**20
# The largest error of a prediction, as a share of the measured peak.
TOLERANCE = 0.15
# The code that a process reads from the disk in its first step, as the plan counts it.
READ = 45 * MIB
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


# For runs that are repeated with many limits.
TRIED = _case("tried", (150, 16, 2_000), "mean_depth=2", (96, 48, 64))
# With less than this a run draws no curves, which need more than the rest.
NOT_DRAWN = 190 * MIB


class Ended(NamedTuple):
    """The end of a command: its exit code, its output, its errors, and the largest resident size of its process in bytes."""

    code: int
    out: str
    err: str
    peak: int


def measure(counts: Counts) -> None:
    """Count predictions, refusals and allocation failures."""
    with tempfile.TemporaryDirectory() as name, Limited() as limited:
        folder = Path(name)
        _plant(counts)
        _predict(counts, folder, CASES[:1] if counts.quick else CASES)
        _refuse(counts, limited, folder, CASES[1:2] if counts.quick else CASES[1:5])
        _limit(counts, limited, folder)


def run(*arguments: object) -> Ended:
    """Run the command line in a process of its own."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        command = [sys.executable, "-P", "-m", "lares_fast", *map(str, arguments)]
        process = subprocess.Popen(command, stdout=out, stderr=err, env=ENVIRONMENT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    return Ended(process.returncode, texts[0], texts[1], usage.ru_maxrss * 1024)


def plan(case: Case, log: Path) -> dict[str, Any]:
    """Return the plan of a case."""
    report: dict[str, Any] = json.loads(run("doctor", "--json", "--plan", "instruments", "--data", log, *case.arguments()).out)
    return report


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
        peaks = plan(case, log)["peaks"]
        measured = _quick_peaks(case, log, out) if counts.quick else _peaks(case, log, out)
        for parts, size in measured.items():
            errors.append(compare(counts, f"{case.name}, {' and '.join(parts)}", max(peaks[part] for part in parts), size))
            largest = max(largest, size)
    worst = max(errors, key=abs)
    counts.note(PREDICTED, f"worst error {worst:+.1%}, largest measured peak {largest / MIB:,.0f} MiB")


def _train(case: Case, log: Path, out: Path) -> tuple[object, ...]:
    return ("train", "--config", "instruments", "--data", log, "--out", out, *case.arguments())


def _quick_peaks(case: Case, log: Path, out: Path) -> dict[tuple[str, ...], int]:
    """Return the measured peak of a short run of both phases."""
    done = run(*_train(case, log, out), "--set", "spt.max_steps=1", "--set", "rpt.max_steps=1")
    assert done.code == 0, done
    return {("phase spt", "phase rpt"): done.peak}


def _peaks(case: Case, log: Path, out: Path) -> dict[tuple[str, ...], int]:
    """Return the measured peak of each phase, and of recommending to all users."""
    train = _train(case, log, out)
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
    return {("phase spt",): max(done[0].peak, done[1].peak), ("phase rpt",): done[2].peak, ("recommend",): done[3].peak}


def _refuse(counts: Counts, limited: Limited, folder: Path, cases: Sequence[Case]) -> None:
    """Give runs less and more memory than the plan says, and count the answers that are wrong."""
    for case in cases:
        log = write_log(folder / "log.txt", case)
        train = (
            "train",
            "--config",
            "instruments",
            "--data",
            log,
            *case.arguments(),
            "--phase",
            "spt",
            "--set",
            "spt.max_steps=1",
        )
        report = plan(case, log)
        # What the plan counts besides the process as it is after its imports.
        needed = report["peaks"]["phase spt"] - next(line["kept"] for line in report["lines"]) + READ
        out = folder / "refused"
        counts.tried(REFUSED)
        done = limited.run(*train, "--out", out, extra=6 * needed // 10)
        sentence = done.err.strip().splitlines()[-1:] or [""]
        if done.code != 2 or "needs about" not in sentence[0] or "are free: lower " not in sentence[0] or out.exists():
            counts.failed(REFUSED, f"{case.name}: {done.code}, {done.err[-300:]!r}")
        if counts.quick:
            continue
        counts.tried(ACCEPTED)
        # Address space is more than memory: PyTorch's compiler and libraries take some of it, too.
        done = limited.run(*train, "--out", folder / f"accepted-{case.name}", extra=needed + 512 * MIB)
        if done.code:
            counts.failed(ACCEPTED, f"{case.name}: {done.code}, {done.err[-300:]!r}")


def judge(counts: Counts, what: str, done: Done) -> str:
    """Count a command that may lack memory, and return how it ended."""
    counts.tried(LIMITED)
    lines = done.err.strip().splitlines()
    if done.code == 0:
        return "succeeded"
    if done.code == 2 and lines and lines[-1].startswith("lares-fast: error: ") and "Traceback" not in done.err:
        return "refused before the first step" if "needs about" in lines[-1] else "ended with a sentence"
    counts.failed(LIMITED, f"{what}: code {done.code}, {done.err[-500:]!r}")
    return "failed"


def _limit(counts: Counts, limited: Limited, folder: Path) -> None:
    """Run commands with amounts of memory from nothing more than the imports take to what the whole command takes."""
    case = TRIED
    log, out = write_log(folder / "log.txt", case), folder / "whole-train"
    steps = ("spt.max_steps=1", "rpt.max_steps=1")
    settings = [*case.arguments(), *(word for setting in steps for word in ("--set", setting))]
    train = ["train", "--config", "instruments", "--data", log, *settings, "--out"]
    serve = ["recommend", "--run", out, "--input", log, "--output"]
    api = [log, *(word for word in settings if word != "--set")]
    tries: list[tuple[int, str, dict[str, bool], Callable[[Path], list[object]]]] = [
        (0 if counts.quick else 20, "train", {}, lambda path: [*train, path]),
        (2 if counts.quick else 40, "train without the estimate", {"blind": True}, lambda path: [*train, path]),
        (0 if counts.quick else 20, "eval", {}, lambda path: ["eval", "--run", out, "--csv", path.with_suffix(".csv")]),
        (0 if counts.quick else 20, "recommend", {}, lambda path: [*serve, path.with_suffix(".csv")]),
        (0 if counts.quick else 20, "Trainer", {"blind": True, "api": True}, lambda path: [api[0], path, *api[1:]]),
    ]
    ends: dict[str, int] = {}
    goal = sum(number for number, *_ in tries)
    for number, what, how, arguments in tries:
        if not number:
            continue
        whole = limited.run(*arguments(folder / f"whole-{what.replace(' ', '-')}"), extra=NOT_DRAWN, **how)
        assert whole.code == 0, whole
        most = whole.grown
        for at in range(number):
            extra = most * (at + 1) // (number + 1) if counts.quick else most * at // (number - 1)
            done = limited.run(*arguments(folder / f"limited-{what.replace(' ', '-')}-{at}"), extra=extra, **how)
            end = judge(counts, f"{what} with {extra / MIB:,.0f} of {most / MIB:,.0f} MiB", done)
            ends[end] = ends.get(end, 0) + 1
            counts.tried(LIMITED, 0, goal=goal)
    counts.note(LIMITED, ", ".join(f"{number} {end}" for end, number in sorted(ends.items())))


def _plant(counts: Counts) -> None:
    """Check that wrong results are counted."""
    planted = Counts("planted", quick=True)
    compare(planted, "a planted prediction that is 16 % off", 116, 100)
    judge(planted, "a planted traceback", Done(1, "Traceback (most recent call last):", 0))
    judge(planted, "a planted crash", Done(-11, "", 0))
    counts.tried(PLANTED, 3)
    if sum(row.failed for row in planted.rows.values()) != 3:
        counts.failed(PLANTED, "a planted fault was not counted")
