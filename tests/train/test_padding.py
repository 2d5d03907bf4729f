"""Batches with rounded sizes: the sizes, and that fillers change no loss."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lares_fast import LARES, LARESConfig
from lares_fast._random import key_of, root_key
from lares_fast.data import Batch
from lares_fast.data.batch import Inputs
from lares_fast.train import RPT, SPT, RPTConfig, SPTConfig
from lares_fast.train.padding import EXACT, Padding, Sizes
from tests.support import train_run

PADDINGS = [EXACT, Padding(3, 16, 4, 1), Padding(40, 256, 5, 7)]


@pytest.mark.parametrize("longest", [1, 2, 3, 20])
@pytest.mark.parametrize("mean", [1.0, 9.0, 700.0, 5000.0])
@pytest.mark.parametrize("parts", [4, 16])
def test_every_number_of_missing_items_is_filled(longest, mean, parts):
    padding = Padding.of(Sizes(mean, longest, 1, 5, 5, parts), 4)
    assert padding.tokens & (padding.tokens - 1) == 0 and padding.tokens <= max(1, 2 * mean / parts)
    for n_tokens in range(500, 500 + 2 * padding.tokens):
        lengths = padding._lengths(n_tokens)
        assert len(lengths) == padding.fillers and (n_tokens + lengths.sum()) % padding.tokens == 0
        assert not len(lengths) or (lengths.min() >= 1 and lengths.max() <= longest)


def phase(kind, **model):
    torch.manual_seed(0)
    config = LARESConfig(n_items=train_run.log().n_items, **{**train_run.MODEL, "dropout": 0.3, **model})
    policy, log, rows = LARES(config).train(), train_run.log(), train_run.split().train
    if kind == "spt":
        return SPT(policy, log, rows, SPTConfig(batch_size=40))
    start = LARES(config)
    return RPT(policy, start, log, rows, RPTConfig(batch_size=40, group_size=3, k=20)).train()


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("kind", ["spt", "rpt"])
@pytest.mark.parametrize("padding", PADDINGS, ids=str)
def test_the_rows_are_those_of_the_batch(kind, padding, each):
    of = phase(kind, per_sequence_depth=each)
    index = torch.randperm(len(of.rows))[:40]
    batch, placed = of.batch(index, root_key(3)), of.places(index, root_key(3), padding)
    assert isinstance(batch.inputs, Batch)
    inputs = placed.inputs.inputs(of.log)
    assert placed.inputs.n_tokens == len(inputs.items) and placed.inputs.n_tokens % padding.tokens == 0
    assert torch.equal(inputs.items[: len(batch.inputs.items)], batch.inputs.items)
    assert torch.equal(inputs.offsets[: len(batch.inputs.offsets)], batch.inputs.offsets)
    assert inputs.target.tolist() == batch.inputs.target[:40].tolist()
    assert inputs.offsets.diff().max() <= of.model.config.max_len and inputs.items.min() > 0
    for name in ("choices",) if kind == "spt" else ("policy_pass", "start_pass"):
        one, other = getattr(batch, name), getattr(placed, name)
        real = one.num_steps.shape[1]
        assert torch.equal(other.num_steps[:, :real], one.num_steps) and (other.num_steps[:, real:] == 1).all()
        rows = other.draw.rows.view(other.num_steps.shape)
        assert torch.equal(rows[:, :real].flatten(), one.draw.rows) and len(rows.unique()) == rows.numel()
        assert key_of(other.draw.key) == one.draw.key
        assert other.deepest >= one.num_steps.max() and other.deepest % padding.depth == 0
    if kind == "rpt":
        assert len(placed.rows.order) % padding.states == 0
    assert batch.mean_depth == placed.mean_depth


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("kind", ["spt", "rpt"])
def test_fillers_change_no_bit_of_the_loss_and_its_parts(kind, each):
    """The gradient is a sum over more tokens, so it may round in another way."""
    of = phase(kind, per_sequence_depth=each)
    index, parts = torch.randperm(len(of.rows))[:40], []
    for padding in (None, *PADDINGS):
        batch = of.batch(index, root_key(3)) if padding is None else of.places(index, root_key(3), padding)
        if padding is not None:
            batch = replace(batch, inputs=batch.inputs.inputs(of.log))
        of.model.zero_grad()
        loss = of(batch)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in of.model.parameters()])
        parts.append((loss.detach(), *of.parts.values(), gradient))
    *first, gradient = parts[0]
    for *other, other_gradient in parts[1:]:
        assert all(torch.equal(x, y) for x, y in zip(first, other, strict=True))
        torch.testing.assert_close(other_gradient, gradient, rtol=1e-4, atol=1e-6)


def test_places_are_the_same_as_the_batch_on_the_host():
    log, rows = train_run.log(), train_run.split().train
    index = torch.arange(0, len(rows), 3)
    found = Padding(5, 64).places(log, rows, index, 6, len(index)).inputs(log)
    assert type(found) is Inputs
    lengths = np.minimum(rows.ends - log.offsets[rows.users], 6)[index.numpy()]
    assert found.offsets.diff()[: len(index)].tolist() == lengths.tolist()
    assert found.target.tolist() == log.items[rows.ends[index.numpy()]].tolist()
