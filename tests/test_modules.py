"""``lares_fast.LARES`` computes from parameters. If a module does more than that, it runs its modules and warns."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm

import lares_fast
from lares_fast import LARESConfig, reference
from lares_fast._random import Draw
from lares_fast.reference.recurrence import ConcatAdapter
from lares_fast.sequences import Sequences

N, L = 30, 6


class Plus(nn.Linear):
    """A subclass like the low-rank adapters of training scripts."""

    def forward(self, x):
        return super().forward(x) + x


class Shifted(nn.Module):
    def forward(self, x):
        return x + 1


def replace(path, module):
    def change(model):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module())

    return change


def at(path, act):
    return lambda model: act(model.get_submodule(path))


def own_forward(module):
    stock = module.forward
    module.forward = lambda x: 2 * stock(x)


def normalised(module):
    with torch.no_grad():
        parametrizations.weight_norm(module).parametrizations.weight.original0.mul_(3)


def state_of_ones(model):
    model.initial_state = lambda draw, length: torch.ones(len(draw.rows), length, 16)


# A factor that differs between columns: a layer norm would undo a common one.
SLOPE = torch.linspace(0, 2, 16)
FIRST, CORE = "pre_block.layers.0", "recurrence.core.layers.0"
CHANGES = {
    "a forward hook": at(f"{FIRST}.attention", lambda m: m.register_forward_hook(lambda *a: a[2] * 0)),
    "a forward pre-hook": at(f"{CORE}.feed_forward.up", lambda m: m.register_forward_pre_hook(lambda _, x: (x[0] * 3,))),
    "a hook on the embedding": at("item_embedding", lambda m: m.register_forward_hook(lambda *a: a[2] * SLOPE)),
    "a hook on a norm": at("recurrence.norm", lambda m: m.register_forward_hook(lambda *a: a[2] * 2)),
    "a hook on the adapter": at("recurrence.adapter", lambda m: m.register_forward_hook(lambda *a: a[2] * SLOPE)),
    "a subclass of Linear": replace(f"{CORE}.attention.value", lambda: Plus(16, 16)),
    "another module in a norm's place": replace("input_norm", Shifted),
    "another adapter": replace("recurrence.adapter", lambda: ConcatAdapter(16)),
    "no norm": replace(f"{CORE}.attention.norm", nn.Identity),
    "a layer more": at("pre_block.layers", lambda m: m.append(copy.deepcopy(m[0]))),
    "weights normalised": at(f"{FIRST}.attention.value", normalised),
    "a weight orthogonal": at(f"{CORE}.attention.output", parametrizations.orthogonal),
    "the spectral norm of old": at(f"{CORE}.feed_forward.down", spectral_norm),
    "a weight pruned": at(f"{FIRST}.feed_forward.up", lambda m: prune.l1_unstructured(m, "weight", 0.5)),
    "a forward of its own": at(f"{FIRST}.attention.key", own_forward),
    "no bias": at(f"{CORE}.attention.query", lambda m: m.register_parameter("bias", None)),
    "another eps": at("recurrence.norm", lambda m: setattr(m, "eps", 0.5)),
    "an embedding that renorms": at("item_embedding", lambda m: setattr(m, "max_norm", 0.01)),
    "other heads": at(f"{FIRST}.attention", lambda m: setattr(m, "n_heads", 4)),
    "a start of its own": state_of_ones,
}  # fmt: skip


LENGTHS = torch.tensor([1, 6, 3, 2, 6, 5, 4])
B = len(LENGTHS)


def sequences():
    items = torch.randint(1, N, (B, L), generator=torch.Generator().manual_seed(3))
    return torch.where(torch.arange(L) < LENGTHS[:, None], items, 0), LENGTHS


def built(change, **settings):
    """Return a reference model after ``change``. Every call gives equal weights."""
    torch.manual_seed(1)
    model = reference.LARES(LARESConfig.preset("tiny", n_items=N, max_len=L, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    change(model)
    return model


def nothing(model):
    pass


def answers(model, training=False, sequences=sequences):
    """Return (states, gradients)."""
    model.train(training)
    out = model.encode(*sequences(), num_steps=2, draw=Draw((1, 2), torch.arange(B)))
    return out.detach(), torch.autograd.grad(out.square().sum(), list(model.parameters()), allow_unused=True)


def assert_alike(found, expected):
    torch.testing.assert_close(found[0], expected[0])
    # The exact gradient of a key's bias is zero. The computed one is a rounding error of the others.
    largest = max(theirs.abs().max().item() for theirs in expected[1] if theirs is not None)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        if theirs is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 * largest)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_what_modules_do_is_done(name, training):
    slow, fast = built(CHANGES[name]), built(CHANGES[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        said = lares_fast.accelerate(fast)
        assert "encode: as before, because " in said
        assert_alike(answers(fast, training), answers(slow, training))
        assert_alike(answers(fast, training, lambda: Sequences.from_padded(*sequences())), answers(slow, training))
    plain = answers(built(nothing))[0]
    assert (answers(slow)[0] - plain).abs().max() > 1e-3, "the change has no effect, so the comparison shows nothing"


def test_a_model_that_changes_later_says_so_once():
    model = built(nothing)
    assert "encode: packed sequences" in lares_fast.accelerate(model)
    handle = model.pre_block.layers[0].attention.register_forward_hook(lambda *a: a[2] * 0)
    with pytest.warns(UserWarning, match=r"because pre_block\.layers\.0\.attention has a forward hook"):
        answers(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answers(model)
        handle.remove()
        answers(model)


def test_a_hook_on_all_modules_is_called():
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        model = built(nothing)
        with pytest.warns(UserWarning, match="because there is a hook on all modules"):
            lares_fast.accelerate(model)
        answers(model)
    finally:
        handle.remove()
    assert "SelfAttention" in seen


def share_layers(model):
    model.pre_block.layers[1] = model.pre_block.layers[0]


def share_weights(model):
    first, second = model.recurrence.core.layers
    second.attention.query.weight = first.attention.query.weight
    second.feed_forward = first.feed_forward


def share_blocks(model):
    model.recurrence.core = model.pre_block


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("share", [share_layers, share_weights, share_blocks])
def test_shared_parameters_are_used_wherever_they_stand(share, training):
    layers = {"n_pre_layers": 2, "n_core_layers": 2}
    slow, fast = built(share, **layers), built(share, **layers)
    assert "encode: packed sequences" in lares_fast.accelerate(fast)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_alike(answers(fast, training), answers(slow, training))


class Started(lares_fast.LARES):
    def initial_state(self, draw, length):
        return torch.ones(len(draw.rows), length, self.config.hidden_size)


def test_a_subclass_that_starts_elsewhere_does():
    model = Started(built(nothing).config)
    model.load_state_dict(built(nothing).state_dict())
    with pytest.warns(UserWarning, match="because its method initial_state was replaced"):
        found = answers(model)
    assert_alike(found, answers(built(state_of_ones)))


def test_gradients_reach_hooks_of_parameters():
    model = built(nothing)
    lares_fast.accelerate(model)
    seen = []
    model.pre_block.layers[0].attention.query.weight.register_hook(lambda grad: seen.append(grad.clone()))
    model.encode(*sequences(), num_steps=2).sum().backward()
    assert len(seen) == 1
