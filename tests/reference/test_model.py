"""Properties of the reference that no golden file covers."""

import copy

import pytest
import torch

import lares_fast
from lares_fast import LARESConfig, reference
from lares_fast._errors import InputError
from lares_fast._random import Draw
from tests.support import oracle

B, L, N = 70, 10, 50


def config(**changes):
    return LARESConfig.preset("tiny", n_items=N, **changes)


def sequences(batch=B):
    lengths = torch.randint(1, L + 1, (batch,))
    items = torch.randint(1, N, (batch, L))
    return torch.where(torch.arange(L) < lengths[:, None], items, 0), lengths


def draw(batch=B):
    return Draw((3, 4), torch.arange(batch) + 5)


def test_what_lies_behind_a_sequence_changes_nothing():
    model = reference.LARES(config()).eval()
    seq, lengths = sequences()
    h0 = torch.randn(B, L, 16)
    behind = (torch.arange(L) >= lengths[:, None])[..., None]
    out = model.encode(seq, lengths, state=h0)
    assert torch.equal(out, model.encode(seq, lengths, state=torch.where(behind, 50 * h0, h0)))
    longest = int(lengths[:5].max())
    cropped = model.encode(seq[:5, :longest], lengths[:5], state=h0[:5, :longest])
    torch.testing.assert_close(out[:5], cropped, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("every_step", [True, False])
@pytest.mark.parametrize("adapter", ["add", "concat", "linear"])
def test_the_public_model_stays_within_the_tolerances(training, every_step, adapter):
    """States and every gradient of packed encoding, compared with the reference in fp64. The reference in fp32 is the twin."""
    twin = reference.LARES(config(adapter=adapter, per_sequence_depth=True)).train(training)
    with torch.no_grad():
        # With weights of the initial size, the softmax is nearly uniform.
        for parameter in twin.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    fast = lares_fast.LARES(twin.config).train(training)
    fast.load_state_dict(twin.state_dict())
    truth = copy.deepcopy(twin).double()
    seq, lengths = sequences(300)
    # There are several upstream gradients, because the error of the twin in one number, the gate of the linear adapter, may be
    # small by chance.
    upstreams = torch.randn(8, 300, 1, 16) if every_step else torch.randn(8, 300, 16)

    def results(model):
        out = model.encode(seq, lengths, draw=draw(300), return_all_steps=every_step)
        names, parameters = zip(*model.named_parameters(), strict=True)
        gradients = [
            torch.autograd.grad(out, parameters, upstream.to(out).expand_as(out), retain_graph=True) for upstream in upstreams
        ]
        return {"states": out.detach()}, dict(zip(names, map(torch.stack, zip(*gradients, strict=True)), strict=True))

    (out, gradients), (twin_out, twin_gradients), (true_out, true_gradients) = map(results, (fast, twin, truth))
    oracle.check("forward", out, twin_out, true_out)
    oracle.check("gradient", gradients, twin_gradients, true_gradients)


def test_per_sequence_depth_equals_each_depth_alone():
    model = reference.LARES(config()).train()
    seq, lengths = sequences(6)
    depth = torch.tensor([1, 4, 2, 3, 1, 4])
    together = model.encode(seq, lengths, num_steps=depth, draw=draw(6), return_all_steps=True)
    assert together.shape == (6, 4, 16)
    for row, T in enumerate(depth.tolist()):
        alone = model.encode(seq, lengths, num_steps=T, draw=draw(6))[row]
        for step in range(T - 1, 4):
            torch.testing.assert_close(together[row, step], alone, rtol=1e-5, atol=1e-6)


def test_dropout_masks_of_attention_and_hidden_are_used_at_their_rate():
    model = reference.LARES(config(dropout=0.5)).train()
    seq, lengths = sequences()
    a, b = (model.encode(seq, lengths, num_steps=1, draw=draw()) for _ in range(2))
    assert torch.equal(a, b)
    model.set_dropout(0.0)
    c = model.encode(seq, lengths, num_steps=1, draw=draw())
    torch.testing.assert_close(c, model.eval().encode(seq, lengths, num_steps=1, draw=draw()))
    assert not torch.allclose(a, c)
    assert model.config.dropout == 0.0


def test_evaluation_repeats_itself_and_does_not_depend_on_the_batch():
    model = lares_fast.LARES(config()).eval()
    seq, lengths = sequences()
    out = model.encode(seq, lengths)
    assert torch.equal(out, model.encode(seq, lengths))
    torch.testing.assert_close(out[3:4], model.encode(seq[3:4], lengths[3:4]), rtol=1e-5, atol=1e-6)
    model.train()
    assert not torch.equal(model.encode(seq, lengths, num_steps=2), model.encode(seq, lengths, num_steps=2))
    torch.manual_seed(7)
    first = model.encode(seq, lengths)
    torch.manual_seed(7)
    assert torch.equal(first, model.encode(seq, lengths))


@pytest.mark.parametrize(("init", "training", "noisy"), [
    ("normal", True, True), ("normal", False, True), ("normal_zero", True, True), ("normal_zero", False, False),
    ("zero", True, False), ("zero", False, False),
])  # fmt: skip
def test_state_init(init, training, noisy):
    model = reference.LARES(config(state_init=init, state_std=0.5, state_scale=4.0)).train(training)
    h0 = model.initial_state(draw(), L)
    assert h0.shape == (B, L, 16)
    assert bool(h0.any()) == noisy
    if noisy:
        assert h0.abs().max() <= 3 * 0.5 * 4.0
        assert h0.std().item() == pytest.approx(0.987 * 2.0, rel=0.05)


def test_pad_is_trained_by_the_softmax_only():
    seq, lengths = sequences()
    target = torch.randint(1, N, (B,))
    gradients = {}
    for pad_in_softmax in (True, False):
        model = reference.LARES(config(pad_in_softmax=pad_in_softmax)).train()
        passes = tuple(reference.Pass(2, draw()) for _ in range(3))
        loss = reference.spt_loss(model, (seq, lengths), target, (seq, lengths), passes, 0, alpha=0.1, gamma=0.5)
        loss.total.backward()
        gradients[pad_in_softmax] = model.item_embedding.weight.grad[0]
    assert gradients[True].any()
    assert not gradients[False].any()


def test_initialisation():
    model = reference.LARES(LARESConfig(n_items=4000))
    weight = model.item_embedding.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert weight[0].norm() > 0.1, "the PAD row is drawn like any other"
    assert not model.pre_block.layers[0].feed_forward.up.bias.any()
    rest = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("item_embedding"))
    assert rest == 201_472, "the published size without the item table"


