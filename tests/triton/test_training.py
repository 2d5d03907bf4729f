"""Two training steps of each phase on the Triton kernels, in the interpreter, against the C++ kernels and the reference."""

import numpy as np
import pytest
import torch

import lares_fast
from lares_fast import LARESConfig, _dispatch, _native, ops, reference
from lares_fast.data import InteractionLog, leave_one_out
from lares_fast.train import RPT, SPT, RPTConfig, SPTConfig
from tests.support import oracle

pytestmark = pytest.mark.interpreted
N, B = 40, 6


def log():
    """Return a log of 12 users with 5 to 9 events each."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(5, 10, 12)
    offsets = np.concatenate(([0], lengths.cumsum()))
    return InteractionLog(
        items=draw.integers(1, N, offsets[-1]).astype(np.int32),
        offsets=offsets,
        item_ids=np.array([None, *range(1, N)], dtype=object),
        user_ids=np.arange(12),
    )


def phase_of(name, dtype, build):
    config = LARESConfig(
        n_items=N,
        max_len=6,
        inner_size=64,
        n_pre_layers=1,
        n_core_layers=1,
        dropout=0.2,
        mean_depth=2,
        tau=0.5,
        similarity="cos",
    )
    torch.manual_seed(0)
    weights = {key: value.double() for key, value in reference.LARES(config).state_dict().items()}

    def model(shift):
        made = build(config)
        made.load_state_dict({key: value + shift * torch.sin(value * 1e3) for key, value in weights.items()})
        return made.to(dtype)

    data = log()
    rows = leave_one_out(data).train
    if name == "spt":
        return SPT(model(0.0), data, rows, SPTConfig()).train()
    return RPT(model(0.0), model(0.01), data, rows, RPTConfig(group_size=2, scores="model", dropout=0.2)).train()


def two_steps(phase):
    """Return the losses and the gradients of two steps of gradient descent."""
    losses, gradients = {}, {}
    for step in range(2):
        loss = phase(phase.batch(torch.arange(step, step + B), (7, step)))
        names = dict(phase.model.named_parameters())
        found = torch.autograd.grad(loss, list(names.values()))
        losses[f"{step} loss"] = loss.detach()
        gradients |= {f"{step} {name}": gradient for name, gradient in zip(names, found, strict=True)}
        with torch.no_grad():
            for parameter, gradient in zip(names.values(), found, strict=True):
                parameter -= 0.05 * gradient
    return losses, gradients


@pytest.mark.parametrize("name", ["spt", "rpt"])
def test_two_steps_keep_the_tolerances(name, monkeypatch):
    from tests.support import triton_interpreter

    truth = two_steps(phase_of(name, torch.float64, reference.LARES))
    twin = two_steps(phase_of(name, torch.float32, reference.LARES))
    found = {}
    if _native.available()[0]:
        with ops.backend("native"):
            found["native"] = two_steps(phase_of(name, torch.float32, lares_fast.LARES))
    before = dict(_dispatch.calls)
    with triton_interpreter.interpreted(monkeypatch):
        found["triton"] = two_steps(phase_of(name, torch.float32, lambda config: lares_fast.LARES(config, backend="triton")))
    for op in ("recurrence", "recurrence_backward", "linear_cross_entropy", "linear_cross_entropy_backward"):
        assert _dispatch.calls[op, "triton"] > before.get((op, "triton"), 0)
    for result in found.values():
        oracle.check("forward", result[0], twin[0], truth[0])
        oracle.check("gradient", result[1], twin[1], truth[1])
