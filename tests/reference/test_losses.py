"""The two losses in cases that the golden files do not have."""

import copy

import pytest
import torch

from lares_fast import LARESConfig, reference
from lares_fast._errors import InputError
from lares_fast._random import Draw
from lares_fast.reference import Pass

N, L, B = 60, 10, 24


def setup(**changes):
    model = reference.LARES(LARESConfig.preset("tiny", n_items=N, **changes)).train()
    lengths = torch.randint(1, L + 1, (B,))
    seq = torch.where(torch.arange(L) < lengths[:, None], torch.randint(1, N, (B, L)), 0)
    return model, (seq, lengths), torch.randint(1, N, (B,))


def passes(*depths, key=1):
    return [Pass(T, Draw((key, i), torch.arange(B))) for i, T in enumerate(depths)]


def test_a_single_step_has_no_step_level_term():
    model, sequences, target = setup()
    loss = reference.spt_loss(model, sequences, target, sequences, tuple(passes(3, 1, 1)), 0, alpha=0.1, gamma=0.5)
    assert loss.step == 0
    assert loss.total == loss.cross_entropy + loss.trajectory
    deeper = reference.spt_loss(model, sequences, target, sequences, tuple(passes(3, 2, 2)), 0, alpha=0.1, gamma=0.5)
    assert deeper.step > 0


@pytest.mark.parametrize(("alpha", "gamma", "encoded"), [(0.1, 0.5, 3), (0.1, 0.0, 3), (0.0, 0.5, 2), (0.0, 0.0, 1)])
def test_a_term_of_weight_0_costs_no_pass(alpha, gamma, encoded, monkeypatch):
    model, sequences, target = setup()
    three = tuple(passes(3, 2, 2))
    whole = reference.spt_loss(model, sequences, target, sequences, three, 0, alpha=0.1, gamma=0.5)
    made, encode = [], model.encode
    monkeypatch.setattr(model, "encode", lambda *args, **kwargs: made.append(kwargs) or encode(*args, **kwargs))
    loss = reference.spt_loss(model, sequences, target, sequences, three, 0, alpha=alpha, gamma=gamma)
    assert len(made) == encoded
    assert loss.cross_entropy == whole.cross_entropy
    assert loss.trajectory == (whole.trajectory if alpha else 0)
    assert loss.step == (whole.step if gamma else 0)
    assert loss.total == loss.cross_entropy + loss.trajectory + loss.step


def test_the_last_step_is_its_own_best_match():
    """The official code may draw the last step. Then s == a, and each NCE has its smallest value for the batch."""
    model, sequences, target = setup(similarity="cos", tau=0.07)
    three = tuple(passes(1, 4, 4))
    last = reference.spt_loss(model, sequences, target, sequences, three, 3, alpha=0.1, gamma=0.5)
    first = reference.spt_loss(model, sequences, target, sequences, three, 0, alpha=0.1, gamma=0.5)
    assert last.step < first.step


def group(*depths, key=1):
    """Return G passes. A depth is one integer, or one for each row."""
    num_steps = torch.stack([torch.as_tensor(T).expand(B) for T in depths])
    return Pass(num_steps, Draw((key, 0), torch.arange(len(depths) * B)))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_linear_cross_entropy_equals_torch(reduction):
    hidden, items = torch.randn(5, 8, dtype=torch.float64), torch.randn(30, 8, dtype=torch.float64)
    target = torch.randint(0, 30, (5,))
    ours = reference.linear_cross_entropy(hidden, items, target, reduction=reduction)
    torch.testing.assert_close(ours, torch.nn.functional.cross_entropy(hidden @ items.T, target, reduction=reduction))


def test_rewards():
    rank = torch.tensor([0, 1, 9, 10, 500])
    assert reference.ranking_reward(rank, 10, "recall").tolist() == [1, 1, 1, 0, 0]
    torch.testing.assert_close(
        reference.ranking_reward(rank, 10, "ndcg"), torch.tensor([1.0, 1 / 1.5849625, 1 / 3.4594316, 0.0, 0.0])
    )


