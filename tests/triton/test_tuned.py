"""``lares-fast tune``: which settings it tries, what it stores and when that is used. A table replaces a GPU's clock."""

import json

import pytest
import torch
from lares_fast.kernels import _launch

from lares_fast import _files, explain, ops
from lares_fast.cli import doctor, main
from lares_fast.config import LARESConfig
from lares_fast.ops import _triton
from lares_fast.verify import cases, comparison, launch_search, self_test, tuning

CPU = torch.device("cpu")
SIZES = {"width": 32, "longest": 50}
KEY = "attention float32 longest=50 width=32"
FOUND = {"rows": 16, "kernels": {"attention_forward": [4, 2]}}


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Treat the CPU as a GPU; return the folder of stored settings."""
    monkeypatch.setenv("LARES_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_is_gpu", lambda device: True)
    monkeypatch.setattr(tuning, "capability", lambda device: 80)
    monkeypatch.setattr(self_test, "identity", lambda device: {"gpu": "none"})
    monkeypatch.setattr(tuning, "_known", {})
    return tmp_path / "launch_settings"


def found(sizes=SIZES, dtype=torch.float32, op="attention"):
    return tuning.find(op, torch.empty(0, dtype=dtype), sizes)


def test_what_is_found_is_used_for_its_call_alone(gpu):
    assert found() is None
    tuning.store(CPU, {KEY: FOUND})
    assert found() == _launch.Choice(16, {"attention_forward": (4, 2)})
    assert found({"width": 32, "longest": 51}) is None
    assert found(dtype=torch.bfloat16) is None
    # The settings of another call are stored beside it.
    tuning.store(CPU, {"recurrence float32 width=64": FOUND})
    assert found() is not None
    (file,) = gpu.iterdir()
    assert json.loads(file.read_text())["gpu"] == "none"


@pytest.mark.parametrize("stored", [
    {"rows": 48, "kernels": {}}, {"rows": 16, "kernels": {"attention_forward": [3, 1]}}, {"rows": "16", "kernels": {}},
    {"rows": 16, "kernels": {"attention_forward": [4, 9]}}, {"rows": 16, "kernels": {"softmax_forward": [4, 1]}},
    {"rows": 16, "kernels": {"attention_forward": 4}}, {"rows": 16, "kernels": {"attention_forward": [[4], 1]}},
    {"rows": 16}, {"rows": [16], "kernels": {}}, [16], "16",
    # These equal allowed numbers, but are no integers.
    {"rows": 16.0, "kernels": {}}, {"rows": 16, "kernels": {"attention_forward": [True, True]}},
    {"rows": 16, "kernels": {"attention_forward": [4.0, 2]}},
], ids=str)  # fmt: skip
def test_what_may_not_be_tried_is_not_used(stored, gpu):
    tuning.store(CPU, {KEY: stored})
    assert found() is None


def test_a_tile_of_the_recurrence_holds_its_longest_sequence(gpu):
    sizes = {"width": 64, "heads": 2, "inner": 256, "longest": 65}
    tuning.store(CPU, {tuning.call_key("recurrence", torch.bfloat16, sizes): {"rows": 64, "kernels": {}}})
    assert found(sizes, torch.bfloat16, "recurrence") is None
    assert tuning.rows("recurrence", sizes) == (128,)


def test_blackwell_keeps_to_two_warps_in_half_precision():
    assert max(warps for warps, _ in tuning.launches(torch.bfloat16, 100)) == 2
    assert max(warps for warps, _ in tuning.launches(torch.float32, 100)) == 8
    assert max(warps for warps, _ in tuning.launches(torch.bfloat16, 120)) == 8


@pytest.mark.parametrize("damage", [
    lambda file: file.write_text("{"), lambda file: file.write_text("[]"), lambda file: file.unlink(),
    lambda file: file.write_text(file.read_text().replace('"none"', '"another"')),
])  # fmt: skip
def test_a_damaged_file_is_none(damage, gpu):
    tuning.store(CPU, {KEY: FOUND})
    damage(next(gpu.iterdir()))
    assert found() is None


def test_odd_names_of_calls_are_left_out(gpu):
    tuning.store(CPU, {"": FOUND, " ": FOUND, "attention\x1b[2J": FOUND, "unknown float32": FOUND, KEY: FOUND})
    assert list(tuning.of_device(CPU)) == [KEY]
    assert tuning.note("attention", torch.empty(0)).endswith("for float32 longest=50 width=32")


def test_another_driver_has_another_file(gpu, monkeypatch):
    tuning.store(CPU, {KEY: FOUND})
    monkeypatch.setattr(self_test, "identity", lambda device: {"gpu": "none", "driver": "newer"})
    tuning._known.clear()
    assert found() is None


def test_a_write_is_whole_or_not_at_all(gpu, monkeypatch):
    tuning.store(CPU, {KEY: FOUND})
    monkeypatch.setattr(_files.os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tuning.store(CPU, {KEY: {"rows": 32, "kernels": {}}})
    tuning._known.clear()
    assert found().rows == 16 and len(list(gpu.iterdir())) == 1


class Recorder:
    """Replaces a jitted kernel."""

    def __init__(self):
        self.launches, self.fn = [], self.attention_forward

    def attention_forward(self):
        pass

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launches.append((options["num_warps"], options["num_stages"]))


def test_a_choice_goes_before_what_is_shipped(monkeypatch):
    monkeypatch.setattr(_launch, "_ran", {})
    kernel, x = Recorder(), torch.zeros(4)
    _launch.launch(kernel, 1, x, warps=2)
    _launch.launch(kernel, 1, x, warps=2, choice=_launch.Choice(None, {"attention_forward": (4, 2)}))
    _launch.launch(kernel, 1, x, warps=2, choice=_launch.Choice(16, {"attention_backward_query": (8, 3)}))
    assert kernel.launches == [(2, 1), (4, 2), (2, 1)]
    # Other settings need another kernel to be loaded, which a graph capture forbids.
    monkeypatch.setattr(_launch, "_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="was not run before the graph capture"):
        _launch.launch(kernel, 1, x, warps=2, choice=_launch.Choice(None, {"attention_forward": (8, 1)}))


@pytest.fixture
def calls(monkeypatch):
    """Run the reference in place of the kernels, and pass their settings to the clock."""
    right = cases.Case.results
    monkeypatch.setattr(cases.Case, "results", lambda self, backend, *rest: right(self, "reference", *rest))
    monkeypatch.setattr(tuning, "capability", lambda device: 80)


def search(monkeypatch, clock):
    measured = []

    def milliseconds(call):
        choice = tuning.find("attention", torch.empty(0), SIZES)
        measured.append(choice)
        return clock(choice.rows, choice.kernels)

    monkeypatch.setattr(launch_search, "milliseconds", milliseconds)
    case = cases.case("attention", integers=False)
    return launch_search.search("attention", torch.float32, CPU, SIZES, case, lambda: None, print), measured


def test_the_fastest_is_found(calls, monkeypatch):
    def clock(rows, kernels):
        total = {None: 10.0, 16: 12.0, 32: 10.0, 64: 8.0}[rows]
        total += {(4, 1): 0.0, (8, 3): -2.0}.get(kernels.get("attention_forward", (4, 1)), 1.0)
        # The gain is too small to be stored.
        return total - 0.1 * (kernels.get("attention_backward_query") == (2, 2))

    (best, before, after), measured = search(monkeypatch, clock)
    assert best == {"rows": 64, "kernels": {"attention_forward": (8, 3)}}
    assert (before, after) == (10.0, 6.0)
    assert len(measured) == 1 + 3 + 3 * 12


def test_a_candidate_beyond_the_tolerances_is_never_measured(calls, monkeypatch):
    right = cases.Case.results

    def results(self, backend, dtype, device):
        found = right(self, backend, dtype, device)
        rows = tuning._forced[1].rows
        if rows == 16:
            raise OSError("no space")
        factor = 1.001 if rows == 64 else 1
        return cases.Results({name: x * factor for name, x in found.forward.items()}, found.exact, found.gradients)

    monkeypatch.setattr(cases.Case, "results", results)
    (best, *_), measured = search(monkeypatch, lambda rows, kernels: {None: 10.0, 32: 9.0}.get(rows, 1.0))
    assert best == {"rows": 32, "kernels": {}}
    assert not {16, 64} & {choice.rows for choice in measured}


def test_two_answers_are_never_measured(calls, monkeypatch):
    right, noise = cases.Case.results, iter(range(10**6))

    def results(self, backend, dtype, device):
        found = right(self, backend, dtype, device)
        if tuning._forced[1].rows == 64:
            found.forward["out"].view(-1)[0] += 1e-7 * next(noise)
        return found

    monkeypatch.setattr(cases.Case, "results", results)
    (best, *_), _ = search(monkeypatch, lambda rows, kernels: 1.0 if rows == 64 else 10.0)
    assert best == {}


def test_errors_of_a_broken_gpu_are_raised(calls, monkeypatch):
    right = cases.Case.results

    def results(self, *rest):
        if tuning._forced[1].rows:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return right(self, *rest)

    monkeypatch.setattr(cases.Case, "results", results)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        search(monkeypatch, lambda rows, kernels: 1.0)


@pytest.mark.interpreted
@pytest.mark.parametrize(("op", "rows", "sizes"), [
    ("attention", 16, {}), ("attention", 64, {}), ("linear_cross_entropy", 16, {}), ("linear_cross_entropy", 64, {}),
    ("recurrence", 128, {"heads": 4, "inner": 64, "adapter": "linear"}),
])  # fmt: skip
def test_kernels_stay_within_the_tolerances_in_tiles_that_are_not_shipped(op, rows, sizes):
    """Run the kernels interpreted. The interpreter has no warps and stages."""
    with comparison.interpreted(), tuning.forced(op, _launch.Choice(rows)):
        assert comparison.faults_of(*comparison.compare_case(op, "triton", torch.float32, **sizes)) == []


@pytest.mark.interpreted
def test_a_command_of_tuning(gpu, monkeypatch, capsys):
    """Everything is real but the clock and the GPU."""
    monkeypatch.setattr(_triton, "obstacle", lambda tensor: None)
    monkeypatch.setattr(tuning, "_WARPS", (4, 8))
    monkeypatch.setattr(tuning, "_STAGES", (1,))
    measured = iter((10.0, 9.0, 11.0, 10.0, 8.0))

    def milliseconds(call):
        return next(measured, 20.0)

    monkeypatch.setattr(launch_search, "milliseconds", milliseconds)
    # In the interpreter all candidates would take minutes.
    monkeypatch.setattr(launch_search, "fault_of", lambda *_: None)
    model = LARESConfig(n_items=2, hidden_size=32, n_heads=1, max_len=3, inner_size=16)
    said = launch_search.tune("linear_cross_entropy", torch.float32, CPU, model, 2, print)
    assert said == "1.25 times as fast (10 ms to 8 ms), stored"
    kernels = dict.fromkeys(tuning.KERNELS["linear_cross_entropy"][0], (4, 1))
    assert found({"width": 32}, op="linear_cross_entropy") == _launch.Choice(16, kernels)
    said = launch_search.tune("recurrence", torch.float32, CPU, model, 2, print)
    assert said == "not measured, because it takes widths of 64 and 128, and h has 32"
    query = torch.zeros(2, 32)
    note = "would run, with launch settings from lares-fast tune for float32 width=32"
    assert explain("linear_cross_entropy", query, query, torch.zeros(2, dtype=torch.int64)).splitlines()[1].endswith(note)
    with comparison.interpreted():
        ops.target_logprob(query, query, torch.zeros(2, dtype=torch.int64), backend="triton")


def test_what_is_found_is_told_and_cleared(gpu, monkeypatch, capsys):
    tuning.store(CPU, {KEY: FOUND})
    monkeypatch.setattr(_triton, "obstacle", lambda tensor: None)
    query = torch.zeros(50, 2, 32)
    call = (query, query, query, torch.tensor([0, 50]), 50)
    assert "would run, with launch settings from lares-fast tune for float32 longest=50 width=32" in explain("attention", *call)
    monkeypatch.setattr(doctor, "_tuned_calls", lambda: sorted(tuning.of_device(CPU)))
    assert main(["doctor"]) == 0
    assert f"tuned        {KEY}" in capsys.readouterr().out
    assert main(["tune", "--clear"]) == 0
    assert capsys.readouterr().out == "removed the stored launch settings\n"
    assert found() is None
    assert "tune" not in explain("attention", *call)
    assert main(["tune", "--clear"]) == 0
    assert capsys.readouterr().out == "no launch settings were stored\n"


def test_the_kernels_of_every_op_are_known():
    assert set(tuning.KERNELS) == set(launch_search._CALLS) < set(comparison.ops_with_triton())
