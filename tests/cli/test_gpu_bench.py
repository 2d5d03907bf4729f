"""The command ``lares-fast gpu-bench``: its options, its errors, and how it resumes. It runs rows on the CPU."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from lares_fast.gpu_bench import bench
from lares_fast.verify import process
from tests.support.command_line import python, refused

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
FAST = ["topk:B1-N24588-K100", "attention:L20-instruments"]


@pytest.fixture(autouse=True)
def no_signal_seen():
    """Forget that another test stopped all processes."""
    process._stopped.clear()


def statuses(out):
    return {name: row["status"] for name, row in json.loads((out / "results.json").read_text())["rows"].items()}


@pytest.fixture
def ran(monkeypatch):
    """Rows pass at once, except those that are named in ``wrong``. Return ``(asked, wrong)``."""
    asked, wrong = [], set()

    def run(self, rows, listener):
        listener.machine({"card": "a card", "torch": "2"})
        for name in rows:
            asked.append(name)
            listener.begin(name)
            result = {"status": "failed", "faults": ["lares_fast: wrong"]} if name in wrong else {"status": "passed"}
            listener.end(name, {**result, "seconds": 1.0})

    monkeypatch.setattr(bench.Bench, "run", run)
    return asked, wrong


def test_the_list_needs_no_gpu(cli):
    result = cli("gpu-bench", "--list")
    assert result.code == 0 and result.written == []
    lines = result.out.splitlines()
    assert lines[1].split(maxsplit=1) == ["spt_step:bf16", "SPT step B 1024 T 5 2+2 layers Instruments lengths, bf16"]
    assert len(lines) > 50
    assert len(cli("gpu-bench", "--list", "--rows", "attention").out.splitlines()) == 2


@needs_no_gpu
def test_without_a_gpu_it_is_refused(cli):
    result = cli("gpu-bench")
    assert refused(result, "no GPU is visible to torch: give --rehearse") and result.written == []


@pytest.mark.parametrize(("arguments", "words"), [
    (["--rows", "nothing"], "--rows nothing is not a row: did you mean"),
    (["--rows", "run:log"], "--rows run:log needs a log: add --log FILE"),
    (["--seconds", "0"], "--seconds must be greater than 0, but got 0"),
    (["--seconds", "nan"], "--seconds must be greater than 0, but got nan"),
    (["--log", "nowhere.csv"], "--log nowhere.csv is not a file: give an interaction log"),
])  # fmt: skip
def test_bad_arguments_are_refused(cli, arguments, words):
    result = cli("gpu-bench", "--rehearse", *arguments)
    assert refused(result, words) and result.written == []


def test_rows_run_are_stored_and_are_not_run_again(cli):
    result = cli("gpu-bench", "--rehearse", "--rows", *FAST)
    assert result.code == 0
    out = Path("gpu-bench")
    assert statuses(out) == dict.fromkeys([FAST[1], FAST[0]], "passed")
    assert "row 1 of 2, attention:L20-instruments" in result.err and "ETA" in result.err
    assert "top-K B 1 N 24,588 K 100, fp32  [topk:B1-N24588-K100: passed" in result.out
    assert (out / "table.txt").read_text() in result.out
    before = (out / "results.json").stat().st_mtime_ns
    again = cli("gpu-bench", "--rehearse", "--rows", *FAST)
    assert again.code == 0 and "gpu-bench has 2 of 2 rows: measuring the other 0" in again.err
    assert "row 1 of" not in again.err and (out / "results.json").stat().st_mtime_ns == before


def test_a_second_call_measures_what_is_missing_or_failed(cli, ran):
    asked, wrong = ran
    wrong.add("attention:L50-full")
    result = cli("gpu-bench", "--rehearse", "--rows", "attention")
    assert result.code == 1 and "1 row failed or not measured: call gpu-bench again" in result.out
    wrong.clear()
    asked.clear()
    result = cli("gpu-bench", "--rehearse", "--rows", "attention", "evaluation")
    assert result.code == 0 and asked == ["evaluation", "attention:L50-full"]
    assert "has 1 of 3 rows: measuring the other 2" in result.err
    assert set(statuses(Path("gpu-bench")).values()) == {"passed"}


def test_a_row_during_which_the_command_was_killed_is_measured_again(cli, ran, monkeypatch):
    asked, _ = ran

    def killed(self, rows, listener):
        listener.machine({"card": "a card", "torch": "2"})
        listener.begin(next(iter(rows)))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bench.Bench, "run", killed)
        assert cli("gpu-bench", "--rehearse", "--rows", "attention").code == 130
    assert statuses(Path("gpu-bench")) == {"attention:L50-full": "begun"}
    assert cli("gpu-bench", "--rehearse", "--rows", "attention").code == 0
    assert asked == ["attention:L50-full", "attention:L20-instruments"]


def test_results_of_another_machine_are_refused(cli, ran, monkeypatch):
    assert cli("gpu-bench", "--rehearse", "--rows", "evaluation").code == 0
    before = Path("gpu-bench/results.json").read_bytes()
    monkeypatch.setattr(bench.Bench, "run", lambda self, rows, listener: listener.machine({"card": "other", "torch": "2"}))
    result = cli("gpu-bench", "--rehearse", "--rows", "attention")
    assert refused(result, "another card (a card, now other): choose another --out, or move it away")
    assert Path("gpu-bench/results.json").read_bytes() == before


def test_a_damaged_file_is_refused(cli):
    Path("gpu-bench").mkdir()
    Path("gpu-bench/results.json").write_text("{")
    assert refused(cli("gpu-bench", "--rehearse", "--rows", "attention"), "gpu-bench/results.json is damaged")


def test_a_folder_in_use_is_refused(cli):
    from lares_fast._files import locked

    with locked(Path("gpu-bench")):
        assert refused(cli("gpu-bench", "--rehearse", "--rows", "attention"), "gpu-bench is in use")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_keeps_what_was_measured_and_leaves_no_process(number, tmp_path):
    rows = ["ceilings", "spt_step:bf16-full"]
    running = python("-m", "lares_fast", "gpu-bench", "--rehearse", "--out", tmp_path / "out", "--rows", *rows)
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if (tmp_path / "out/results.json").exists() and statuses(tmp_path / "out").get(rows[1]) == "begun":
            break
        time.sleep(0.05)
    group = {int(pid) for pid in children_of(running.pid)}
    running.send_signal(number)
    _, err = running.communicate(timeout=30)
    assert running.returncode == 130, err
    assert statuses(tmp_path / "out") == {rows[0]: "passed", rows[1]: "begun"}
    assert len(group) == 1 and not any(map(alive, group))


def children_of(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
