"""``lares-fast gpu-day`` and benchmarks/gpu: which steps are chosen, how time limits apply, and which processes remain."""

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import first
from lares_fast._errors import InputError
from lares_fast.gpu_bench.rows import ROWS
from lares_fast.verify import gpu_plan, gpu_report, gpu_run, process
from lares_fast.verify.__main__ import CHECKS

ROOT = Path(__file__).parents[1]
NAMES = ["build", "machine", "correctness:topk:cuda:float32", "correctness:topk:triton", "correct", "speed:topk:B1"]


@pytest.fixture(autouse=True)
def no_signal_seen(monkeypatch):
    """Forget that another test stopped all processes."""
    process._stopped.clear()


@pytest.fixture
def report(tmp_path):
    return gpu_report.Report(tmp_path / "results.json", ["machine", "matmul", "first_kernel", "determinism", "streams"])


def written(report):
    return {name: one["status"] for name, one in json.loads(report.path.read_text()).items()}


def matmul_steps(*names, **how):
    return {name: gpu_plan.Step("matmul", {"rehearse": True, "quick": True}, **how) for name in names}


@pytest.mark.parametrize(("asked", "found"), [
    (None, NAMES),
    (["correctness"], ["correctness:topk:cuda:float32", "correctness:topk:triton"]),
    (["correctness:topk:triton", "machine"], ["machine", "correctness:topk:triton"]),
    (["speed", "correct"], ["correct", "speed:topk:B1"]),
])  # fmt: skip
def test_names_and_groups_are_chosen_in_their_order(asked, found):
    assert gpu_plan.chosen(asked, NAMES) == found


@pytest.mark.parametrize("asked", [["corr"], ["machine", "speed:topk:B"], ["correctness:topk:"], [""]])
def test_a_name_that_is_no_step_is_an_error(asked):
    with pytest.raises(
        InputError, match=f"--only {asked[-1]} is not a step: give failed REPORT, a full name, or a group .*build"
    ):
        gpu_plan.chosen(asked, NAMES)


def test_what_failed_or_was_not_reached_is_chosen_from_a_report(tmp_path):
    statuses = ("passed", "skipped", "failed", "hung", "passed", "not reached")
    place = tmp_path / "before.json"
    place.write_text(json.dumps({name: {"status": status} for name, status in zip(NAMES, statuses, strict=True)}))
    wanted = ["correctness:topk:cuda:float32", "correctness:topk:triton", "speed:topk:B1"]
    assert gpu_plan.chosen(["failed", str(place)], NAMES) == wanted
    # A name that this plan does not have, such as a row, is not chosen.
    assert gpu_plan.chosen(["failed", str(place)], NAMES[:4]) == wanted[:2]
    place.write_text(json.dumps({name: {"status": "passed"} for name in NAMES}))
    assert gpu_plan.chosen(["failed", str(place)], NAMES) == []


@pytest.mark.parametrize("text", [None, "", "[]", "{", '{"machine": 1}', '{"machine": {}}', "\0"])
def test_what_is_no_report_is_an_error(text, tmp_path):
    place = tmp_path / "before.json"
    if text is not None:
        place.write_text(text)
    with pytest.raises(InputError, match="is not a report of gpu-day"):
        gpu_plan.chosen(["failed", str(place)], NAMES)
    for asked in (["failed"], ["failed", str(place), "machine"]):
        with pytest.raises(InputError, match="needs one report"):
            gpu_plan.chosen(asked, NAMES)


@pytest.mark.parametrize("rehearse", [False, True])
@pytest.mark.parametrize("quick", [False, True])
def test_every_step_of_the_plan_can_be_called(rehearse, quick):
    known = CHECKS
    plan = gpu_plan.plan(rehearse=rehearse, quick=quick)
    for name, step in plan.items():
        inspect.signature(known[step.check]).bind(**step.arguments)
        assert step.skip or step.check in ("every_kernel", name.partition(":")[0]), name
    asked = {step.check for step in plan.values()}
    assert asked >= set(known) - {"interpret", "compile_for"}
    # The names of rows and steps must differ, because a report holds both.
    assert not any(name.startswith(first.ROW) for name in plan)


def test_every_row_of_the_first_run_is_a_row_of_gpu_bench():
    assert set(first.ROWS) <= set(ROWS)
    assert len(set(first.ROWS)) == len(first.ROWS)


def test_a_step_that_does_not_exist_fails(report, monkeypatch):
    typo = {"first_kernel": gpu_plan.Step("first_kernl", {"rehearse": True, "quick": True})}
    gpu_run.run_steps(typo, report, gpu_run.Limits(60), rehearse=True)
    assert report.found["first_kernel"]["status"] == "failed"
    assert "KeyError: 'first_kernl'" in report.found["first_kernel"]["log"]


