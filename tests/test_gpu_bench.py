"""``lares-fast gpu-bench``: how rows are chosen, checked and timed, and the process that runs them."""

import json
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.gpu import first
from lares_fast import LARESConfig
from lares_fast._errors import InputError
from lares_fast.data import leave_one_out
from lares_fast.gpu_bench import __main__ as worker
from lares_fast.gpu_bench import bench, candidates, cases, model_rows, official, our_step, rows, run_rows, step_rows
from lares_fast.gpu_bench.bench import Bench, Listener
from lares_fast.gpu_bench.machine import Machine
from lares_fast.gpu_bench.official_step import depths_of
from lares_fast.gpu_bench.our_step import log_of
from lares_fast.train import optimizer as train_optimizer
from lares_fast.train.device_log import DeviceLog
from lares_fast.train.graphs import CudaCapture
from lares_fast.train.steps import DeviceSteps
from lares_fast.verify import gpu_report, process

PASSED = {"status": "passed"}


@pytest.fixture(autouse=True)
def no_signal_seen():
    """Forget that another test stopped all processes."""
    process._stopped.clear()


@pytest.fixture
def machine():
    return Machine(rehearse=True)


def row(run, seconds=1.0):
    return rows.Row("a title", seconds, run)


# The list of rows.


def test_the_rows_of_training_come_first_after_the_ceilings():
    titles = [one.title for one in list(rows.ROWS.values())[:4]]
    assert titles == [
        "ceilings: copy, products, launch",
        "SPT step B 1024 T 5 2+2 layers Instruments lengths, bf16",
        "RPT step B 400 G 4 T 3/8/5/4 2+2 layers Instruments lengths, bf16",
        "SPT rows a second",
    ]


def test_rows_are_chosen_by_name_and_by_group_in_their_order():
    names = list(rows.ROWS)
    assert rows.chosen(None, names) == names
    assert rows.chosen(["encode", "ceilings"], names)[:3] == ["ceilings", "encode:fp32-B1024", "encode:bf16-B1024"]
    assert rows.chosen(["topk:B1-N1M-K100"], names) == ["topk:B1-N1M-K100"]
    assert len(rows.chosen(["topk"], names)) == 19


@pytest.mark.parametrize(("asked", "meant"), [("spt_stp", "spt_step"), ("topk:B1", "topk"), ("", "did you mean")])
def test_an_unknown_row_is_an_error_that_names_a_near_one(asked, meant):
    with pytest.raises(InputError, match=rf"--rows {asked} is not a row: did you mean.*{meant}|--rows  is not a row"):
        rows.chosen([asked], rows.ROWS)


def test_the_run_on_a_log_needs_a_log(tmp_path):
    with pytest.raises(InputError, match="--rows run:log needs a log: add --log FILE"):
        rows.chosen(["run:log"], rows.table())
    assert rows.chosen(["run"], rows.table(tmp_path / "log.csv")) == ["run:synthetic", "run:log"]
    assert rows.chosen(["run"], rows.table()) == ["run:synthetic"]


# What is measured.


def test_the_invented_log_has_the_size_and_the_lengths_of_instruments():
    log = cases.instruments_log()
    train = leave_one_out(log).train
    assert len(train) == pytest.approx(cases.USERS / cases.INSTRUMENTS[0], rel=0.01)
    lengths = np.minimum(train.ends - log.offsets[train.users], 20)
    share = np.bincount(lengths, minlength=21)[1:] / len(train)
    np.testing.assert_allclose(share, cases.INSTRUMENTS, atol=0.004)
    assert log.items.min() >= 1 and log.items.max() < cases.N


@pytest.mark.parametrize("case", [step_rows.SPT_CASE, step_rows.RPT_CASE])
def test_a_step_has_the_depths_of_its_case(case, machine):
    log = log_of(machine)
    config = LARESConfig(n_items=log.n_items, **case.model(dropout=False))
    models = [step_rows.reference.LARES(config) for _ in range(2)]
    phase = step_rows._phase(case, *models, log)
    index, key = case.choice(phase)
    assert sorted(depths_of(phase.batch(index, key))) == sorted(case.depths)


def test_all_ways_to_make_a_step_of_phase_2_agree_with_the_reference(machine):
    result = rows.ROWS["rpt_step:fp32"].run(machine)
    assert result["status"] == "passed"
    ours = ["lares_fast, batch ready", "lares_fast, with its batch"]
    assert list(result["turns_ms"]) == ["official way", "official way, without dead work", *ours]


