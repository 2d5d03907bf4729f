"""Planted bugs. The golden checks must find each of them, or the checks prove nothing."""

from importlib import import_module
from pathlib import Path

import pytest
import torch

from lares_fast import reference
from tests.support import golden_file

# In the package, functions have the names of some of these modules.
attention, backbone, model, recurrence, rpt, spt, target_rank = (
    import_module(f"lares_fast.reference.{name}")
    for name in ("attention", "backbone", "model", "recurrence", "rpt", "spt", "target_rank")
)

GOLDEN = Path(__file__).parent / "golden"
ADD, CONCAT, LINEAR = "lares_add_dot", "lares_concat_cos", "lares_linear_dot"


def plant(owner, name, value):
    return lambda monkeypatch: monkeypatch.setattr(owner, name, value)


def plant_in_head(name, function):
    """Plant ``function`` in the head of the reference, which the losses call."""
    return plant(model, "REFERENCE_HEAD", model.REFERENCE_HEAD._replace(**{name: function}))


def no_step_norm(self, h, pre, mask, depth, *, draw):
    for step in range(1, int(depth.max()) + 1):
        h = self.core(self.adapter(h, pre), mask, draw=draw, step=step)
        yield h


def see_the_future(item_seq, dtype):
    return torch.where(item_seq != 0, 0.0, -torch.inf).to(dtype)[:, None, None, :]


def skip_pad(hidden, items, target, **_):
    return reference.target_logprob(hidden, items, target, skip_pad=True)


def detached_anchor(model, x, y):
    return reference.info_nce(model, x.detach(), y)


def ranks_off_by_one(hidden, items, target, *, ties, ranked):
    logprob, rank = reference.target_logprob_and_rank(hidden, items, target, ties=ties, ranked=ranked)
    return logprob, rank + 1


BUGS = {
    "adapter weighs the state twice": (
        golden_file.check_forward, ADD, plant(recurrence.AddAdapter, "forward", lambda self, h, pre: (2 * h + pre) / 3)),
    "concat puts the state last": (
        golden_file.check_forward, CONCAT,
        plant(recurrence.ConcatAdapter, "forward", lambda self, h, pre: self.linear(torch.cat((pre, h), -1)))),
    "gate is swapped": (
        golden_file.check_forward, LINEAR,
        plant(recurrence.LinearAdapter, "forward", lambda self, h, pre: h + (pre - h) * self.gate.sigmoid())),
    "no LayerNorm before the core": (golden_file.check_forward, ADD, plant(recurrence.Recurrence, "forward", no_step_norm)),
    "attention sees the future": (golden_file.check_forward, ADD, plant(model, "attention_mask", see_the_future)),
    "relu instead of gelu": (golden_file.check_forward, ADD, plant(backbone.F, "gelu", torch.relu)),
    "PAD left out of the softmax": (
        golden_file.check_logprobs, ADD, plant(golden_file, "target_logprob", skip_pad)),
    "cosine forgotten in the alignment": (
        golden_file.check_spt, CONCAT, plant(reference.LARES, "normalise", lambda self, x: x)),
    "alignment's anchor gets no gradient": (golden_file.check_spt, ADD, plant(spt, "info_nce", detached_anchor)),
    "biased standard deviation": (
        lambda golden: golden_file.check_rpt(golden, "recall"), ADD,
        plant(rpt, "group_advantage", lambda r: (r - r.mean(0)) / (r.std(0, unbiased=False) + 1e-4))),
    "no advantage at all": (
        lambda golden: golden_file.check_rpt(golden, "recall"), ADD, plant(rpt, "group_advantage", torch.zeros_like)),
    "ranks off by one": (
        lambda golden: golden_file.check_rpt(golden, "ndcg"), ADD,
        plant_in_head("target_logprob_and_rank", ranks_off_by_one)),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_is_caught(bug, monkeypatch):
    check, file, plant_bug = BUGS[bug]
    golden = golden_file.Golden(GOLDEN / f"{file}.npz")
    check(golden)
    plant_bug(monkeypatch)
    with pytest.raises(AssertionError):
        check(golden)


def test_a_target_that_outranks_itself_by_rounding_is_caught(monkeypatch):
    """If the target's score is summed in another order, a model whose scores are all equal gets better ranks by rounding."""
    query, items = torch.randn(64, 64), torch.randn(1, 64).expand(500, 64).contiguous()
    target = torch.arange(64) + 100
    assert torch.equal(reference.target_rank(query, items, target), target)

    def other_order(query, items, target, *, ties="order"):
        own = (query * items[target]).sum(1)
        return target_rank.outranking(query @ items.T, 0, target, own, ties=ties).sum(1)

    assert not torch.equal(other_order(query, items, target), target)
