"""No op has a forward-mode derivative. Each says so; otherwise its derivative would silently be zero."""

import pytest
import torch
from torch.autograd import forward_ad

from lares_fast import LARES, LARESConfig, ops, reference

ROWS, ITEMS, TARGET = torch.randn(3, 16), torch.randn(9, 16), torch.tensor([1, 2, 8])
OFFSETS = torch.tensor([0, 1, 3])
CONFIG = LARESConfig(n_items=9, max_len=4, hidden_size=16, inner_size=32, n_pre_layers=1, n_core_layers=1, dropout=0.0)
WEIGHTS = [weight.detach() for weight in reference.Recurrence(CONFIG).parameters()]
HEADS = ROWS.view(3, 2, 8)
TABLES = (ITEMS, torch.randn(5, 16), torch.ones(16), torch.zeros(16))


def recurrence(h=ROWS, pre=ROWS, weights=WEIGHTS, **how):
    return ops.recurrence(h, OFFSETS, weights, n_heads=2, pre=pre, **how)


def attention(q, k, v, **how):
    return ops.attention(q, k, v, OFFSETS, 2, **how)


def embedding(*tables, **how):
    return ops.embedding(TARGET, OFFSETS, *tables, **how)


# A function of one tensor with a derivative, and the value of that tensor.
CALLS = {
    "attention, query": (lambda x, **how: attention(x, HEADS, HEADS, **how), HEADS),
    "attention, key": (lambda x, **how: attention(HEADS, x, HEADS, **how), HEADS),
    "attention, value": (lambda x, **how: attention(HEADS, HEADS, x, **how), HEADS),
    "embedding, items": (lambda x, **how: embedding(x, *TABLES[1:], **how), TABLES[0]),
    "embedding, bias": (lambda x, **how: embedding(*TABLES[:3], x, **how), TABLES[3]),
    "linear_cross_entropy, hidden": (lambda x, **how: ops.linear_cross_entropy(x, ITEMS, TARGET, **how), ROWS),
    "linear_cross_entropy, items": (lambda x, **how: ops.linear_cross_entropy(ROWS, x, TARGET, **how), ITEMS),
    "target_logprob": (lambda x, **how: ops.target_logprob(x, ITEMS, TARGET, **how), ROWS),
    "target_logprob_and_rank": (lambda x, **how: ops.target_logprob_and_rank(x, ITEMS, TARGET, **how)[0], ROWS),
    "recurrence, h": (lambda x, **how: recurrence(h=x, **how), ROWS),
    "recurrence, pre": (lambda x, **how: recurrence(pre=x, **how), ROWS),
    "recurrence, weights": (lambda x, **how: recurrence(weights=[*WEIGHTS[:-1], x], **how), WEIGHTS[-1]),
    "topk, query": (lambda x, **how: ops.topk(x, ITEMS, 2, **how)[0], ROWS),
    "topk, bias": (lambda x, **how: ops.topk(ROWS, ITEMS, 2, bias=x, **how)[0], torch.zeros(9)),
}
MESSAGE = "has no forward-mode derivative: use a derivative in reverse mode"


