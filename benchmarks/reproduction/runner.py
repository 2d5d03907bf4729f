"""Make the runs of experiments.py one after the other, for a limited time.

``python -m benchmarks.reproduction.runner --data DATA --runs RUNS --minutes 150``

Finished runs are skipped, and interrupted runs continue from their checkpoints. So repeat the command until nothing is left.
When the time is over, or on SIGTERM or SIGINT, the current run saves its state and the runner ends. The record of a run has one
"sitting" for each process that trained or evaluated the run.

Two runners may share RUNS: a runner skips a run that the other one is making. Stop other programs that train one of the runs
first. ``--list`` shows the progress of each run.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.reproduction.experiments import DATA, EXPERIMENTS, Experiment
from lares_fast._files import open_log, write_text

RECORD = "experiment.json"
FINISHED, STOPPED, FAILED, RUNNING = "finished", "stopped", "failed", "running"

# With these variables a process does not return large blocks of memory to the system. Otherwise every step would cause a page
# fault for every page of these blocks.
_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
_EXIT_STOPPED = 130
_ROOT = Path(__file__).parents[2]


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record that the runner wrote into a run folder, or {} if there is none yet."""
    file = folder / RECORD
    return json.loads(file.read_text()) if file.is_file() else {}


def is_trained(experiment: Experiment, record: dict[str, Any]) -> bool:
    """Return whether training finished with the current settings."""
    ends = [sitting["ended"] for sitting in record.get("sittings", []) if sitting["made"] == "train"]
    return ends[-1:] == [FINISHED] and record["command"] == experiment.command()


def is_finished(experiment: Experiment, folder: Path) -> bool:
    """Return whether training and every evaluation are finished."""
    evaluated = all((folder / f"{name}.csv").is_file() for name in experiment.evaluations)
    return is_trained(experiment, read_record(folder)) and evaluated


class Runner:
    """Make runs in the folder ``runs`` for ``minutes``."""

    def __init__(self, data: Path, runs: Path, minutes: float, threads: int = 1) -> None:
        self.data, self.runs, self.threads = data, runs, threads
        self._ends = time.monotonic() + 60 * minutes
        self._stop = False

    def request_stop(self) -> None:
        """Stop the current run and start no other."""
        self._stop = True

    def run(self, experiments: Sequence[Experiment], everything: Sequence[Experiment]) -> None:
        """Make ``experiments`` in order. ``everything`` also has the experiments that they start from."""
        by_name = {experiment.name: experiment for experiment in everything}
        for experiment in experiments:
            folder = self.runs / experiment.name
            if self._over():
                return
            parent = by_name[experiment.start_from] if experiment.start_from else None
            if is_finished(experiment, folder):
                _say(experiment, "finished already")
            elif parent is not None and not is_trained(parent, read_record(self.runs / parent.name)):
                _say(experiment, f"waits for {parent.name}")
            else:
                with _locked(folder) as lock:
                    if lock is None:
                        _say(experiment, "is being made by another runner")
                    else:
                        self._make(experiment, folder, lock)

    def _over(self) -> bool:
        return self._stop or time.monotonic() >= self._ends

    def _make(self, experiment: Experiment, folder: Path, lock: int) -> None:
        data = self.data / experiment.data
        digest = hashlib.sha256(data.read_bytes()).hexdigest()
        if digest != DATA.get(experiment.data, digest):
            sys.exit(f"{data} has sha256 {digest}, but the experiments need {DATA[experiment.data]}: use that file.")
        record = read_record(folder) or {"name": experiment.name, "sittings": []}
        _close(record["sittings"], folder)
        if not is_trained(experiment, record):
            record |= {"command": experiment.command(), "data": experiment.data, "sha256": digest}
            self._sit(experiment, folder, record, "train", self._train_words(experiment, folder, data), lock)
        if is_trained(experiment, record):
            for name, arguments in experiment.evaluations.items():
                target = folder / f"{name}.csv"
                if not target.is_file() and not self._over():
                    words = ["eval", "--run", str(folder), "--data", str(data), "--csv", str(target), *arguments]
                    self._sit(experiment, folder, record, name, words, lock)

    def _train_words(self, experiment: Experiment, folder: Path, data: Path) -> list[str]:
        words = ["train", "--data", str(data), "--phase", experiment.phase, *experiment.assignments()]
        if (folder / "state.pt").is_file():
            return [*words, "--resume", str(folder)]
        start = ["--start-from", str(self.runs / experiment.start_from)] if experiment.start_from else []
        return [*words, "--config", experiment.config, *start, "--out", str(folder)]

    def _sit(
        self, experiment: Experiment, folder: Path, record: dict[str, Any], made: str, words: list[str], lock: int
    ) -> None:
        """Run ``lares-fast words`` until it ends or the time is over, and add the result to ``record``."""
        began = time.monotonic()
        sitting = {"made": made, "began": _now(), "ended": RUNNING, "seconds": 0.0, **_surroundings(self.threads)}
        record["sittings"].append(sitting)
        _write(folder, record)
        _say(experiment, made)
        environment = {**os.environ, **_MEMORY, "OMP_NUM_THREADS": str(self.threads)}
        with open_log(folder / "log.txt") as log:
            # The child inherits the lock and keeps it if the runner is killed.
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", "lares_fast", *words],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=(lock,),
            )
            stopped = False
            while child.poll() is None:
                if self._over() and not stopped:
                    stopped = True
                    child.send_signal(signal.SIGTERM)
                time.sleep(0.2)
        ended = FINISHED if child.returncode == 0 else STOPPED if stopped or child.returncode == _EXIT_STOPPED else FAILED
        sitting |= {"ended": ended, "seconds": round(time.monotonic() - began, 1)}
        _write(folder, record)
        _say(experiment, f"{made} {ended} after {sitting['seconds'] / 60:.1f} minutes, see {folder / 'log.txt'}")


