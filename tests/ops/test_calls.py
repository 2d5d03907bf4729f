"""The calls of the ops: their schemas, their way through an operator, and the public functions they belong to."""

import inspect
from dataclasses import FrozenInstanceError

import pytest
import torch

from lares_fast import explain, ops
from lares_fast._errors import InputError
from lares_fast.ops import _catalog_calls as calls

EXCLUDE = (torch.tensor([0, 1, 1]), torch.tensor([4]))
TENSORS = (torch.randn(2, 3), torch.randn(5, 3))
TARGET = torch.tensor([1, 2])
INDEX = calls.IndexTables(*(torch.randn(i) for i in range(6)))

CALLS = {
    "topk": lambda: calls.TopkCall.build(*TENSORS, 2, bias=torch.randn(5), exclude=EXCLUDE, index=INDEX),
    "topk without options": lambda: calls.TopkCall.build(*TENSORS, 2),
    "target_rank": lambda: calls.TargetRankCall.build(*TENSORS, TARGET, exclude=list(EXCLUDE), ties="strict"),
    "logprob": lambda: calls.LogprobCall.build(*TENSORS, TARGET, scale=2, skip_pad=True, ties="order", backend="native"),
    "backward": lambda: calls.LogprobBackwardCall.build(
        *TENSORS, TARGET, grad=torch.randn(2), lse=torch.randn(2, 2).double(), need_hidden=True, need_items=False
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_operator_gives_the_same_call_back(name):
    call = CALLS[name]()
    arguments = call.arguments()
    assert len(arguments) == call.count() == len(call.schema().split(", "))
    again = type(call).of(*arguments)
    assert all(a is b for a, b in zip(again.arguments(), arguments, strict=True))
    assert [field.name for field in call.layout] == list(vars(call))


@pytest.mark.parametrize("name", CALLS)
def test_a_schema_has_no_list_of_tensors(name):
    """An exported package cannot pass a list of tensors."""
    assert "[]" not in CALLS[name]().schema()


def test_a_call_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        CALLS["topk"]().k = 3


def test_numbers_are_plain_after_a_call_is_built():
    call = calls.TopkCall.build(*TENSORS, torch.tensor(2))
    assert type(call.k) is int
    call = calls.LogprobCall.build(*TENSORS, TARGET, scale=torch.tensor(2.0), skip_pad=1)
    assert type(call.scale) is float and call.skip_pad is True


@pytest.mark.parametrize(("function", "call", "more"), [
    (ops.topk, calls.TopkCall, set()),
    (ops.target_rank, calls.TargetRankCall, set()),
    (ops.target_ranks, calls.TargetRankCall, set()),
    (ops.target_logprob_and_rank, calls.LogprobCall, set()),
    (ops.linear_cross_entropy, calls.LogprobCall, {"ties", "ranked", "reduction"}),
])  # fmt: skip
def test_a_call_has_the_arguments_of_the_public_function(function, call, more):
    assert set(inspect.signature(function).parameters) ^ {field.name for field in call.layout} == more


@pytest.mark.parametrize(("op", "arguments", "options"), [
    ("topk", (*TENSORS, 2), {"bias": torch.randn(5), "exclude": EXCLUDE}),
    ("topk", TENSORS, {"k": 2, "backend": "reference"}),
    ("target_rank", (*TENSORS, TARGET), {"exclude": EXCLUDE, "ties": "strict"}),
    ("linear_cross_entropy", (*TENSORS, TARGET), {"scale": 0.5, "skip_pad": True, "reduction": "sum"}),
    ("linear_cross_entropy", (TENSORS[0][None], TENSORS[1], TARGET[None]), {}),
])  # fmt: skip
def test_explain_takes_the_arguments_of_the_op(op, arguments, options):
    expected = options.get("backend", "native")
    assert explain(op, *arguments, **options).splitlines()[0] in (f"{op}: {expected}", f"{op}: reference")
    getattr(ops, op)(*arguments, **options)


@pytest.mark.parametrize(("op", "arguments", "options", "message"), [
    ("topk", (*TENSORS, 9), {}, "k must be in 1..5"),
    ("target_rank", (*TENSORS, TARGET), {"ties": "mean"}, "ties must be one of order, strict"),
    ("linear_cross_entropy", (*TENSORS, TARGET), {"reduction": "max"}, "reduction must be one of none, mean, sum"),
    ("linear_cross_entropy_backward", (), {}, "op must be one of attention, embedding, initial_state, linear"),
])  # fmt: skip
def test_explain_checks_its_arguments(op, arguments, options, message):
    with pytest.raises(InputError, match=message):
        explain(op, *arguments, **options)


@pytest.mark.parametrize(
    "change",
    [{"items": torch.randn(5, 4)}, {"query": torch.randn(2, 3).double()}, {"k": 0}],
    ids=["items", "query", "k"],
)
def test_the_registered_operator_checks_its_arguments_too(change):
    """A graph or an exported package calls the operator without the public function."""
    good = CALLS["topk without options"]()
    named = dict(zip((part.split()[-1] for part in good.schema().split(", ")), good.arguments(), strict=True))
    with pytest.raises(InputError):
        torch.ops.lares_fast.topk(*{**named, **change}.values())


def test_no_operator_takes_a_list_of_tensors():
    """An exported package cannot pass one."""
    schemas = [str(schema) for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("lares_fast::")]
    assert len(schemas) >= 8
    assert not [schema for schema in schemas if "Tensor[]" in schema or "Tensor?[]" in schema]
