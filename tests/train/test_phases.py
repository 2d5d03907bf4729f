"""The step of phase 2: its reward ranks on the op, and is the reference's."""

import copy

import pytest
import torch

import lares_fast
from lares_fast import LARESConfig, _dispatch, ops
from lares_fast._random import root_key
from lares_fast.train import RPTConfig
from lares_fast.train.rpt import RPT
from tests.support import train_run
from tests.support.catalog_cases import BACKENDS


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_reward_ranks_on_the_op(backend):
    log, rows = train_run.log(), train_run.split().valid
    model = lares_fast.LARES(LARESConfig(n_items=log.n_items, **train_run.MODEL))
    torch.nn.init.normal_(model.item_embedding.weight)
    phase = RPT(model, copy.deepcopy(model), log, rows, RPTConfig(batch_size=30, group_size=3, k=20))
    batch = phase.batch(torch.arange(30), root_key(2))
    with ops.backend("reference"):
        expected, _ = phase(batch)
    with ops.backend(backend):
        before = _dispatch.calls["linear_cross_entropy", backend]
        loss, parts = phase(batch)
        after = _dispatch.calls["linear_cross_entropy", backend]
    assert after == before + 3, "the policy's last steps with their ranks, its other steps, and the start model's steps"
    torch.testing.assert_close(loss, expected)
    assert parts["reward"] > 0
    loss.backward()
    assert model.item_embedding.weight.grad.abs().sum() > 0