def progress(experiment: Experiment, folder: Path) -> str:
    """Return one line about the progress of a run."""
    record = read_record(folder)
    sittings = record.get("sittings", [])
    if is_finished(experiment, folder):
        state = FINISHED
    elif sittings:
        state = f"{sittings[-1]['made']} {sittings[-1]['ended']}"
    else:
        state = "begun elsewhere" if (folder / "state.pt").is_file() else "not begun"
    hours = sum(sitting["seconds"] for sitting in sittings) / 3600
    epochs: dict[str, int] = {}
    if (folder / "metrics.csv").is_file():
        with (folder / "metrics.csv").open() as file:
            for row in csv.DictReader(file):
                if row["split"] == "valid":
                    epochs[row["phase"]] = int(row["epoch"])
    done = ", ".join(f"{phase} epoch {epoch}" for phase, epoch in epochs.items())
    return f"{experiment.name:26} {state:16} {hours:5.1f} h  {done}"


def _close(sittings: list[dict[str, Any]], folder: Path) -> None:
    """Set the end of a sitting that ended without a runner: the time of its last checkpoint.

    A run that was begun without a runner gets one sitting, which begins when its settings were written.
    """
    if not (folder / "state.pt").is_file():
        return
    if not sittings:
        began = datetime.fromtimestamp((folder / "config.yaml").stat().st_mtime, UTC)
        sittings.append({"made": "train", "began": began.isoformat(timespec="seconds"), "ended": RUNNING, "seconds": 0.0})
    if sittings[-1]["ended"] == RUNNING:
        lasted = (folder / "state.pt").stat().st_mtime - datetime.fromisoformat(sittings[-1]["began"]).timestamp()
        sittings[-1] |= {"ended": STOPPED, "seconds": round(max(lasted, 0.0), 1)}


def _surroundings(threads: int) -> dict[str, Any]:
    described = subprocess.run(
        ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True
    )
    packages = {name: version(name) for name in ("lares_fast", "torch", "numpy")}
    return {
        "commit": described.stdout.strip() or "unknown",
        "versions": {"python": platform.python_version(), **packages},
        "cpu": _cpu(),
        "threads": threads,
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or platform.machine()


@contextmanager
def _locked(folder: Path) -> Iterator[int | None]:
    """Lock the folder and yield the lock's descriptor, or None if another runner or a training process holds the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    # The file .lock belongs to the training process, so the runner locks another file.
    with (folder / ".runner.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield file.fileno()


def _write(folder: Path, record: dict[str, Any]) -> None:
    write_text(folder / RECORD, json.dumps(record, indent=1) + "\n")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _say(experiment: Experiment, text: str) -> None:
    print(f"{_now()}  {experiment.name}: {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that has the logs")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder that has the run folders (default: runs)")
    parser.add_argument("--minutes", type=float, default=150, help="stop after this many minutes (default: 150)")
    parser.add_argument("--threads", type=int, default=1, help="number of threads of the training process (default: 1)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="make only these runs, in this order")
    parser.add_argument("--list", action="store_true", help="show the progress of each run, and exit")
    arguments = parser.parse_args()
    by_name = {experiment.name: experiment for experiment in EXPERIMENTS}
    if unknown := sorted(set(arguments.only or ()) - set(by_name)):
        parser.error(f"there is no run {unknown[0]}: they are {', '.join(by_name)}")
    chosen = [by_name[name] for name in arguments.only or by_name]
    if arguments.list:
        print("\n".join(progress(experiment, arguments.runs / experiment.name) for experiment in chosen))
        return
    if arguments.data is None:
        parser.error("--data must name the folder that has the logs")
    runner = Runner(arguments.data.absolute(), arguments.runs.absolute(), arguments.minutes, arguments.threads)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: runner.request_stop())
    runner.run(chosen, EXPERIMENTS)


if __name__ == "__main__":
    main()
