"""``lares-fast report``, ``warmup`` and ``gpu-day`` on a machine without a GPU."""

import json
import threading
import time

import pytest
import torch

from lares_fast.cli import main
from lares_fast.ops import _triton
from lares_fast.verify import cases, gpu_plan, gpu_report, gpu_run, process, self_test

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def rows_of(capsys, *arguments):
    code = main(["report", "--json", *arguments])
    return code, json.loads(capsys.readouterr().out)


@needs_no_gpu
def test_report(capsys):
    code, rows = rows_of(capsys)
    assert code == 0
    assert {row["op"] for row in rows} == set(cases.ops())
    for row in rows:
        if row["backend"] == "reference":
            assert row["verdict"].startswith("pass")
        if row["device"] == "none":
            assert "not run on a GPU" in row["verdict"]
        if row["verdict"] == "pass":
            assert row["error"] <= row["bound"]


def test_report_tells_a_wrong_result(capsys, monkeypatch):
    right = cases.Case.results

    def wrong(self, *rest):
        results = right(self, *rest)
        return cases.Results({name: x * 1.01 for name, x in results.forward.items()}, results.exact, results.gradients)

    monkeypatch.setattr(cases.Case, "results", wrong)
    code, rows = rows_of(capsys, "--op", "attention", "--dtype", "float32")
    assert code == 1
    assert rows[0]["verdict"].startswith("fail: out: error")


@pytest.mark.compiled
@needs_no_gpu
def test_report_proves_what_can_be_proven(capsys):
    _, rows = rows_of(capsys, "--op", "linear_cross_entropy", "--dtype", "bfloat16", "--prove")
    (row,) = [row for row in rows if row["backend"] == "triton"]
    assert row["verdict"] == "interpreted: pass; compiled for sm_80, sm_86, sm_90, sm_100, sm_120; not run on a GPU"


@needs_no_gpu
def test_a_proof_that_fails_is_no_pass(capsys, monkeypatch):
    from lares_fast.cli import report

    answers = {"interpret": {"status": "passed", "found": {"attention float32": ["out: error 1"]}},
               "compile_for": {"status": "failed", "log": "Traceback\nPTXASError: no"}}  # fmt: skip
    monkeypatch.setattr(report, "run_check", lambda name, **_: answers[name])
    code, rows = rows_of(capsys, "--op", "attention", "--dtype", "float32", "--prove")
    assert code == 1
    assert rows[-1]["verdict"] == "interpreted: fail (out: error 1); compiled: fail (PTXASError: no); not run on a GPU"


@needs_no_gpu
@pytest.mark.parametrize(("command", "remedy"), [
    ("warmup", "give --for SM"), ("gpu-day", "give --rehearse"), ("tune", "run it on the machine that has the GPU"),
])  # fmt: skip
def test_without_a_gpu_the_remedy_is_named(command, remedy, capsys):
    assert main([command]) == 2
    assert remedy in capsys.readouterr().err


