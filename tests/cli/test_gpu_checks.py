"""The checks of ``lares-fast gpu-day``, rehearsed in Triton's interpreter: they find planted bugs, and the sanitizer runs."""

import os
import sys

import pytest
import torch

from lares_fast.verify import gpu_edge_cases, gpu_large, gpu_plan, gpu_report, gpu_run
from lares_fast.verify.__main__ import CHECKS

FILES = ("_random", "_tiles", "_packed", "attention", "embedding", "initial_state", "_catalog", "_catalog_backward")
FILES += ("linear_cross_entropy", "_layers", "_recurrence_plan", "recurrence", "_recurrence_weights", "_recurrence_backward")


@pytest.mark.interpreted
def test_the_sanitizer_would_watch_every_kernel(monkeypatch):
    from tests.support import triton_interpreter

    with triton_interpreter.interpreted(monkeypatch) as memory:
        assert gpu_edge_cases.every_kernel(rehearse=True, quick=True)["status"] == "passed"
    assert memory.launches


PLANTED = {
    "a seed that is not read": (
        "graph_seeds:attention", "_tiles", "keep_attention(tl.load(SEED),", "keep_attention(0 * tl.load(SEED),",
    ),
    "a seed of the embedding that is not read": (
        "graph_seeds:embedding", "embedding", "keep_hidden_row(tl.load(SEED),", "keep_hidden_row(0 * tl.load(SEED),",
    ),
    "a seed of h0 that is not read": (
        "graph_seeds:initial_state", "initial_state", "state_normal(tl.load(SEED),", "state_normal(0 * tl.load(SEED),",
    ),
    "a tile of items that is left out": (
        "large_linear_cross_entropy", "linear_cross_entropy", "cdiv(N, run.keywords", "-1 + cdiv(N, run.keywords",
    ),
    "a sequence that is left out": ("large_attention", "attention", "* H * tiles if P", "* H * tiles - 1 if P"),
    "tiles that are left out": (
        "large_recurrence", "recurrence", "recurrence_forward, plan.tiles,", "recurrence_forward, plan.tiles // 4,",
    ),
}  # fmt: skip


@pytest.mark.interpreted
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(bug, monkeypatch, tmp_path):
    from tests.support import triton_interpreter

    step, *where = PLANTED[bug]
    triton_interpreter.plant(monkeypatch, tmp_path, FILES, *where)
    planned = gpu_plan.plan(rehearse=True, quick=False)[step]
    poisoned = torch.are_deterministic_algorithms_enabled()
    # PyTorch then fills the memory of torch.empty with NaN.
    torch.use_deterministic_algorithms(True)
    try:
        result = CHECKS[planned.check](**planned.arguments)
    finally:
        torch.use_deterministic_algorithms(poisoned)
    assert result["status"] == "failed", result


@pytest.mark.parametrize("last", [1.0, 0.0])
def test_the_catalog_step_knows_the_answers(last, monkeypatch):
    """The check passes on a backend that runs here, and fails if the last row is another one."""
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, **how: last * ones(*shape, **how))
    found = gpu_large.large_catalog("cpu", 64 * 40, backend="reference")
    # For queries of zeros all items have the same score.
    assert [fault.split(":")[0] for fault in found] == ([] if last else ["topk", "target_rank"])


def test_too_little_memory_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 2**31))
    result = gpu_large.CHECKS["large_attention"](False, False)
    assert result == {"status": "skipped", "why": "it needs 44 GiB of GPU memory, and 1 GiB are free"}
    assert gpu_large.CHECKS["large_attention"](False, True)["why"] == "--quick runs small shapes only"


SANITIZER = """#!{python}
import pathlib, sys
options = dict(zip(sys.argv[1:5:2], sys.argv[2:6:2]))
pathlib.Path("{folder}", options["--tool"]).write_text(" ".join(sys.argv[5:]))
print('{{"status": "passed"}}')
print({said!r})
sys.exit({code})
"""


def sanitizer(folder, monkeypatch, said, code):
    program = folder / "compute-sanitizer"
    program.write_text(SANITIZER.format(python=sys.executable, folder=folder, said=said, code=code))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    plan = gpu_plan.plan(rehearse=False, quick=False)
    tools = {name: step for name, step in plan.items() if name.startswith("sanitizer:")}
    report = gpu_report.Report(folder / "report.json", tools)
    gpu_run.run_steps(tools, report, gpu_run.Limits(60), rehearse=False)
    return report.found


def test_the_sanitizer_is_asked_for_each_kind_of_error(tmp_path, monkeypatch):
    found = sanitizer(tmp_path, monkeypatch, "========= ERROR SUMMARY: 0 errors", 0)
    assert {name: one["status"] for name, one in found.items()} == {
        f"sanitizer:{tool}": "passed" for tool in ("memcheck", "racecheck", "synccheck", "initcheck")
    }
    ran = (tmp_path / "memcheck").read_text()
    assert "-m lares_fast.verify every_kernel" in ran
    assert '"rehearse": false' in ran


def test_what_the_sanitizer_finds_is_told_without_paths(tmp_path, monkeypatch):
    lines = ["COMPUTE-SANITIZER", "Invalid __global__ read of size 4 bytes", "    at 0x10 in /home/me/k.py:3:f"]
    said = "\n".join(f"========= {line}" for line in [*lines, "ERROR SUMMARY: 1 error"])
    found = sanitizer(tmp_path, monkeypatch, said, 1)["sanitizer:memcheck"]
    assert found["status"] == "failed"
    assert found["log"] == "Invalid __global__ read of size 4 bytes; at 0x10 in .../k.py:3:f; ERROR SUMMARY: 1 error"


def test_without_a_sanitizer_the_step_is_skipped(monkeypatch):
    monkeypatch.setattr(gpu_plan.shutil, "which", lambda name, path: None)
    assert "compute-sanitizer is not on the PATH" in gpu_plan.plan(rehearse=False, quick=True)["sanitizer:memcheck"].skip


def test_what_needs_a_driver_is_skipped_without_one(monkeypatch):
    monkeypatch.setattr(gpu_edge_cases._native, "capability", lambda: "no device")
    assert gpu_edge_cases.graph_inputs(False, True, "topk") == {"status": "skipped", "why": "no device"}


@pytest.mark.parametrize("op", ["topk", "target_rank"])
def test_a_graph_that_does_not_follow_its_inputs_is_found(op, monkeypatch):
    """The call that replaces a replay in a rehearsal is compared with a call on other inputs."""
    assert gpu_edge_cases.graph_inputs(True, True, op)["status"] == "passed"
    real = getattr(gpu_edge_cases.ops, op)
    answers = []

    def stale(*arguments, **how):
        found = real(*arguments, **how)
        answers.append(found)
        return answers[0] if len(answers) == 1 else tuple(x + 1 for x in found) if op == "topk" else found + 1

    monkeypatch.setattr(gpu_edge_cases.ops, op, stale)
    assert gpu_edge_cases.graph_inputs(True, True, op)["faults"] == ["replay 0 with new inputs differs from a call"]
