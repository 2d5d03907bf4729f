"""One training step of each phase, forward and backward: the padded reference against the model users build."""

import copy

import pytest
import torch
from cases import N, draw, models, sequences

from lares_fast import reference

L = 20


def loss_and_gradient(model, loss):
    model.zero_grad(set_to_none=True)
    total = loss(model)
    total.backward()
    return total.detach(), model.item_embedding.weight.grad


def check(slow, fast, loss):
    a, b = loss_and_gradient(slow, loss), loss_and_gradient(fast, loss)
    torch.testing.assert_close(a[0], b[0], rtol=1e-4, atol=1e-5)
    assert (a[1] - b[1]).norm() <= 1e-3 * a[1].norm()


@pytest.mark.parametrize("kind", ["short", "full"])
def test_spt_step(compare, kind, B=256, T=5):
    slow, fast = (model.train() for model in models())
    batch, partners = sequences(kind, B, L), sequences(kind, B, L)
    target = torch.randint(1, N, (B,), generator=torch.Generator().manual_seed(3))
    passes = tuple(reference.Pass(T, draw(i, B)) for i in range(3))

    def loss(model):
        return reference.spt_loss(model, batch, target, partners, passes, 2, alpha=0.1, gamma=0.5).total

    check(slow, fast, loss)
    candidates = {
        "reference, padded": lambda: loss_and_gradient(slow, loss),
        "lares_fast": lambda: loss_and_gradient(fast, loss),
    }
    compare("spt step", f"{kind} B{B} L{L} T{T} N{N} 2+2 layers", candidates, "loss 1e-5, item gradient 1e-3", rounds=3)


@pytest.mark.parametrize("kind", ["short", "full"])
def test_rpt_step(compare, kind, B=64, depths=(3, 8, 5, 4)):
    slow, fast = models()
    for model in (slow, fast):
        model.set_dropout(0.1)
        model.train()
    batch = sequences(kind, B, L)
    target = torch.randint(1, N, (B,), generator=torch.Generator().manual_seed(3))
    policy = [reference.Pass(T, draw(i, B)) for i, T in enumerate(depths)]
    frozen = [reference.Pass(T, draw(10 + i, B)) for i, T in enumerate(depths)]
    starts = {id(model): copy.deepcopy(model).eval() for model in (slow, fast)}

    def loss(model):
        start = starts[id(model)]
        return reference.rpt_loss(model, start, batch, target, policy, frozen, k=10, beta=1.0, reward="recall").total

    check(slow, fast, loss)
    candidates = {
        "reference, padded": lambda: loss_and_gradient(slow, loss),
        "lares_fast": lambda: loss_and_gradient(fast, loss),
    }
    compare("rpt step", f"{kind} B{B} G4 L{L} N{N} 2+2 layers", candidates, "loss 1e-5, item gradient 1e-3", rounds=3)