def test_a_registered_backbone_is_used_uncropped():
    class Mean(torch.nn.Module):
        def forward(self, x, mask, *, draw, step):
            return x.mean(dim=1, keepdim=True).expand_as(x)

    reference.register_backbone("mean", lambda config, n_layers: Mean())
    slow = reference.LARES(config(backbone="mean")).eval()
    fast = lares_fast.LARES(slow.config).eval()
    fast.load_state_dict(slow.state_dict())
    seq, lengths = sequences(300)
    torch.testing.assert_close(fast.encode(seq, lengths), slow.encode(seq, lengths))


def test_attention_equals_torch():
    q, k, v = torch.randn(3, 4, 2, 7, 8, dtype=torch.float64).unbind()
    seq = torch.randint(1, 9, (4, 7))
    out = reference.attention(q, k, v, reference.attention_mask(seq, q.dtype), draw=None, dropout=0.0, step=0, layer=0)
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_feed_forward_is_the_erf_gelu():
    from lares_fast.reference.backbone import FeedForward

    layer = FeedForward(config()).double()
    x = 20 * torch.randn(2, 3, 16, dtype=torch.float64)
    u = x @ layer.up.weight.T + layer.up.bias
    gelu = u * 0.5 * (1 + torch.erf(u / 2**0.5))
    expected = torch.nn.functional.layer_norm(gelu @ layer.down.weight.T + layer.down.bias + x, (16,), eps=1e-12)
    torch.testing.assert_close(layer(x, draw=None, step=0, layer=0), expected)


@pytest.mark.parametrize(("change", "message"), [
    ({"hidden_size": 15}, "hidden_size must be a multiple of n_heads"),
    ({"adapter": "sum"}, "adapter must be one of add, concat, linear"),
    ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
    ({"n_items": 1}, "n_items must be at least 2"),
    ({"mean_depth": 0}, "mean_depth must be at least 1"),
    ({"tau": 0.0}, "tau must be greater than 0"),
    ({"depth_sampling": "none"}, "depth_sampling must be one of"),
])  # fmt: skip
def test_bad_configuration(change, message):
    with pytest.raises(InputError, match=message):
        LARESConfig(**{"n_items": N, **change})


def test_unknown_names():
    with pytest.raises(InputError, match="unknown model setting 'depth'"):
        LARESConfig.from_dict({"n_items": N, "depth": 3})
    with pytest.raises(InputError, match="preset must be one of"):
        LARESConfig.preset("huge", n_items=N)
    with pytest.raises(InputError, match=r"backbone must be one of .*transformer"):
        reference.LARES(config(backbone="rnn"))


