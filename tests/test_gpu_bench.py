"""``lares-fast gpu-bench``: how rows are chosen, checked, timed, stored, resumed and shown."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.gpu import first
from lares_fast._errors import InputError
from lares_fast.data import leave_one_out
from lares_fast.gpu_bench import __main__ as worker
from lares_fast.gpu_bench import bench, candidates, cases, model_rows, official, rows, run_rows, step_rows, table
from lares_fast.gpu_bench.bench import Bench, Listener
from lares_fast.gpu_bench.machine import Machine, describe
from lares_fast.gpu_bench.official_step import depths_of
from lares_fast.gpu_bench.our_step import log_of
from lares_fast.gpu_bench.results import Results
from lares_fast.verify import gpu_report, process

MACHINE = {"card": "a card", "driver": "1", "torch": "2", "triton": "3", "python": "4", "lares_fast": "5"}
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
    assert rows.chosen(["rpt_step", "ceilings"], names) == ["ceilings", "rpt_step:bf16", "rpt_step:fp32"]
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
    config = step_rows.LARESConfig(n_items=log.n_items, **case.model(dropout=False))
    models = [step_rows.reference.LARES(config) for _ in range(2)]
    phase = step_rows._phase(case, *models, log)
    index, key = case.choice(phase)
    assert sorted(depths_of(phase.batch(index, key))) == sorted(case.depths)


def test_all_ways_to_make_a_step_of_phase_2_agree_with_the_reference(machine):
    result = rows.ROWS["rpt_step:fp32"].run(machine)
    assert result["status"] == "passed"
    ours = ["lares_fast, batch ready", "lares_fast, with its batch"]
    assert list(result["turns_ms"]) == ["official way", "official way, without dead work", *ours]


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


# The results in the folder.


def test_results_are_whole_after_every_row(tmp_path):
    results = Results(tmp_path)
    results.claim(MACHINE)
    results.put("evaluation", {"status": "failed", "faults": ["wrong"]})
    results.put("ceilings", PASSED)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "table.txt"]
    again = Results(tmp_path)
    # Rows have the order of the list.
    assert list(again.rows) == ["ceilings", "evaluation"] and again.machine == MACHINE
    assert "fault: wrong" in (tmp_path / "table.txt").read_text()
    assert again.missing(["ceilings", "evaluation", "run:synthetic"]) == ["evaluation", "run:synthetic"]


@pytest.mark.parametrize("status", ["begun", "failed", "hung", "not reached"])
def test_a_row_that_was_not_finished_is_measured_again(status, tmp_path):
    results = Results(tmp_path)
    results.put("ceilings", {"status": status})
    assert Results(tmp_path).missing(["ceilings"]) == ["ceilings"]


def test_another_log_is_measured_again(tmp_path):
    results = Results(tmp_path)
    results.put("run:log", {**PASSED, "facts": {"log": "a.csv"}})
    assert results.missing(["run:log"], tmp_path / "a.csv") == []
    assert results.missing(["run:log"], tmp_path / "b.csv") == ["run:log"]


@pytest.mark.parametrize("name", MACHINE)
def test_results_of_another_machine_are_an_error(name, tmp_path):
    Results(tmp_path).claim(MACHINE)
    Results(tmp_path).claim(MACHINE)
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(InputError, match=f"another {name} .*, now other.*: choose another --out, or move it away"):
        Results(tmp_path).claim({**MACHINE, name: "other"})
    assert (tmp_path / "results.json").read_bytes() == before


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "\0", "[" * 100_000, '{"format": "lares_fast gpu-bench 0"}'])
def test_what_is_no_file_of_results_is_an_error_and_stays_as_it_is(text, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"results.json (is damaged|was not written by this version).*choose another --out"):
        Results(tmp_path)
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("old", "new"), [("2.5", "2.6"), ("a card", "b card"), ("passed", "failed"), (": [", ": "), ("\n}", "")]
)
def test_a_damaged_file_is_an_error(old, new, tmp_path):
    results = Results(tmp_path)
    results.claim(MACHINE)
    results.put("ceilings", {**PASSED, "turns_ms": {"lares_fast": [2.5, float("nan")]}})
    assert Results(tmp_path).rows.keys() == {"ceilings"}
    text = results.path.read_text()
    assert old in text
    results.path.write_text(text.replace(old, new))
    with pytest.raises(InputError, match=r"results.json is damaged .*: move it away, or choose another --out"):
        Results(tmp_path)


def test_the_description_of_the_machine_names_all_that_results_depend_on():
    found = describe(rehearse=True)
    assert set(found) == set(MACHINE)
    assert found["lares_fast"].startswith("0.") and len(found["lares_fast"].partition("sources ")[2]) == 10


# The table.


FAKE_ROWS = {
    "ceilings": {**PASSED, "rates": {"bytes": 1e12, "bf16": 1e14}, "facts": {"copy TB/s": 1.0}},
    "a": {
        **PASSED,
        "title": "A row",
        "seconds": 2.5,
        "turns_ms": {
            "slow": [8.0, 9.0, 10.0],
            "fast": [4.0, 4.4, 6.0],
            "rounded (not exact)": [1.0, 1.0, 1.0],
            "lares_fast": [2.0, 2.0, 2.4],
            "lares_fast, CUDA graph": [1.0, 2.0, 1.5],
        },
        "work": {"bytes": 1e9, "bf16": 5e10},
        "rows": 300,
        "left_out": {"other": "no memory"},
    },
}


def test_the_numbers_of_the_table_follow_from_the_times():
    lines = table.text_of({"card": "a card"}, FAKE_ROWS).splitlines()
    assert lines[0] == "card: a card"
    start = lines.index("A row  [a: passed, 2.5 s]")
    cells = {line.split("  ")[1]: line.split() for line in lines[start + 2 : start + 7]}
    # The best rival is "fast". Ratios are those of the same turn: 4 / 2, 4.4 / 2 and 6 / 2.4.
    assert cells["lares_fast"][1:] == ["2", "2..2.4", "2.20", "(2.00..2.50)", "1", "50.0%"]
    assert cells["lares_fast, CUDA graph"][3:] == ["1.5", "1..2", "4.00", "(2.20..4.00)", "1", "66.7%"]
    assert cells["slow"][1:] == ["9", "8..10", "0.50", "(0.49..0.60)", "1", "11.1%"]
    assert cells["fast"][1:] == ["4.4", "4..6", "1.00", "(1.00..1.00)", "1", "22.7%"]
    assert cells["rounded (not exact)"][3:] == ["1", "1..1", "1", "100.0%"]
    assert lines[start + 7] == ("  lares_fast, CUDA graph, times as fast as: slow 6.67 (4.50..8.00), fast 4.00 (2.20..4.00)")
    assert lines[start + 8].startswith("  rows a second: slow 33,333, fast 68,182,")
    assert lines[start + 9] == "  left out: other: no memory"


def test_without_ceilings_no_floor_is_shown():
    assert table.floor_ms({"bytes": 1e9}, {}) is None
    assert table.floor_ms({"bytes": 1e9, "fp32": 1.0}, {"bytes": 1e12}) is None
    assert table.floor_ms({}, {"bytes": 1e12}) is None
    text = table.text_of({}, {"a": FAKE_ROWS["a"]})
    assert "%" not in text.split("A row")[1]


def test_a_row_without_rivals_or_without_ours_has_no_ratio():
    text = table.text_of({}, {"a": {**PASSED, "turns_ms": {"lares_fast": [1.0]}}})
    assert "times as fast as: no rival" in text
    text = table.text_of({}, {"a": {"status": "failed", "turns_ms": {"rival": [1.0]}, "faults": ["lares_fast: wrong"]}})
    assert "lares_fast, times" not in text and "fault: lares_fast: wrong" in text


def test_importing_the_package_imports_no_row():
    code = "import sys, lares_fast, lares_fast.cli, lares_fast.train; print('lares_fast.gpu_bench' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_the_tail_of_a_log_is_short(tmp_path):
    assert len(Bench(tmp_path / "logs.txt")._lost(1, "x" * 10_000)["log"]) == bench._TAIL