def test_replayed_steps_agree_with_the_reference(machine, monkeypatch):
    """The steps of a GPU, on the CPU: a replay runs the captured function again, which has the same memory."""
    replays = []

    def capture(function):
        return lambda: replays.append(function())

    def steps(run, phase, optimizer):
        return DeviceSteps(run, phase, optimizer, DeviceLog(run.log, run.device, 2**40), capture)

    monkeypatch.setattr(our_step, "make_steps", steps)
    monkeypatch.setitem(train_optimizer._CPU, "fused", True)
    result = step_rows.training_step(machine, step_rows.SPT_CASE, bf16=False)
    assert result["status"] == "passed" and len(replays) >= 2


def test_scores_of_all_trajectories_at_once_change_no_result():
    """The compiled baseline of phase 2 takes this way."""
    torch.manual_seed(0)
    config = LARESConfig(n_items=50, max_len=6, hidden_size=16, inner_size=32, dropout=0.0)
    models = [official.OfficialLARES(config) for _ in range(2)]
    items, lengths = torch.randint(1, 50, (5, 6)), torch.full((5,), 6)
    states = [3 * torch.randn(5, 6, 16) for _ in range(3)]
    how = {"k": 25, "beta": 1.0, "dead_work": False, "states": states, "frozen_states": states[::-1]}
    given = (*models, (items, lengths), items[:, 0], (3, 1, 4))
    one, other = (official.rpt_loss(*given, **how, together=together) for together in (False, True))
    torch.testing.assert_close(one, other)
    assert one[1].std() > 0


def test_a_training_step_that_is_wrong_is_a_fault_and_is_not_timed(machine, monkeypatch):
    right = official.spt_head
    monkeypatch.setattr(official, "spt_head", lambda *x, alpha, **how: right(*x, alpha=2 * alpha, **how))
    result = rows.ROWS["spt_step:fp32"].run(machine)
    assert result["status"] == "failed"
    assert set(result["turns_ms"]) == {"lares_fast, batch ready", "lares_fast, with its batch"}
    assert [fault.partition(":")[0] for fault in result["faults"]] == ["official way", "official way, without dead work"]


def test_a_run_of_the_trainer_that_is_wrong_is_a_fault(machine, monkeypatch):
    monkeypatch.setattr(run_rows, "_mean_loss_of_a_run", lambda *_: 1.0)
    result = run_rows.rows_per_second(machine)
    assert result["status"] == "failed" and "lares_fast" not in result["turns_ms"]


def test_an_evaluation_that_is_wrong_is_a_fault(machine, monkeypatch):
    right = model_rows.model_ranks
    monkeypatch.setattr(model_rows, "model_ranks", lambda *x, **how: {k: v + 9 for k, v in right(*x, **how).items()})
    result = model_rows.evaluation(machine)
    assert result["status"] == "failed" and list(result["turns_ms"]) == []


def test_a_run_on_a_log_is_cut_and_says_so(machine, tmp_path, monkeypatch):
    log = tmp_path / "shop.txt"
    log.write_text("\n".join(f"u{user} " + " ".join(f"i{(user * 7 + k) % 60}" for k in range(6)) for user in range(40)))
    ticks = iter(range(0, 100_000, 3))
    monkeypatch.setattr(run_rows, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
    found = run_rows.log_run(machine, log)
    assert found["status"] == "passed"
    assert found["facts"]["log"] == "shop.txt" and found["facts"]["cut after s"] == 5.0
    assert "NDCG@10" not in found["facts"]


# Candidates.


def test_a_wrong_candidate_is_a_fault_and_is_not_timed(machine):
    one, calls = candidates.Candidates(machine), []
    check = candidates.near([torch.ones(3)], 1e-3)
    one.add("rival", lambda: torch.ones(3), check)
    one.add("lares_fast", lambda: calls.append(1) or torch.tensor([1, 1, 1.01]), check)
    one.add("lares_fast, other", lambda: torch.ones(3), check)
    result = one.result({})
    assert result["status"] == "failed" and len(calls) == 1
    assert list(result["turns_ms"]) == ["rival", "lares_fast, other"]
    assert result["faults"] == ["lares_fast: the error of tensor 0 is 0.01 of its largest number"]
    for broken in (torch.full((3,), torch.nan), torch.full((3,), torch.inf)):
        assert check(broken)


def test_all_wrong_tensors_are_one_fault():
    check = candidates.near([torch.ones(2), torch.ones(2), torch.ones(2)], 1e-3)
    assert check([torch.ones(2), torch.full((2,), 1.5), torch.full((2,), torch.nan)]) == [
        "the error of tensor 2 is nan of its largest number, and 1 other tensors are wrong"
    ]


def raising(error):
    def call():
        raise error

    return call


def test_a_rival_that_cannot_run_is_left_out_but_our_candidate_must_run(machine):
    one, check = candidates.Candidates(machine), candidates.near([torch.ones(1)], 1e-3)
    one.add("rival", raising(torch.cuda.OutOfMemoryError("CUDA out of memory")), check)
    one.add("lares_fast", raising(RuntimeError("no kernel")), check)
    result = one.result({})
    assert result["left_out"] == {"rival": "OutOfMemoryError: CUDA out of memory"}
    assert result["faults"] == ["lares_fast: RuntimeError: no kernel"] and result["status"] == "failed"


def test_a_candidate_that_fails_only_when_it_is_timed_is_noticed(machine):
    one = candidates.Candidates(machine)
    one.add("rival", raising(RuntimeError("not compiled")), lambda _: [], checked=lambda: 1)
    assert one.left_out == {"rival": "RuntimeError: not compiled"}


def test_an_error_that_spoils_the_gpu_is_not_hidden(machine):
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError):
        candidates.Candidates(machine).add("rival", raising(error), lambda _: [])
    assert not candidates.is_fatal(RuntimeError("CUDA error: operation not permitted when stream is capturing"))
    assert not candidates.is_fatal(torch.cuda.OutOfMemoryError("CUDA error: out of memory"))