def test_the_report_is_whole_after_every_step(report, monkeypatch):
    seen = []
    monkeypatch.setattr(
        gpu_run, "run_check", lambda *_, **__: seen.append(written(report)) or {"status": "passed", "seconds": 1}
    )
    assert set(written(report).values()) == {"not reached"}
    gpu_run.run_steps(matmul_steps("machine", "first_kernel", "determinism"), report, gpu_run.Limits(9), rehearse=True)
    assert [sum(status == "passed" for status in one.values()) for one in seen] == [0, 1, 2]
    assert written(report) == dict.fromkeys(["machine", "first_kernel", "determinism"], "passed") | dict.fromkeys(
        ["matmul", "streams"], "not reached"
    )
    assert [path.name for path in report.path.parent.iterdir()] == ["results.json"]


def test_steps_are_cut_where_the_time_ends(report, monkeypatch):
    now, limits = [0.0], []

    def step(name, *, seconds, **_):
        limits.append(seconds)
        now[0] += min(40, seconds)
        return {"status": "passed" if seconds >= 40 else "hung", "seconds": min(40, seconds)}

    monkeypatch.setattr(gpu_run, "run_check", step)
    limits_of_all = gpu_run.Limits(50, end=100, clock=lambda: now[0])
    gpu_run.run_steps(matmul_steps("matmul", "first_kernel", "determinism", "streams"), report, limits_of_all, rehearse=True)
    # The third step gets the remaining time. The fourth does not start, and there is no diagnosis.
    assert limits == [50, 50, 20]
    assert [report.found[name]["status"] for name in ("matmul", "first_kernel", "determinism", "streams")] == [
        "passed", "passed", "hung", "not reached",
    ]  # fmt: skip


def test_the_phases_end_in_time():
    assert first.phases(420) == {"build": 100, "checks": 220, "speed": 390}
    assert first.phases(205) == {"build": 100, "checks": 200, "speed": 200}
    assert first.phases(3) == {"build": 0, "checks": 0, "speed": 0}
    assert set(first.phases(1200, rehearse=True).values()) == {1195}


def alive(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def pid_of(place, seconds=20):
    """Return the process id that a process writes to ``place``."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if place.exists() and (text := place.read_text().strip()):
            return int(text)
        time.sleep(0.05)
    raise AssertionError(f"{place} was not written")


def gone(pid):
    until = time.monotonic() + 10
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.05)
    return not alive(pid)


# A process with a child that keeps its output open and would outlive it.
PARENT = "sleep 300 & echo $! > {place}; {then}"


@pytest.mark.parametrize(("then", "code"), [("wait", None), ("exit 3", 3), ("exit 0", 0)])
def test_no_child_of_a_process_is_left(then, code, tmp_path):
    place = tmp_path / "pid"
    with (tmp_path / "log").open("w") as log:
        began = time.monotonic()
        found = process.run_command(["sh", "-c", PARENT.format(place=place, then=then)], seconds=1.5, out=log, log=log)
    assert found == code
    assert time.monotonic() - began < 10
    assert gone(pid_of(place))


STOPPED = """
import sys, threading, time
from lares_fast.verify import process
with process.leaving_no_processes():
    command = ["sh", "-c", sys.argv[1]]
    other = threading.Thread(target=process.run_command, args=(command,),
                             kwargs=dict(seconds=300, out=sys.stdout, log=sys.stderr))
    other.start()
    other.join()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_no_child_is_left_by_a_signal(number, tmp_path):
    place = tmp_path / "pid"
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, PARENT.format(place=place, then="wait")], stderr=subprocess.DEVNULL
    )
    pid = pid_of(place)
    process.send_signal(number)
    assert process.wait(20) != 0
    assert gone(pid)


def test_a_log_names_no_folders_and_a_sanitizer_speaks_first():
    assert process.without_folders('File "/home/me/x/steps.py", line 3; a/b; 3/4') == 'File ".../steps.py", line 3; a/b; 3/4'
    said = ["========= COMPUTE-SANITIZER", "========= Invalid read", "=========     at 0x10", "========= 1 error", "{}"]
    assert process.sanitizer_summary(said) == "Invalid read; at 0x10; 1 error"


