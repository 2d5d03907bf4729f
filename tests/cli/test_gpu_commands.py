"""``lares-fast report``, ``warmup`` and ``gpu-day`` on a machine without a GPU."""

import json

import pytest
import torch

from lares_fast.cli import gpu_day, main, steps
from lares_fast.ops import _canary, _trials, _triton

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def rows_of(capsys, *arguments):
    code = main(["report", "--json", *arguments])
    return code, json.loads(capsys.readouterr().out)


@needs_no_gpu
def test_report(capsys):
    code, rows = rows_of(capsys)
    assert code == 0
    assert {row["op"] for row in rows} == set(_trials.ops())
    for row in rows:
        if row["backend"] == "reference":
            assert row["verdict"].startswith("pass")
        if row["device"] == "none":
            assert "not run on a GPU" in row["verdict"]
        if row["verdict"] == "pass":
            assert row["error"] <= row["bound"]


def test_report_tells_a_wrong_result(capsys, monkeypatch):
    right = _trials.Trial.results

    def wrong(self, *rest):
        results = right(self, *rest)
        return _trials.Results({name: x * 1.01 for name, x in results.forward.items()}, results.exact, results.gradients)

    monkeypatch.setattr(_trials.Trial, "results", wrong)
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
    monkeypatch.setattr(report, "run_step", lambda name, **_: answers[name])
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
        _canary, "refusal", lambda op, *_, **variant: asked.append(op) or ("it is wrong" if len(asked) == 2 else None)
    )
    arguments = warmup.Namespace(op=["attention"], dtype=["float32"], architectures=None)
    assert warmup.command(arguments) == 1
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(asked) == len(_trials.shipped("attention"))
    assert ": it is wrong" in said[1]


def test_a_step_that_ends_badly_is_told():
    result = steps.run_step("interpret", seconds=60, ops=["nothing"], dtypes=["float32"])
    assert result["status"] == "failed"
    assert "KeyError" in result["log"]
    assert steps.run_step("alone", seconds=0.05, rehearse=True, quick=True)["status"] == "hung"


def test_steps_go_on_after_a_failure_and_its_cure_is_the_diagnosis(monkeypatch):
    asked = []

    def answer(name, *, environ, **_):
        asked.append((name, environ.get("DISABLE_MMA_V3")))
        bad = name == "canaries" and not environ.get("DISABLE_MMA_V3")
        return {"status": "failed" if bad else "passed", "seconds": 1, **({"faults": ["attention is off"]} if bad else {})}

    monkeypatch.setattr(gpu_day, "run_step", answer)
    found = gpu_day.run(["record", "canaries", "boundaries"], rehearse=False, quick=False, seconds=1)
    assert found["boundaries"]["status"] == "passed"
    assert ("canaries", "1") in asked
    assert "| canaries | failed | 1 | attention is off (passes without WGMMA) |" in gpu_day.table(found)


def test_nothing_is_asked_of_a_broken_machine(monkeypatch):
    monkeypatch.setattr(gpu_day, "run_step", lambda *_, **__: {"status": "failed", "seconds": 1, "log": "no driver"})
    assert list(gpu_day.run(["record", "alone", "hello"], rehearse=False, quick=True, seconds=1)) == ["record"]


@pytest.mark.interpreted
def test_a_rehearsal(tmp_path, capsys):
    asked = [part for name in ("record", "alone", "hello", "repeat", "boundaries", "graphs") for part in ("--step", name)]
    assert main(["gpu-day", "--rehearse", "--quick", "--out", str(tmp_path), *asked]) == 0
    (file,) = tmp_path.iterdir()
    found = json.loads(file.read_text())
    assert [found[name]["status"] for name in found] == ["passed"] * 5 + ["skipped"]
    assert "| graphs | skipped |" in capsys.readouterr().out


@pytest.mark.interpreted
def test_a_rehearsal_finds_a_wrong_kernel(monkeypatch, tmp_path):
    import triton_interpreter

    from lares_fast.cli import gpu_steps

    bug = ("attention", "weight = p * factor", "weight = p")
    triton_interpreter.plant(monkeypatch, tmp_path, ("_random", "_tiles", "attention"), *bug)
    # The other ops' canaries are passed by the kernels in tests/triton/test_canary.py.
    monkeypatch.setattr(gpu_steps, "ops_with_triton", lambda: ["attention"])
    result = gpu_steps.canaries(rehearse=True, quick=True)
    assert result["status"] == "failed"
    assert result["faults"]
