"""The random tests can fail: each counts a planted fault. And the cases that random tests have found stay mended."""

import json
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from lares_fast import LARES, LARESConfig, ops
from lares_fast._errors import InputError
from lares_fast._random import Draw
from lares_fast.cli import settings
from lares_fast.data import log_from_sequences, read_log
from lares_fast.serve import Recommender, load

pytest.importorskip("hypothesis")
pytest.importorskip("pyarrow")

from tests.reliability import fuzz_readers
from tests.reliability.counts import ROOT
from tests.reliability.fuzzing import log_files, outcomes, settings_files
from tests.reliability.fuzzing.children import ended
from tests.reliability.fuzzing.values import ODD, Example, Floats, Odd

CATALOG = {"query": Floats((2, 4), "integers"), "items": Floats((9, 4), "integers", seed=1), "k": 3, "backend": "native"}
VALID = Example("topk", CATALOG, right=True)


def planted(change):
    """Return ``topk`` with a fault in its native backend."""

    def topk(*, backend, **arguments):
        found = ops.topk(**arguments, backend=backend)
        return change(*found) if backend != "reference" else found

    return topk


@pytest.mark.parametrize(("change", "expected"), [
    (lambda scores, ids: (scores, ids), None),
    (lambda scores, ids: (scores, ids.roll(1, 1)), "result 1 differs"),
    (lambda scores, ids: (scores * 1.01, ids), "exceeds"),
    (lambda scores, ids: (scores[:, :2], ids), "instead of"),
    (lambda scores, ids: (scores * torch.nan, ids), "not finite"),
    (lambda scores, ids: [][0], "raised IndexError"),
], ids=["none", "order", "score", "shape", "NaN", "another exception"])  # fmt: skip
def test_a_wrong_result_of_an_op_is_found(monkeypatch, change, expected):
    monkeypatch.setitem(outcomes.FUNCTIONS, "topk", planted(change))
    found = outcomes.fault(VALID)
    assert found is None if expected is None else expected in found


def test_an_argument_that_is_accepted_or_refused_wrongly_is_found(monkeypatch):
    wrong = replace(VALID, arguments={**CATALOG, "k": Odd("text")}, wrong=("k",), refused=True, right=False)
    assert outcomes.fault(wrong) is None
    monkeypatch.setitem(outcomes.FUNCTIONS, "topk", lambda **_: torch.zeros(1))
    assert "accepted" in outcomes.fault(wrong)

    def refuse(**_):
        raise InputError("no full stop")

    monkeypatch.setitem(outcomes.FUNCTIONS, "topk", refuse)
    assert "not one sentence" in outcomes.fault(wrong)

    def refuse_all(**_):
        raise InputError("no.")

    monkeypatch.setitem(outcomes.FUNCTIONS, "topk", refuse_all)
    assert "names no argument" in outcomes.fault(wrong)
    assert "refused a valid call" in outcomes.fault(VALID)


def test_a_crash_of_a_child_leaves_its_example(tmp_path):
    """The process of a child ends by a signal, and the file of its state has the example that it tried."""
    state = tmp_path / "state"
    code = "import os, sys, tests.reliability.fuzzing.children as c; w = c.Watcher(sys.argv[1], lambda e: os.abort()); w('bad')"
    subprocess.run([sys.executable, "-c", code, str(state)], cwd=ROOT, stderr=subprocess.DEVNULL, check=False)
    assert json.loads(state.read_text()) == ["", {"": 1}, "bad"]
    for code, text in (
        (-signal.SIGABRT, "signal 6"),
        (-signal.SIGALRM, "longer than"),
        (-signal.SIGPROF, "of processor time"),
        (1, "code 1: why"),
    ):
        found = ended(code, "why", state)
        assert (found.tried, found.faults[0][:2]) == ({"": 1}, ("", "bad"))
        assert text in found.faults[0][2]


@pytest.mark.parametrize(("change", "expected"), [
    (lambda log: None, None),
    (lambda log: log.items.__setitem__(0, log.items[1]), "instead of"),
    (lambda log: log.item_ids.__setitem__(1, log.item_ids[2]), "ids are different"),
], ids=["none", "an event", "an id"])  # fmt: skip
def test_a_wrong_log_is_found(tmp_path, monkeypatch, change, expected):
    monkeypatch.chdir(tmp_path)

    def read(path, **options):
        log = read_log(path, **options)
        change(log)
        return log

    for name, content in log_files.files(fuzz_readers.Random(0), log_files.HISTORIES):
        found = fuzz_readers.file_fault(fuzz_readers.File(name, content), read)
        assert found is None if expected is None else expected in found, name


def test_wrong_settings_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = b"spt:\n  lr: 0.5\n"
    assert settings_files.Input("config.yaml", text, settings_files.check_config).fault() is None
    monkeypatch.setattr(settings_files.settings, "build", lambda *_: settings.RunConfig())
    assert "instead of 0.5" in settings_files.Input("config.yaml", text, settings_files.check_config).fault()


