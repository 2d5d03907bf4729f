"""Plain numbers from callers: they are used exactly as given, or an error names the argument."""

import numpy as np
import pytest
import torch

import lares_fast
from lares_fast import LARESConfig, ops
from lares_fast._errors import InputError
from lares_fast._numbers import number, whole


@pytest.mark.parametrize("value", [5, np.int64(5), np.uint8(5), torch.tensor(5), torch.tensor(5, dtype=torch.uint8)])
def test_whole_numbers_of_any_library(value):
    assert whole("n", value) == 5
    assert type(whole("n", value)) is int


@pytest.mark.parametrize(
    "value",
    [
        5.0,
        2.7,
        "5",
        b"5",
        True,
        None,
        torch.tensor(5.0),
        torch.tensor(True),
        torch.tensor([1, 2]),
        [5],
        np.ma.array(5, mask=True),
    ],
)
def test_what_is_no_integer(value):
    with pytest.raises(InputError, match=r"^n must be an integer, but got"):
        whole("n", value)


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float64(0.5), torch.tensor(0.5), torch.tensor([0.5])])
def test_numbers_of_any_library(value):
    assert number("x", value) == 0.5
    assert type(number("x", value)) is float


@pytest.mark.parametrize("value", ["0.5", True, None, torch.ones(2), [0.5], torch.tensor(True), 10**400, 1j, np.ma.masked])
def test_what_is_no_number(value):
    with pytest.raises(InputError, match=r"^x must be a number, but got"):
        number("x", value)


def leaf(value):
    return torch.tensor(value, requires_grad=True)


H = torch.zeros(3, 16)
OFFSETS = torch.tensor([0, 3])
WEIGHTS = list(lares_fast.reference.Recurrence(LARESConfig.preset("tiny", n_items=9)).parameters())
ATTENTION = (*[torch.zeros(3, 2, 16)] * 3, OFFSETS)
CATALOG = (torch.zeros(2, 4), torch.zeros(9, 4))
TARGET = torch.tensor([1, 2])
# Case -> (call, what the error says).
CALLS = {
    "a learned scale": (
        lambda: ops.linear_cross_entropy(*CATALOG, TARGET, scale=leaf(2.0).exp()), "scale is a plain number and gets no"),
    "a learned scale of a log-probability": (lambda: ops.target_logprob(*CATALOG, TARGET, scale=leaf(2.0)), "scale is a plain"),
    "a scale in words": (lambda: ops.linear_cross_entropy(*CATALOG, TARGET, scale="2"), "scale must be a number"),
    "a broken k": (lambda: ops.topk(*CATALOG, 2.7), "k must be an integer, but got 2.7"),
    "a k that is true": (lambda: ops.topk(*CATALOG, True), "k must be an integer"),
    "a broken longest": (lambda: ops.attention(*ATTENTION, 3.5), "longest must be an integer"),
    "a broken step": (lambda: ops.attention(*ATTENTION, 3, step=1.5), "step must be an integer"),
    "a learned dropout": (lambda: ops.attention(*ATTENTION, 3, dropout=leaf(0.5)), "dropout is a plain number"),
    "a broken depth": (lambda: ops.recurrence(H, OFFSETS, WEIGHTS, n_heads=2, pre=H, depth=2.7), "depth must be an integer"),
    "depths of floats": (
        lambda: ops.recurrence(H, OFFSETS, WEIGHTS, n_heads=2, pre=H, depth=torch.tensor([2.0])), "depth must be int64"),
    "broken heads": (lambda: ops.recurrence(H, OFFSETS, WEIGHTS, n_heads=2.5, pre=H), "n_heads must be an integer"),
    "a learned eps": (lambda: ops.recurrence(H, OFFSETS, WEIGHTS, n_heads=2, pre=H, eps=leaf(1e-6)), "eps is a plain number"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_ops_take_numbers_as_they_are_or_not_at_all(name):
    call, message = CALLS[name]
    with pytest.raises(InputError, match=rf"^{message}"):
        call()


def test_a_number_in_a_tensor_is_taken():
    expected = ops.topk(*CATALOG, 3)
    assert all(map(torch.equal, ops.topk(*CATALOG, torch.tensor(3)), expected))
    hidden, items = torch.randn(2, 4), torch.randn(9, 4)
    loss = ops.linear_cross_entropy(hidden, items, TARGET, scale=torch.tensor(0.5))
    assert torch.equal(loss, ops.linear_cross_entropy(hidden, items, TARGET, scale=0.5))


SEQUENCE = torch.tensor([[1, 2, 3]]), torch.tensor([3])


@pytest.mark.parametrize("steps", [2.7, "2", True, torch.tensor(2.7), torch.tensor([2.0]), torch.tensor([True])])
def test_a_model_takes_whole_steps(steps):
    model = lares_fast.LARES(LARESConfig.preset("tiny", n_items=9)).eval()
    with pytest.raises(InputError, match=r"^num_steps must be an integer"):
        model.encode(*SEQUENCE, num_steps=steps)
    with pytest.raises(InputError, match=r"^k must be an integer"):
        model.recommend(*SEQUENCE, k=2.5)


@pytest.mark.parametrize(("name", "value", "message"), [
    ("hidden_size", 16.5, "hidden_size must be an integer"),
    ("n_items", "60", "n_items must be an integer"),
    ("mean_depth", True, "mean_depth must be an integer"),
    ("tau", "0.07", "tau must be a number"),
    ("tau", float("inf"), "tau must be a finite number"),
    ("dropout", None, "dropout must be a number"),
    ("pad_in_softmax", "no", "pad_in_softmax must be true or false"),
    ("adapter", 3, "adapter must be text"),
])  # fmt: skip
def test_a_configuration_holds_what_its_fields_say(name, value, message):
    with pytest.raises(InputError, match=message):
        LARESConfig(**{"n_items": 60, name: value})


@pytest.mark.parametrize("before", [0, 0.0])
def test_dropout_can_be_set_again_after_it_was_a_whole_number(before):
    model = lares_fast.reference.LARES(LARESConfig.preset("tiny", n_items=9, dropout=before))
    for p in (0.3, 0, 0.4):
        model.set_dropout(p)
    rates = {vars(module)["dropout"] for module in model.modules() if "dropout" in vars(module)}
    assert rates == {0.4} == {model.config.dropout}