def test_a_capture_runs_after_warm_up_and_its_replay_returns_the_result_of_the_capture(monkeypatch):
    calls, replays = [], []

    class Capture:
        stream = staticmethod(nullcontext)

        def __init__(self, device):
            pass

        def __call__(self, function):
            function()
            return lambda: replays.append(len(calls))

    monkeypatch.setattr(candidates, "CudaCapture", Capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    replay = candidates.captured(lambda: calls.append(None) or len(calls))
    captures = candidates.WARM_UP + 1
    assert [replay(), replay()] == [captures] * 2 and replays == [captures] * 2


# The process that runs rows.


def worked(wanted, end=float("inf"), clock=lambda: 0.0):
    events = []
    worker.run(wanted, Machine(rehearse=True), lambda **event: events.append(event), end, clock)
    return events


def test_a_row_that_raises_is_failed_and_the_next_one_runs():
    events = worked({"a": row(raising(RuntimeError("no kernel"))), "b": row(lambda machine: dict(PASSED))})
    assert [event["event"] for event in events] == ["begin", "end"] * 2
    assert events[1]["result"] == {"status": "failed", "faults": ["TypeError: raising.<locals>.call() takes 0 positional "
                                   "arguments but 1 was given"], "seconds": 0.0}  # fmt: skip
    assert events[3]["result"]["status"] == "passed"


def test_after_an_error_that_spoils_the_gpu_the_process_ends():
    def broken(machine):
        raise RuntimeError("CUDA error: device-side assert triggered")

    assert [event["row"] for event in worked({"a": row(broken), "b": row(lambda machine: dict(PASSED))})] == ["a", "a"]


def test_a_row_that_needs_too_much_memory_is_skipped():
    def large(machine):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    assert worked({"a": row(large)})[1]["result"]["status"] == "skipped"


def test_rows_are_cut_where_the_time_ends():
    now = [0.0]

    def slow(machine):
        now[0] += 30
        return dict(PASSED)

    events = worked({name: row(slow) for name in "abc"}, end=50, clock=lambda: now[0])
    assert [event["row"] for event in events if event["event"] == "end"] == ["a", "b"]


def test_a_row_that_the_time_does_not_suffice_for_is_not_begun(monkeypatch):
    monkeypatch.setattr(worker, "run_row", lambda one, machine: (dict(PASSED), True))
    wanted, events = {"long": row(None, seconds=90), "short": row(None, seconds=9)}, []
    worker.run(wanted, SimpleNamespace(rehearse=False), lambda **event: events.append(event), 60.0, lambda: 0.0)
    assert [event["row"] for event in events] == ["short", "short"]


def test_a_capture_that_failed_is_the_last_work_of_its_process(monkeypatch):
    monkeypatch.setattr(CudaCapture, "failed", [])

    def fails(machine):
        CudaCapture.failed.append("a graph")
        return dict(PASSED)

    events = worked({"a": row(fails), "b": row(lambda machine: dict(PASSED))})
    assert [event["row"] for event in events] == ["a", "a"]


FAKE = """
import json, os, signal, sys, time
def emit(**event): print(json.dumps(event), flush=True)
emit(event="machine", machine={"card": "a card"})
for name in json.loads(sys.argv[1]):
    print("== " + name, file=sys.stderr, flush=True)
    emit(event="begin", row=name)
    if name.startswith("killed"): os.kill(os.getpid(), signal.SIGKILL)
    if name.startswith("hung"): sys.exit("Timeout (0:03:04)!\\nThread 0x1 (most recent call first):")
    if name.startswith("crashed"): sys.exit('File "/home/me/x.py", line 3\\nMemoryError: no')
    if name.startswith("slow"): time.sleep(600)
    emit(event="end", row=name, result={"status": "passed"})
"""


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Return a function that runs rows by a fake process, and returns the results."""
    monkeypatch.setattr(Bench, "command", lambda self, names: [sys.executable, "-c", FAKE, json.dumps(list(names))])

    def run(*names, **how):
        found, begun = {}, []
        listener = Listener(lambda machine: None, begun.append, lambda stage: None, found.__setitem__)
        Bench(tmp_path / "logs.txt", **how).run({name: row(None) for name in names}, listener)
        return begun, found

    return run


@pytest.mark.parametrize(("name", "status", "fault"), [
    ("killed", "failed", "its process ended with exit code -9: its log is empty"),
    ("hung", "hung", "it did not finish within 184 s"),
    ("crashed", "failed", "its process ended with exit code 1: MemoryError: no"),
])  # fmt: skip
def test_a_row_that_ends_its_process_loses_no_other_row(fake, name, status, fault):
    begun, found = fake("a", name, "b", "c")
    assert begun == ["a", name, "b", "c"]
    assert [found[each]["status"] for each in begun] == ["passed", status, "passed", "passed"]
    assert found[name]["faults"] == [fault]
    assert "/home/me" not in found[name]["log"]


def test_a_row_that_the_time_ends_is_not_reached(fake, tmp_path):
    now, found = [0.0], {}

    def begin(name):
        now[0] = 30.0 if name == "a" else 50.0

    how = Bench(tmp_path / "logs.txt", end=50.0, clock=lambda: now[0])
    listener = Listener(lambda machine: None, begin, lambda stage: None, found.__setitem__)
    how.run({name: row(None) for name in ("a", "killed", "b")}, listener)
    assert found == {
        "a": PASSED,
        "killed": {"status": "not reached", "why": "the time was over before this row was finished"},
    }


def test_a_process_that_cannot_start_fails_the_first_row_and_nothing_else_runs(fake, monkeypatch):
    monkeypatch.setattr(Bench, "command", lambda self, names: [sys.executable, "-c", "import no_such_module"])
    begun, found = fake("a", "b")
    assert begun == [] and list(found) == ["a"]
    assert found["a"]["faults"] == ["its process ended with exit code 1: ModuleNotFoundError: No module named 'no_such_module'"]


def test_a_row_that_hangs_is_ended_with_a_traceback(tmp_path):
    code = (
        "import time, lares_fast.gpu_bench.__main__ as w, lares_fast.gpu_bench.rows as r, lares_fast.gpu_bench.machine as m;"
        "r.Row.limit = property(lambda self: 0.5);"
        "w.run({'a': r.Row('t', 1, lambda machine: time.sleep(60))}, m.Machine(rehearse=True), lambda **event: None, 1e12)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == 1
    assert done.stderr.startswith("== a\nTimeout (") and "in <lambda>" in done.stderr


def test_rows_really_run_in_a_process_of_their_own(tmp_path):
    report = gpu_report.Report(tmp_path / "results.json", [])
    first.speed(["ceilings", "attention:L20-instruments"], report, tmp_path, float("inf"), True)
    found = gpu_report.read(tmp_path / "results.json")
    assert {name: one["status"] for name, one in found.items()} == {
        "speed:ceilings": "passed", "speed:attention:L20-instruments": "passed",
    }  # fmt: skip


def test_importing_the_package_imports_no_row():
    code = "import sys, lares_fast, lares_fast.cli, lares_fast.train; print('lares_fast.gpu_bench' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_the_tail_of_a_log_is_short(tmp_path):
    assert len(Bench(tmp_path / "logs.txt")._lost(1, "x" * 10_000)["log"]) == bench._TAIL