@pytest.mark.parametrize("name", sorted(ODD))
def test_every_argument_refuses_what_no_argument_takes(name):
    for argument in ("query", "items", "k", "bias", "exclude", "backend"):
        wrong = {"bias": Floats((9,)), **CATALOG, argument: Odd(name)}
        assert outcomes.fault(Example("topk", wrong, (argument,), refused=True)) is None, argument


H = torch.randn(2, 4)
STATE = {"offsets": torch.tensor([0, 2]), "n_tokens": 2, "width": 4}
OFFSETS = torch.tensor([0, 2])
# Case -> (call, a part of the message). Each call once raised another exception or gave a result.
FOUND = {
    "a flag in words": (lambda: ops.target_logprob(H, H, OFFSETS.clamp(max=1), skip_pad="no"), "skip_pad must be true"),
    "no width": (lambda: ops.linear_cross_entropy(H[:, :0], H[:0, :0], OFFSETS), "items must be"),
    "float8": (lambda: ops.topk(H.to(torch.float8_e4m3fn), H.to(torch.float8_e4m3fn), 1), "query must be a floating-point"),
    "rows beyond 32 bits": (lambda: ops.initial_state(Draw((1, 2), torch.tensor([2**32])), **STATE), "draw.rows must be in"),
    "rows below 0": (
        lambda: ops.initial_state(Draw((1, 2), torch.tensor([-1])), **STATE, backend="reference"), "draw.rows must be in"),
    "a key of three": (lambda: ops.initial_state(Draw((1, 2, 3), torch.tensor([1])), **STATE), "draw.key must be two"),
    "a key beyond 32 bits": (lambda: ops.initial_state(Draw((1, -2), torch.tensor([1])), **STATE), "draw.key must hold"),
    "no draw": (lambda: ops.initial_state("x", **STATE), "draw must be a Draw"),
    "a huge state": (lambda: ops.initial_state(Draw((1, 2), torch.tensor([1])), OFFSETS, 2**62, 4), "n_tokens times width"),
    "a negated index": (lambda: ops.CatalogIndex(torch._neg_view(H)), "negated view"),
    "an infinite eps": (lambda: LARESConfig.preset("tiny", n_items=3, tau=float("nan")), "tau must be a finite number"),
    "a column of settings": (lambda: LARESConfig.from_dict([1]), "values must be a dictionary"),
    "a log of nothing": (lambda: log_from_sequences(3), "sequences must be a mapping"),
    "a number as a path": (lambda: read_log(3), "path must be the path of a file"),
    "a number as a run": (lambda: load(3), "run must be the path of a folder"),
    "a time column of 3": (
        lambda: read_log(__file__, format="csv", columns={"time": 3}), "columns must name the 'time' column by a text"),
    "a long name": (lambda: settings.build("x" * 5000), "neither a file nor a preset"),
    "an escape sequence": (lambda: settings.build(None, ["spt.lr=\x1b[31m"]), "\N{REPLACEMENT CHARACTER}"),
    "no model": (lambda: Recommender(3, [1, 2]), "model must be a lares_fast.LARES"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_calls_that_random_tests_found_are_refused(name):
    call, message = FOUND[name]
    with pytest.raises(InputError) as caught:
        call()
    if name == "a long name":
        assert len(str(caught.value)) < 400
    assert message in str(caught.value) and outcomes.sentence_fault(str(caught.value)) is None


def test_a_catalog_without_columns_has_equal_scores():
    hidden, items = torch.zeros(2, 3, 0, requires_grad=True), torch.zeros(4, 0)
    loss = ops.linear_cross_entropy(hidden, items, torch.zeros(2, 3, dtype=torch.int64))
    assert torch.allclose(loss, torch.tensor(4.0).log())
    loss.backward()
    assert hidden.grad.shape == (2, 3, 0)


def test_a_tensor_of_inference_mode_has_no_gradient():
    with torch.inference_mode():
        items = torch.randn(5, 4)
    for hidden in (H.clone().requires_grad_(), torch._neg_view(H).requires_grad_()):
        with pytest.raises(InputError, match="items was made in inference mode"):
            ops.target_logprob(hidden, items, torch.tensor([0, 1]))
    assert ops.target_logprob(H, items, torch.tensor([0, 1])).shape == (2,)


def test_a_tensor_without_memory_is_read_as_zeros():
    zeros = torch._efficientzerotensor((2, 4))
    scores, ids = ops.topk(H, zeros, 2)
    assert scores.tolist() == [[0.0, 0.0]] * 2 and ids.tolist() == [[0, 1]] * 2


def test_the_model_names_its_wrong_arguments():
    model = LARES(LARESConfig.preset("tiny", n_items=9)).eval()
    sequence = torch.tensor([[1, 2]]), torch.tensor([2])
    for options, message in (
        ({"state": "x"}, "state must be a dense tensor"),
        ({"draw": torch.ones(3)}, "draw must be a Draw"),
        ({"num_steps": 2**64 - 1}, "num_steps must be at least 1"),
        ({"return_all_steps": torch.ones(2)}, "return_all_steps must be true or false"),
    ):
        with pytest.raises(InputError, match=message):
            model.encode(*sequence, **options)
