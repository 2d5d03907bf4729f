"""On a GPU no op makes the CPU wait, neither in its checks nor for the arguments of its kernels. Compilers trace every op."""

from functools import partial

import pytest
import torch

from lares_fast import LARES, _native, ops, reference
from lares_fast._random import Draw, seed_of
from lares_fast.config import LARESConfig
from lares_fast.sequences import Sequences
from tests.support.fake_device import DEVICE, FakeDevice, to_fake_device
from tests.support.launches import replaced_kernels

OPS = [name for name in ops.__all__ if name not in ("CatalogIndex", "backend", "explain")]
P, B, N, D, H = 9, 3, 70, 32, 2
LENGTHS = [4, 0, 5]


@pytest.fixture
def launched():
    """Return the names of the launched kernels. None of them runs."""
    names = []
    with replaced_kernels(DEVICE, names.append):
        yield names


def leaf(*shape):
    return to_fake_device(torch.randn(*shape)).requires_grad_()


def attention(backend):
    query, key, value = (leaf(P, H, D // H) for _ in range(3))
    draw = Draw((1, 2), to_fake_device(torch.arange(B)))
    offsets = to_fake_device(torch.tensor([0, *LENGTHS]).cumsum(0))
    return ops.attention(query, key, value, offsets, 5, draw=draw, dropout=0.2, backend=backend)


def recurrence(backend, depth=2, output="last", deepest=None):
    config = LARESConfig(n_items=9, hidden_size=64, n_heads=H, inner_size=64, n_core_layers=1)
    weights = [leaf(*parameter.shape) for parameter in reference.Recurrence(config).parameters()]
    draw = Draw((1, 2), to_fake_device(torch.arange(2)))
    offsets = to_fake_device(torch.tensor([0, 4, P]))
    how = {"depth": depth, "output": output, "longest": 5, "deepest": deepest, "draw": draw, "dropout": 0.2}
    return ops.recurrence(leaf(P, 64), offsets, weights, n_heads=H, pre=leaf(P, 64), **how, backend=backend)


def packed():
    """Return items, offsets, and a draw whose key is on the device."""
    draw = Draw(to_fake_device(seed_of((1, 2), torch.device("cpu"))), to_fake_device(torch.arange(B)))
    return to_fake_device(torch.arange(1, P + 1)), to_fake_device(torch.tensor([0, *LENGTHS]).cumsum(0)), draw


def embedding(backend):
    items, offsets, draw = packed()
    return ops.embedding(items, offsets, leaf(N, D), leaf(5, D), leaf(D), leaf(D), draw=draw, dropout=0.2, backend=backend)


def initial_state(backend):
    _, offsets, draw = packed()
    return ops.initial_state(draw, offsets, P + 2, D, backend=backend)


def catalog():
    return leaf(B, D), leaf(N, D), to_fake_device(torch.tensor([1, 69, 5]))


def catalogs():
    return leaf(2, B, D), leaf(2, N, D), to_fake_device(torch.tensor([[1, 69, 5], [3, 2, 1]]))


def excluded():
    return to_fake_device(torch.tensor([0, 1, 1, 3])), to_fake_device(torch.tensor([7, 8, 2]))


CALLS = {
    "attention": attention,
    "embedding": embedding,
    "initial_state": initial_state,
    "recurrence": recurrence,
    "linear_cross_entropy": lambda backend: ops.linear_cross_entropy(*catalog(), skip_pad=True, backend=backend),
    "target_logprob": lambda backend: ops.target_logprob(*catalog(), backend=backend),
    "target_logprob_and_rank": lambda backend: ops.target_logprob_and_rank(*catalog(), backend=backend)[0],
    "linear_cross_entropy, batched": lambda backend: ops.linear_cross_entropy(*catalogs(), backend=backend),
    "target_logprob, batched": lambda backend: ops.target_logprob(*catalogs(), skip_pad=True, backend=backend),
    "target_logprob_and_rank, batched": lambda backend: ops.target_logprob_and_rank(*catalogs(), backend=backend)[0],
    "target_logprob_and_rank, ranked": lambda backend: ops.target_logprob_and_rank(*catalogs(), ranked=4, backend=backend)[0],
    "topk": lambda backend: ops.topk(*catalog()[:2], 5, exclude=excluded(), backend=backend),
    "target_rank": lambda backend: ops.target_rank(*catalog(), backend=backend),
    "target_ranks": lambda backend: ops.target_ranks(*catalog(), excluded(), backend=backend),
}
RANKED = ("topk", "target_rank", "target_ranks")
DIFFERENTIABLE = [name for name in CALLS if name not in (*RANKED, "initial_state")]
# Public op -> its backend on a GPU.
KERNELS = {name: "cuda" if name in RANKED else "triton" for name in CALLS}


def test_every_op_is_watched():
    assert set(OPS) <= set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_kernels_are_launched_without_waiting(name, launched):
    with FakeDevice():
        out = CALLS[name](KERNELS[name])
        assert launched
        forward = len(launched)
        if name in DIFFERENTIABLE:
            out.sum().backward()
            assert len(launched) > forward


@pytest.mark.parametrize("output", ["last", "steps", "tokens"])
def test_a_depth_on_the_cpu_is_not_waited_for(output, launched):
    with FakeDevice():
        out = recurrence("triton", torch.tensor([3, 1]), output)
        assert len(out) == {"last": 2, "steps": 4, "tokens": P}[output]
        out.sum().backward()
    # The forward makes a plan, and the backward takes two launches a step.
    assert [launched.count(name) for name in ("plan", "recurrence_forward", "step_backward")] == [1, 1, 3]
    with FakeDevice(), pytest.raises(AssertionError, match="waits for the device"):
        recurrence("triton", to_fake_device(torch.tensor([3, 1])), output)


@pytest.mark.parametrize("output", ["last", "steps", "tokens"])
@pytest.mark.parametrize("backend", ["triton", "layers"])
def test_with_a_bound_a_depth_on_the_device_is_not_waited_for(backend, output, launched):
    with FakeDevice():
        out = recurrence(backend, to_fake_device(torch.tensor([3, 1])), output, deepest=4)
        assert len(out) == {"last": 2, "steps": 8, "tokens": P}[output]
        out.sum().backward()
    assert launched.count("step_backward" if backend == "triton" else "attention_backward_query") == 4


@pytest.mark.parametrize("output", ["last", "steps", "tokens"])
@pytest.mark.parametrize("depth", [2, torch.tensor([3, 1])], ids=str)
def test_layers_of_other_sizes_wait_for_nothing(depth, output, launched):
    with FakeDevice():
        out = recurrence("layers", depth, output)
        assert len(out) == {"last": 2, "steps": 4, "tokens": P}[output]
        out.sum().backward()
    with FakeDevice(), torch.no_grad(), pytest.raises(AssertionError, match="waits for the device"):
        recurrence("layers", to_fake_device(torch.tensor([3, 1])), output)
    assert set(launched) == {"attention_forward", "attention_backward_query", "attention_backward_key_value"}


def moved(model):
    """Return ``model`` after a move of its parameters to the fake device."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = to_fake_device(parameter).requires_grad_()
    return model


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("each", [False, True])
def test_a_training_step_of_the_whole_model_waits_for_nothing(packed, each, launched, monkeypatch):
    """Lengths and depths are on the CPU. Keys and rows are integers and on the CPU, or both are on the device."""
    monkeypatch.setattr(_native, "available", lambda: (False, "its loader is a stand-in here"))
    config = LARESConfig(n_items=N, hidden_size=64, n_heads=H, inner_size=64, max_len=6, dropout=0.2)
    model = moved(LARES(config, backend="triton")).train()
    lengths, rows = torch.tensor([4, 1, 6]), torch.arange(B)
    items, sizes = torch.arange(18).view(B, 6) % N, lengths
    if packed:
        items, sizes = Sequences.from_padded(items, lengths)
    depth = torch.tensor([3, 1, 2]) if each else 3
    draws = [Draw((1, i), rows) for i in range(3)]
    if packed:
        seeds = [seed_of(draw.key, torch.device("cpu")) for draw in draws]
        draws = [Draw(to_fake_device(seed), to_fake_device(rows)) for seed in seeds]
    passes = tuple(reference.Pass(depth, draw) for draw in draws)
    with FakeDevice():
        sequences = (to_fake_device(items), sizes)
        loss = reference.spt_loss(
            model, sequences, to_fake_device(torch.arange(B)), sequences, passes, 1, alpha=0.1, gamma=0.5
        ).total
        loss.backward()
        model.eval().encode(*sequences, num_steps=depth)
    assert {"recurrence_forward", "softmax_backward_items", "step_backward"} <= set(launched)
    assert {"initial_state", "embedding_forward", "embedding_backward_rows", "embedding_backward_sums"} <= set(launched)
    assert all(parameter.grad is not None for name, parameter in model.named_parameters())


@pytest.mark.parametrize("scores", ["dot", "model"])
@pytest.mark.parametrize("reward", ["recall", "ndcg"])
@pytest.mark.parametrize("each", [False, True])
def test_a_step_of_the_second_phase_waits_for_nothing(reward, scores, each, launched, monkeypatch):
    """All parts of the loss are on the device, and so are all gradients of the policy."""
    monkeypatch.setattr(_native, "available", lambda: (False, "its loader is a stand-in here"))
    config = LARESConfig(n_items=N, hidden_size=64, n_heads=H, inner_size=64, max_len=6, dropout=0.2, similarity="cos", tau=0.1)
    model, frozen = (moved(LARES(config, backend="triton")) for _ in range(2))
    items, lengths = Sequences.from_padded(torch.arange(1, 19).view(B, 6), torch.tensor([4, 1, 6]))
    depth = torch.tensor([[3, 1, 2], [1, 2, 2]] if each else [[3] * B, [2] * B])
    group = reference.Pass(depth, Draw((1, 2), torch.arange(2 * B)))
    with FakeDevice():
        batch = ((to_fake_device(items), lengths), to_fake_device(torch.arange(1, B + 1)))
        how = {"k": 10, "beta": 0.5, "reward": reward, "scores": scores}
        loss = reference.rpt_loss(model.train(), frozen.eval().requires_grad_(False), *batch, group, group, **how)
        loss.total.backward()
    assert all(part.device == DEVICE for part in loss)
    assert {"recurrence_forward", "softmax_forward", "softmax_backward_items", "step_backward"} <= set(launched)
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in frozen.parameters())


@pytest.mark.parametrize("similarity", ["dot", "cos"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_recommendation_waits_for_nothing(packed, similarity, launched, monkeypatch):
    """This also holds if the item table is normalised: the second call does not compare weights on a device."""
    monkeypatch.setattr(_native, "available", lambda: (False, "its loader is a stand-in here"))
    config = LARESConfig(n_items=N, hidden_size=64, n_heads=H, inner_size=64, max_len=6, similarity=similarity)
    model = moved(LARES(config)).eval()
    items, sizes = torch.arange(1, 19).view(B, 6), torch.tensor([4, 1, 6])
    if packed:
        items, sizes = Sequences.from_padded(items, sizes)
    with FakeDevice():
        model.recommend(to_fake_device(items), sizes, k=5)
        scores, ids = model.recommend(to_fake_device(items), sizes, k=5)
    assert scores.device == ids.device == DEVICE
    assert scores.shape == ids.shape == (B, 5)
    assert "recurrence_forward" in launched
    assert any(name.startswith("topk") for name in launched)


def test_a_pad_within_a_sequence_on_a_device_gives_nan_and_waits_for_nothing():
    model = moved(LARES(LARESConfig.preset("tiny", n_items=N), backend="reference"))
    items, offsets = torch.tensor([5, 0, 6, 7]), torch.tensor([0, 4])
    with FakeDevice(), torch.no_grad():
        x = model._input(Sequences(to_fake_device(items), offsets), None)
    assert x.inner.isnan().all(1).tolist() == [False, True, False, False]
    assert x.inner[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("name", CALLS)
def test_references_run_on_one_device(name):
    """The references may wait, but they must not mix devices."""
    with FakeDevice(allowed=True):
        out = CALLS[name]("reference")
        if name in DIFFERENTIABLE:
            out.sum().backward()


def test_masks_and_noise_are_drawn_where_their_rows_are():
    rows = torch.arange(3) + 70_000
    calls = {
        "hidden": lambda draw: draw.hidden(torch.ones(3, 5, 70, device=draw.rows.device), 0.5, site=1, step=2, layer=0),
        "attention": lambda draw: draw.attention(torch.ones(3, 2, 5, 5, device=draw.rows.device), 0.5, step=2, layer=0),
        "state": lambda draw: draw.initial_state(draw.rows, draw.rows * 0, 12),
    }
    seed = to_fake_device(seed_of((3, 4), torch.device("cpu")))
    for call in calls.values():
        for key in ((3, 4), seed):
            with FakeDevice():
                there = call(Draw(key, to_fake_device(rows)))
            assert there.device == DEVICE
            assert torch.equal(there.inner, call(Draw((3, 4), rows)))


def test_a_key_on_a_device_is_not_copied():
    seed = to_fake_device(seed_of((3, 4), torch.device("cpu")))
    with FakeDevice():
        assert Draw(seed, torch.arange(3)).seed(DEVICE) is seed


def test_noise_is_drawn_where_a_key_on_a_device_is():
    """The rows of a batch may be on the CPU."""
    rows, seed = torch.arange(3), seed_of((3, 4), torch.device("cpu"))
    with FakeDevice():
        there = Draw(to_fake_device(seed), rows).initial_state(rows, rows * 0, 12)
    assert torch.equal(there.inner, Draw(seed, rows).initial_state(rows, rows * 0, 12))


def test_waiting_and_mixing_are_noticed():
    with FakeDevice():
        x = to_fake_device(torch.ones(3))
        for wait in (
            lambda: x.sum().item(), lambda: x[x > 0], lambda: x.cpu(), lambda: bool(x.any()), lambda: torch.equal(x, x),
        ):  # fmt: skip
            with pytest.raises(AssertionError, match="waits for the device"):
                wait()
        with pytest.raises(AssertionError, match="on the CPU and on the device"):
            x + torch.ones(3)


def compiled_calls():
    """Return public op -> (function, tensors)."""
    draw = Draw((1, 2), torch.arange(B))
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    query = torch.randn(P, H, D // H)
    hidden, items, target = torch.randn(B, D), torch.randn(N, D), torch.tensor([1, 69, 5])
    batched = torch.randn(2, B, D), torch.randn(2, N, D), target.repeat(2, 1)
    exclude = (torch.tensor([0, 1, 1, 3]), torch.tensor([7, 8, 2]))
    tables = torch.randn(N, D), torch.randn(5, D), torch.randn(D), torch.randn(D)
    seed, places = seed_of((1, 2), torch.device("cpu")), torch.arange(1, P + 1)
    weights = list(reference.Recurrence(LARESConfig(n_items=9, hidden_size=D, n_heads=H, inner_size=32)).parameters())
    return {
        "attention": (lambda q, o: ops.attention(q, q, q, o, 5, draw=draw, dropout=0.2), (query, offsets)),
        "embedding": (lambda o, *x: ops.embedding(places, o, *x, draw=Draw(seed, draw.rows), dropout=0.2), (offsets, *tables)),
        "initial_state": (lambda o: ops.initial_state(Draw(seed, draw.rows), o, P + 2, D), (offsets,)),
        "recurrence": (
            lambda h, o: ops.recurrence(h, o, weights, n_heads=H, pre=h, depth=2),
            (torch.randn(P, D), torch.tensor([0, 4, 6, 9])),
        ),
        "linear_cross_entropy": (ops.linear_cross_entropy, (hidden, items, target)),
        "linear_cross_entropy, batched": (ops.linear_cross_entropy, batched),
        "target_logprob_and_rank, ranked": (partial(ops.target_logprob_and_rank, ranked=4), batched),
        "target_logprob": (ops.target_logprob, (hidden, items, target)),
        "target_logprob_and_rank": (ops.target_logprob_and_rank, (hidden, items, target)),
        "topk": (lambda q, i: ops.topk(q, i, 5, exclude=exclude), (hidden, items)),
        "target_rank": (ops.target_rank, (hidden, items, target)),
        "target_ranks": (lambda *x: ops.target_ranks(*x, exclude), (hidden, items, target)),
    }


@pytest.mark.parametrize("name", [*OPS, "linear_cross_entropy, batched", "target_logprob_and_rank, ranked"])
def test_compiles_without_a_break(name):
    function, tensors = compiled_calls()[name]
    with torch.no_grad():
        expected = function(*tensors)
        torch._dynamo.reset()
        found = torch.compile(function, fullgraph=True, backend="aot_eager")(*tensors)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