def test_only_switches_of_this_gpu_are_tried():
    assert "without tcgen05" not in gpu_run.options_for({"gpus": [{"major": 9}]})
    assert "without WGMMA" not in gpu_run.options_for({"gpus": [{"major": 10}]})
    assert gpu_run.options_for({}) == ["without fused multiply-add", "one launch at a time"]


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Return a function that calls ``first.main`` with fake steps and rows, and returns the exit code and the report."""
    answers = {}

    def run(plan, report, limits, **_):
        for name in plan:
            report.put(name, {"status": answers.get(name, "passed"), "seconds": 0, "log": "a log"})

    def rows(names, report, out, end, rehearse):
        for name in names:
            report.put(f"{first.ROW}{name}", {"status": answers.get(f"{first.ROW}{name}", "passed")})

    monkeypatch.setattr(gpu_run, "run_steps", run)
    monkeypatch.setattr(first, "speed", rows)

    def call(*arguments, **told):
        answers.clear()
        answers.update(told)
        code = first.main(["--rehearse", "--out", str(tmp_path), *arguments])
        return code, json.loads((tmp_path / "results.json").read_text())

    return call


def test_all_that_passes_ends_with_0(fake, tmp_path):
    code, found = fake()
    assert code == 0
    rows = [f"{first.ROW}{name}" for name in first.ROWS]
    assert {"build", "machine", *rows, *gpu_plan.plan(rehearse=True, quick=True)} == set(found)
    text = (tmp_path / "table.txt").read_text()
    assert "\ncommit: " in text and "| first_kernel | passed |" in text and "[spt_step:bf16: passed]" in text


@pytest.mark.parametrize("name", ["first_kernel", "correctness:attention:triton:float32", "speed:spt_step:bf16", "machine"])
@pytest.mark.parametrize("status", ["failed", "hung", "not reached"])
def test_any_failure_ends_with_1(fake, name, status):
    code, found = fake(**{name: status})
    assert code == 1
    assert found[name]["status"] == status


def test_a_package_without_its_native_module_ends_with_1(fake, monkeypatch):
    from lares_fast import _native

    monkeypatch.setattr(_native, "available", lambda: (False, "it is not built"))
    code, found = fake()
    assert code == 1
    assert found["build"] == {"status": "failed", "seconds": 0, "log": "it is not built"}
    assert found["graph_inputs:topk"]["status"] == "not reached"
    assert found["first_kernel"]["status"] == found["speed:spt_step:bf16"]["status"] == "passed"


def test_a_second_call_does_what_the_first_did_not(fake, tmp_path):
    fake(**{"first_kernel": "hung", "speed:spt_step:bf16": "not reached"})
    before = tmp_path / "before.json"
    before.write_bytes((tmp_path / "results.json").read_bytes())
    first_call = json.loads(before.read_text())
    first_call["streams"]["seconds"] = 77
    before.write_text(json.dumps(first_call))
    code, found = fake("--only", "failed", str(before))
    assert code == 0
    assert found["first_kernel"]["status"] == found["speed:spt_step:bf16"]["status"] == "passed"
    # Earlier results stay in the report.
    assert found["streams"]["seconds"] == 77


@pytest.mark.parametrize("what", [("--only", "nonsense"), ("--total", "0"), ("--jobs", "-1")])
def test_arguments_that_mean_nothing_are_errors(what, tmp_path):
    with pytest.raises(SystemExit) as error:
        first.main(["--rehearse", "--out", str(tmp_path), *what])
    assert error.value.code not in (0, None)


def test_a_build_that_fails_is_told_and_ends_with_1(tmp_path):
    """CMake really configures the build, with a broken nvcc."""
    for package in ("cmake", "ninja", "pybind11"):
        pytest.importorskip(package, reason=f"pip install {package}: the build needs it")
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'this toolkit is damaged' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    environ = {**os.environ, "CUDACXX": str(nvcc), "TMPDIR": str(tmp_path), "LARES_FAST_CUDA_ARCHS": "90"}
    command = [sys.executable, ROOT / "benchmarks/gpu/first.py", "--out", tmp_path / "out", "--only", "build", "--total", "120"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert done.returncode == 1, done.stderr
    assert found["build"]["status"] == "failed"
    assert "this toolkit is damaged" in (tmp_path / "out/build.log").read_text()


def test_a_build_that_hangs_is_ended(tmp_path, monkeypatch):
    place = tmp_path / "pid"
    monkeypatch.setattr(first, "build_commands", lambda: [["sh", "-c", PARENT.format(place=place, then="wait")]])
    assert first.build(tmp_path, 1.0, tmp_path / "build.log")["status"] == "hung"
    assert gone(pid_of(place))


def test_no_step_checks_again_what_another_does():
    """Time on a GPU is short. A training step also checks the kernels that its forward alone would launch."""
    cases = [
        {**step.arguments["variant"], **{name: step.arguments[name] for name in ("op", "backend", "dtype")}}
        for step in gpu_plan.plan(rehearse=False, quick=False).values()
        if step.check == "correctness"
    ]
    assert any(not case.get("train", True) for case in cases), "no step without gradients is left, so nothing was compared"
    for case in cases:
        assert case.get("train", True) or {**case, "train": True} not in cases