def test_equal_rewards_leave_only_the_kl():
    assert not reference.group_advantage(torch.ones(4, 3)).any()
    advantage = reference.group_advantage(torch.tensor([[1.0], [0.0], [0.0], [0.0]]))
    torch.testing.assert_close(advantage[:, 0], torch.tensor([0.75, -0.25, -0.25, -0.25]) / (0.5 + 1e-4))


def test_shared_noise_removes_the_kl_floor():
    model, sequences, target = setup(dropout=0.0)
    frozen = copy.deepcopy(model).eval()
    arguments = {"k": 10, "beta": 1.0, "reward": "recall"}
    shared = reference.rpt_loss(model, frozen, sequences, target, group(2, 3), group(2, 3), **arguments)
    assert shared.kl.abs() < 1e-6
    own = reference.rpt_loss(model, frozen, sequences, target, group(2, 3), group(2, 3, key=9), **arguments)
    assert own.kl > 1e-4
    own.total.backward()
    assert all(p.grad is None for p in frozen.parameters())


@pytest.mark.parametrize("similarity", ["dot", "cos"])
@pytest.mark.parametrize("scores", ["dot", "model"])
def test_rpt_rewards_and_weighs_by_the_scores_asked_for(similarity, scores):
    model, sequences, target = setup(dropout=0.0, similarity=similarity, tau=0.07)
    model, frozen = model.double(), copy.deepcopy(model).double().eval()
    depth, k, beta = torch.tensor([3, 1])[:, None].expand(-1, B), 10, 0.5
    ours, theirs = (Pass(depth, Draw((1, key), torch.arange(2 * B))) for key in (2, 3))
    with torch.no_grad():
        # Cosines do not depend on this factor.
        model.item_embedding.weight[:30] *= 3.0

    def logits(of, trajectories):
        states, items = trajectories.trajectories(of, sequences), of.item_embedding.weight
        if (similarity, scores) == ("cos", "model"):
            states, items = torch.nn.functional.normalize(states, dim=-1) / 0.07, torch.nn.functional.normalize(items, dim=-1)
        # [(3 + 1) * B, N]: the steps of a trajectory are together.
        return states @ items.T

    steps = [slice(3 * b, 3 * b + 3) for b in range(B)], [slice(3 * B + b, 3 * B + b + 1) for b in range(B)]
    policy, anchor = logits(model, ours), logits(frozen, theirs).detach()
    rewards = torch.stack(
        [
            torch.stack([(policy[own[b]][-1] > policy[own[b]][-1, target[b]]).sum() < k for b in range(B)]).double()
            for own in steps
        ]
    )
    advantage, gain = reference.group_advantage(rewards), []
    for g, own in enumerate(steps):
        for b in range(B):
            lp = policy[own[b]].log_softmax(-1)[:, target[b]]
            ratio = anchor[own[b]].log_softmax(-1)[:, target[b]] - lp
            gain.append((advantage[g, b] * (lp - lp.detach()).exp() - beta * (ratio.exp() - ratio - 1)).mean())
    expected = -torch.stack(gain).mean()
    loss = reference.rpt_loss(model, frozen, sequences, target, ours, theirs, k=k, beta=beta, reward="recall", scores=scores)
    assert torch.equal(loss.rewards.double(), rewards)
    assert 0 < rewards.mean() < 1
    torch.testing.assert_close(loss.total, expected)
    parameters = list(model.parameters())
    for got, wanted in zip(torch.autograd.grad(loss.total, parameters), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(got, wanted)


def test_depths_of_their_own_average_over_own_steps():
    model, sequences, target = setup(dropout=0.0)
    frozen = copy.deepcopy(model).eval()
    arguments = {"k": 10, "beta": 1.0, "reward": "ndcg"}
    depth = torch.where(torch.arange(B) < B // 2, 2, 5)
    uniform = reference.rpt_loss(model, frozen, sequences, target, group(5, 5), group(5, 5, key=9), **arguments)
    loss = reference.rpt_loss(model, frozen, sequences, target, group(depth, depth), group(depth, depth, key=9), **arguments)
    torch.testing.assert_close(loss.rewards[:, B // 2 :], uniform.rewards[:, B // 2 :])
    assert torch.isfinite(loss.total)
    assert loss.total != uniform.total


@pytest.mark.parametrize("deepest", [None, 9])
def test_rows_of_weight_0_change_no_bit_of_the_loss(deepest):
    """Fillers are more sequences in the passes, and more rows in the tables."""
    model, (seq, lengths), target = setup(dropout=0.0)
    frozen = copy.deepcopy(model).eval()
    arguments = {"k": 10, "beta": 1.0, "reward": "ndcg"}
    depth = torch.randint(1, 6, (3, B))

    def loss(fillers, size=None):
        filled = seq[:fillers] * 0 + 1, lengths[:fillers] * 0 + 1
        sequences = tuple(torch.cat((own, more)) for own, more in zip((seq, lengths), filled, strict=True))
        every = torch.cat((depth, depth.new_ones(3, fillers)), 1)
        rows = torch.cat((torch.arange(3 * B).view(3, B), torch.zeros(3, fillers, dtype=torch.int64)), 1).flatten()
        policy, anchor = (Pass(every, Draw((1, key), rows), deepest=deepest) for key in (2, 3))
        first = (every.flatten().cumsum(0) - every.flatten()).view_as(every)[:, :B]
        tables = reference.rpt_rows(depth, first, size)
        return reference.rpt_loss(model, frozen, sequences, target, policy, anchor, **arguments, rows=tables)

    plain = loss(0)
    for filled in (loss(5), loss(5, size=int(depth.sum()) + 7)):
        assert torch.equal(filled.rewards, plain.rewards)
        # Another number of rows may choose another product of matrices.
        torch.testing.assert_close(filled.total, plain.total, rtol=1e-6, atol=0)
    with pytest.raises(InputError, match="size must be at least"):
        loss(0, size=3)


def test_tables_name_each_step_once_and_last_steps_first():
    depth = torch.tensor([[2, 1], [3, 1]])
    order, owner, weight = reference.rpt_rows(depth, size=9)
    assert order.tolist() == [1, 2, 5, 6, 0, 3, 4, 1, 1]
    assert owner.tolist() == [0, 1, 2, 3, 0, 2, 2, 0, 0]
    torch.testing.assert_close(weight, torch.tensor([1 / 2, 1, 1 / 3, 1, 1 / 2, 1 / 3, 1 / 3, 0, 0], dtype=torch.float64))


def test_trajectories_with_a_bound_end_in_rows_of_0():
    model, sequences, _ = setup(dropout=0.0)
    depth, draw = torch.randint(1, 5, (2, B)), Draw((1, 2), torch.arange(2 * B))
    plain = model.trajectories(*sequences, depth, draw=draw)
    bounded = model.trajectories(*sequences, depth, draw=draw, deepest=6)
    assert torch.equal(bounded[: len(plain)], plain)
    assert bounded.shape[0] == 2 * B * 6 and not bounded[len(plain) :].any()
    with pytest.raises(InputError, match="num_steps must be at least 1 and at most 2"):
        model.trajectories(*sequences, depth + 2, draw=draw, deepest=2)


@pytest.mark.parametrize(("change", "message"), [
    ({"reward": "mrr"}, "reward must be one of recall, ndcg, but got 'mrr'"),
    ({"scores": "cos"}, "scores must be one of dot, model, but got 'cos'"),
    ({"passes": (3,)}, r"num_steps must be \[G, B\] with G at least 2"),
])  # fmt: skip
def test_an_unknown_reward_is_not_taken_for_another(change, message):
    model, sequences, target = setup(dropout=0.0)
    trajectories = group(*change.pop("passes", (2, 3)))
    arguments = {"k": 10, "beta": 1.0, "reward": "recall", **change}
    with pytest.raises(InputError, match=message):
        reference.rpt_loss(model, copy.deepcopy(model).eval(), sequences, target, trajectories, trajectories, **arguments)