def dual(call, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(call(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def dual_without_grad(call, x):
    with torch.no_grad():
        return dual(call, x)


def dual_with_gradient(call, x):
    return dual(call, x.clone().requires_grad_())


def jvp(call, x):
    return torch.func.jvp(call, (x,), (torch.ones_like(x),))


def linearize(call, x):
    return torch.func.linearize(call, x)


def vmap_of_jvp(call, x):
    return torch.func.vmap(lambda tangent: torch.func.jvp(call, (x,), (tangent,)))(torch.ones(2, *x.shape))


def jvp_of_vmap(call, x):
    return jvp(torch.func.vmap(call), torch.stack((x, x)))


def outer_jvp(call, x):
    """The inner derivative is with respect to another tensor."""
    return jvp(lambda y: jvp(lambda z: z * call(y).sum(), torch.ones(1)), x)


def jacobian(call, x):
    return torch.autograd.functional.jacobian(call, x, vectorize=True, strategy="forward-mode")


WAYS = [
    dual,
    dual_without_grad,
    dual_with_gradient,
    jvp,
    lambda call, x: torch.func.jacfwd(call)(x),
    linearize,
    vmap_of_jvp,
    jvp_of_vmap,
    outer_jvp,
    jacobian,
]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("call", CALLS)
def test_every_way_to_a_forward_mode_derivative_raises_the_error(call):
    function, x = CALLS[call]
    for way in WAYS:
        if way is jvp_of_vmap and call == "recurrence, weights":
            # PyTorch has no batching rule for the function that joins the weights, and says so.
            continue
        with pytest.raises(NotImplementedError, match=MESSAGE):
            way(function, x)


@pytest.mark.parametrize("backend", ["native", "triton", "cuda", "layers", "reference"])
@pytest.mark.parametrize("call", CALLS)
def test_the_error_is_the_same_for_every_backend(call, backend):
    function, x = CALLS[call]
    for way in (dual, jvp):
        with pytest.raises(NotImplementedError, match=MESSAGE):
            way(lambda y: function(y, backend=backend), x)


BACKWARDS = {
    "attention": "attention, query",
    "embedding": "embedding, items",
    "linear_cross_entropy": "target_logprob",
    "recurrence": "recurrence, h",
}


@pytest.mark.parametrize("op", BACKWARDS)
def test_a_gradient_has_no_forward_mode_derivative_either(op):
    function, x = CALLS[BACKWARDS[op]]
    leaf = x.clone().requires_grad_()
    out = function(leaf)
    for backward in (True, False):
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=MESSAGE):
            # The gradient of the output carries a tangent.
            grad = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
            torch.autograd.grad(out, leaf, grad, retain_graph=True, create_graph=backward)


@pytest.mark.parametrize("parameter", [
    "item_embedding.weight", "position_embedding.weight", "input_norm.bias", "pre_block.layers.0.feed_forward.down.bias",
    "recurrence.core.layers.0.attention.query.weight",
])  # fmt: skip
def test_a_model_raises_the_error_for_each_kind_of_parameter(parameter):
    model = LARES(CONFIG).eval()
    batch = torch.tensor([[1, 2, 3]]), torch.tensor([3])
    x = dict(model.named_parameters())[parameter].detach()

    def encode(value):
        return torch.func.functional_call(model, {parameter: value}, batch)

    for way in (dual, jvp):
        with pytest.raises(NotImplementedError, match=MESSAGE):
            way(encode, x)


def test_tensors_without_tangents_may_pass_while_another_derivative_is_taken():
    """Its result is a constant of the derivative."""
    function, x = CALLS["target_logprob"]
    expected = function(x)
    value, tangent = torch.func.jvp(lambda y: y.sum() + function(x), (x,), (torch.ones_like(x),))
    assert torch.equal(tangent, torch.full((3,), 48.0)) and torch.equal(value, x.sum() + expected)
    value, tangent = torch.func.jvp(lambda y: y.sum() + function(y.detach()), (x,), (torch.ones_like(x),))
    assert torch.equal(tangent, torch.full((3,), 48.0)) and torch.equal(value, x.sum() + expected)


def test_the_reference_has_the_derivative():
    def loss(hidden):
        return reference.linear_cross_entropy(hidden, ITEMS.double(), TARGET)

    x, step = ROWS.double(), torch.ones(3, 16, dtype=torch.float64)
    found = torch.func.jvp(loss, (x,), (step,))[1]
    # A difference quotient in fp64 has an error of about 1e-9.
    torch.testing.assert_close(found, (loss(x + 1e-6 * step) - loss(x - 1e-6 * step)) / 2e-6, rtol=1e-6, atol=1e-8)