@pytest.mark.parametrize(("seq", "length", "steps", "message"), [
    (torch.ones(2, 11, dtype=torch.long), [1, 1], 1, "L <= 10"),
    (torch.ones(2, 5, dtype=torch.long), [0, 1], 1, "drop empty histories"),
    (torch.ones(2, 5, dtype=torch.long), [6, 1], 1, r"item_seq_len must be in 1\.\.5"),
    (torch.full((2, 5), N), [1, 1], 1, "item_seq must hold ids"),
    (torch.full((2, 5), -1), [1, 1], 1, "item_seq must hold ids"),
    (torch.ones(2, 5, dtype=torch.long), [1], 1, "item_seq_len must be"),
    (torch.ones(2, 5, dtype=torch.long), [1, 1], 0, "num_steps must be at least 1"),
])  # fmt: skip
@pytest.mark.parametrize("model_class", [reference.LARES, lares_fast.LARES])
def test_bad_sequences(seq, length, steps, message, model_class):
    with pytest.raises(InputError, match=message):
        model_class(config()).encode(seq, torch.tensor(length), num_steps=steps)


@pytest.mark.parametrize("model_class", [reference.LARES, lares_fast.LARES])
def test_an_empty_batch(model_class):
    seq, lengths = torch.zeros(0, 5, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    assert model_class(config()).eval().encode(seq, lengths).shape == (0, 16)


# Name -> (item_seq, item_seq_len, the place of the first PAD inside a sequence)
PAD_INSIDE = {
    "left padding": ([[0, 0, 0, 5, 6, 7]], [6], "position 0 of sequence 0"),
    "left padding, its length not counted": ([[0, 0, 0, 5, 6, 7]], [3], "position 0 of sequence 0"),
    "between two items": ([[5, 0, 0, 0], [1, 2, 0, 4]], [1, 4], "position 2 of sequence 1"),
    "at the end": ([[1, 2, 3, 0]], [4], "position 3 of sequence 0"),
    "packed": ([5, 6, 0, 7], [0, 2, 4], "position 0 of sequence 1"),
}


@pytest.mark.parametrize("name", PAD_INSIDE)
@pytest.mark.parametrize("kind", [reference.LARES, lares_fast.LARES])
def test_a_pad_within_a_sequence_is_refused(kind, name):
    """The reference would hide the PAD from attention. Packed sequences cannot hide it."""
    *sequences, place = PAD_INSIDE[name]
    model, sequences = kind(config()).eval(), tuple(map(torch.tensor, sequences))
    for call in (model.encode, model, lambda *x: model.trajectories(*x, torch.ones(2, len(x[1]) - (x[0].dim() == 1)).long())):
        with pytest.raises(InputError, match=rf"item_seq holds PAD \(0\) inside a sequence, at {place}: "):
            call(*sequences)


def test_items_behind_a_sequence_are_not_read():
    seq, lengths = torch.tensor([[1, 2, 9, 8], [3, 0, 0, 0]]), torch.tensor([2, 1])
    model = lares_fast.LARES(config()).eval()
    assert torch.equal(model.encode(seq, lengths), model.encode(seq[:, :2], lengths))


@pytest.mark.parametrize(("change", "message"), [
    ({"item_seq": torch.ones(2, 3)}, "item_seq must be a tensor of integers, but got torch.float32"),
    ({"item_seq": [[1, 2, 3]]}, "item_seq must be a tensor of integers, but got list"),
    ({"item_seq_len": torch.tensor([1.0, 3.0])}, "item_seq_len must be a tensor of integers"),
    ({"state": torch.zeros(1, 3, 16)}, r"state must be floating-point \[2, 3, 16\]"),
    ({"state": torch.zeros(2, 3, 16).long()}, "state must be floating-point"),
    ({"draw": Draw((1, 2), torch.arange(5))}, r"draw\.rows must be int64 \[2\]"),
    ({"draw": Draw((1, 2), torch.arange(1))}, r"draw\.rows must be int64 \[2\]"),
    ({"num_steps": torch.tensor([1, 2, 3])}, r"num_steps must be an integer or int64 \[2\]"),
])  # fmt: skip
@pytest.mark.parametrize("kind", [reference.LARES, lares_fast.LARES])
def test_what_one_encoder_refuses_the_other_does_too(kind, change, message):
    model = kind(config()).eval()
    arguments = {"item_seq": torch.tensor([[1, 0, 0], [1, 2, 3]]), "item_seq_len": torch.tensor([1, 3]), **change}
    with pytest.raises(InputError, match=message):
        model.encode(arguments.pop("item_seq"), arguments.pop("item_seq_len"), **arguments)


@pytest.mark.parametrize("num_steps", [
    torch.ones(2), torch.ones(2, 3).long(), [[1, 1]], torch.ones(0, 2).long(), torch.ones(2, 2).long().to_sparse(),
    torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), torch.ones(2, 2, device="meta").long(),
])  # fmt: skip
def test_depths_of_trajectories(num_steps):
    model = lares_fast.LARES(config()).eval()
    with pytest.raises(InputError, match=r"num_steps must be"):
        model.trajectories(torch.tensor([[1, 2], [3, 0]]), torch.tensor([2, 1]), num_steps)