@pytest.mark.compiled
def test_warmup_for_a_gpu_that_is_elsewhere(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert main(["warmup", "--for", "80", "--op", "linear_cross_entropy", "--dtype", "bfloat16"]) == 0
    assert "linear_cross_entropy bfloat16 sm_80: " in capsys.readouterr().out
    assert {path.stem for path in tmp_path.rglob("*.cubin")} >= {"softmax_forward", "softmax_backward_items"}


def test_warmup_tries_every_shipped_variant(capsys, monkeypatch):
    from lares_fast.cli import warmup

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(_triton, "obstacle", lambda tensor: None)
    asked = []
    monkeypatch.setattr(
        self_test, "refusal", lambda op, *_, **variant: asked.append(op) or ("it is wrong" if len(asked) == 2 else None)
    )
    arguments = warmup.Namespace(op=["attention"], dtype=["float32"], architectures=None)
    assert warmup.command(arguments) == 1
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(asked) == len(cases.shipped("attention"))
    assert ": it is wrong" in said[1]


def test_a_step_that_ends_badly_is_told():
    result = process.run_check("interpret", seconds=60, ops=["nothing"], dtypes=["float32"])
    assert result["status"] == "failed"
    assert "KeyError" in result["log"]
    assert process.run_check("matmul", seconds=0.05, rehearse=True, quick=True)["status"] == "hung"


def test_a_gpu_that_the_sanitizer_refuses_is_no_failure(tmp_path):
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text("#!/bin/sh\necho '========= COMPUTE-SANITIZER'\necho \"========= Error: $SAID\"\nexit 1\n")
    sanitizer.chmod(0o755)
    how = {"seconds": 60, "under": [str(sanitizer)]}
    result = process.run_check("every_kernel", environ={"SAID": "Device not supported"}, **how)
    assert (result["status"], result["why"]) == ("skipped", "compute-sanitizer does not support the GPU of this machine")
    assert process.run_check("every_kernel", environ={"SAID": "Invalid read"}, **how)["status"] == "failed"


def planned(*names):
    plan = gpu_plan.plan(rehearse=False, quick=True)
    return {name: plan[name] for name in names}


@pytest.fixture
def day(tmp_path):
    """Return a function ``day(*names)`` that runs these steps and returns the report."""

    def run(*names, **how):
        report = gpu_report.Report(tmp_path / "report.json", names)
        gpu_run.run_steps(planned(*names), report, gpu_run.Limits(9, **how), rehearse=False)
        assert json.loads(report.path.read_text()) == report.found
        return report.found

    return run


WRONG = "correctness:attention:triton:float32"


@pytest.mark.parametrize("jobs", [1, 3])
def test_steps_go_on_after_a_failure_and_its_cure_is_the_diagnosis(day, monkeypatch, jobs):
    asked = []

    def answer(name, *, environ, **arguments):
        asked.append((name, *(switch for switch in ("DISABLE_MMA_V3", "DISABLE_MMA_V5") if switch in environ)))
        bad = arguments.get("op") == "attention" and not environ.get("DISABLE_MMA_V3")
        facts = {"gpus": [{"major": 9}]} if name == "machine" else {"faults": ["out is off"]} if bad else {}
        return {"status": "failed" if bad else "passed", "seconds": 1, **facts}

    monkeypatch.setattr(gpu_run, "run_check", answer)
    found = day("machine", WRONG, "boundaries", jobs=jobs)
    assert found["boundaries"]["status"] == "passed"
    assert ("correctness", "DISABLE_MMA_V3") in asked
    # This option concerns Blackwell only.
    assert not any("DISABLE_MMA_V5" in one for one in asked)
    assert f"| {WRONG} | failed | 1 | out is off (passes without WGMMA) |" in gpu_report.table(found)


@pytest.mark.parametrize("broken", ["machine", "matmul"])
def test_nothing_is_asked_of_a_broken_machine(day, monkeypatch, broken):
    def answer(name, **_):
        return {"status": "failed" if name == broken else "passed", "seconds": 1, "log": "no driver"}

    monkeypatch.setattr(gpu_run, "run_check", answer)
    found = day("machine", "matmul", "first_kernel")
    assert found[broken]["status"] == "failed"
    assert found["first_kernel"] == {"status": "not reached"}


def test_steps_run_as_many_at_a_time_as_asked_but_those_of_a_lane_in_turn(day, monkeypatch):
    lock, running, most = threading.Lock(), [], {"any": 0, "large": 0}

    def answer(name, **_):
        with lock:
            running.append(name)
            most["any"] = max(most["any"], len(running))
            most["large"] = max(most["large"], sum(one.startswith("large") for one in running))
        time.sleep(0.05)
        with lock:
            running.remove(name)
        return {"status": "passed", "seconds": 0}

    monkeypatch.setattr(gpu_run, "run_check", answer)
    found = day("first_kernel", "streams", "fork", "boundaries", "large_attention", "large_recurrence", "large_catalog", jobs=3)
    assert most == {"any": 3, "large": 1}
    assert {one["status"] for one in found.values()} == {"passed"}


def test_a_day_ends_with_1_unless_all_passed(tmp_path, monkeypatch, capsys):
    status = "failed"
    monkeypatch.setattr(
        gpu_run, "run_check", lambda name, **_: {"status": status if name == "first_kernel" else "passed", "seconds": 0}
    )
    arguments = ["gpu-day", "--rehearse", "--out", str(tmp_path), "--only", "first_kernel"]
    assert main(arguments) == 1
    (file,) = tmp_path.iterdir()
    # Every report describes the machine.
    assert {name: one["status"] for name, one in json.loads(file.read_text()).items()} == {
        "machine": "passed",
        "first_kernel": "failed",
    }
    file.rename(tmp_path / "before.json")
    status = "passed"
    assert main([*arguments[:-1], "failed", str(tmp_path / "before.json")]) == 0
    assert "| first_kernel | passed |" in capsys.readouterr().out
    for wrong in (["--only", "first_kernl"], ["--jobs", "0"], ["--total", "-1"]):
        assert main([*arguments[:4], *wrong]) == 2
        assert capsys.readouterr().err.startswith(f"lares-fast: error: {wrong[0]}")
    assert main([*arguments[:4], "--only", "failed", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("lares-fast: error: nowhere is not a report of gpu-day")


@pytest.mark.interpreted
def test_a_rehearsal(tmp_path, capsys):
    names = ("machine", "matmul", "first_kernel", "boundaries", "graphs", "correctness:linear_cross_entropy")
    arguments = ["--jobs", "2", "--total", "600", "--only", *names]
    assert main(["gpu-day", "--rehearse", "--quick", "--out", str(tmp_path), *arguments]) == 0
    (file,) = tmp_path.iterdir()
    found = json.loads(file.read_text())
    assert [found[name]["status"] for name in names[:5]] == ["passed"] * 4 + ["skipped"]
    right = found["correctness:linear_cross_entropy:triton:float32"]
    assert right["first_call_s"] > 0
    assert {"logprob", "d items"} <= set(right["tensors"])
    for one in right["tensors"].values():
        assert 0 < one["error"] <= one["bound"]
    assert "| graphs | skipped |" in capsys.readouterr().out


@pytest.mark.interpreted
def test_a_rehearsal_finds_a_wrong_kernel(monkeypatch, tmp_path):
    from lares_fast.verify import gpu_checks
    from tests.support import triton_interpreter

    bug = ("attention", "weight = p * factor", "weight = p")
    triton_interpreter.plant(monkeypatch, tmp_path, ("_random", "_tiles", "attention"), *bug)
    result = gpu_checks.correctness(True, True, "attention", "triton", "float32", {})
    assert result["status"] == "failed"
    assert any("self-test" in fault for fault in result["faults"]) and any(": error " in fault for fault in result["faults"])


@needs_no_gpu
@pytest.mark.parametrize(("build", "line"), [
    ({"native": True, "reason": "", "cuda_built": False, "cuda_reason": "no GPU was seen (nvidia-smi -L)"},
     "CUDA code    not built: no GPU was seen (nvidia-smi -L)"),
    ({"native": True, "reason": "", "cuda_built": True, "cuda_reason": "built by nvcc 13.0.88", "cuda_archs": ["90-real"]},
     "CUDA code    built by nvcc 13.0.88 for 90-real; no device"),
    ({"native": False, "reason": "it was not built", "cuda_built": False, "cuda_reason": "there is no native module"},
     "native       it was not built"),
])  # fmt: skip
def test_doctor_tells_what_was_built_and_why(build, line, monkeypatch, capsys):
    from lares_fast import _native

    monkeypatch.setattr(_native, "build_info", lambda: build)
    monkeypatch.setattr(_native, "capability", lambda: "no device")
    assert main(["doctor"]) == 0
    assert line in capsys.readouterr().out.splitlines()


def test_doctor_shows_every_op_and_only_extras_that_something_imports(capsys):
    import re
    import tomllib
    from pathlib import Path

    from lares_fast import _dispatch
    from lares_fast.cli import doctor

    assert main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    shown = {name.partition(",")[0] for name in told["ops"] if name.endswith("on cpu")}
    # The other entries of the table are parts of these ops.
    assert shown == set(cases.ops()) <= set(_dispatch._TABLE)
    root = Path(__file__).parents[2]
    declared = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    # Users of the package do not need the extras `dev` and `docs`.
    assert set(doctor._EXTRAS) == set(declared) - {"dev", "docs"}
    folders = ("lares_fast", "kernels", "benchmarks")
    sources = "".join(path.read_text() for folder in folders for path in (root / folder).rglob("*.py"))
    for extra, modules in doctor._EXTRAS.items():
        for module in modules:
            # pytest finds this plugin by itself.
            if module != "pytest_benchmark":
                assert re.search(rf"(import |from |\(\"|\.){module}\b", sources), f"nothing imports {module} of [{extra}]"
