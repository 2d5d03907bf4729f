"""A baseline that computes what the published LARES code computes in one training step, in padded eager PyTorch.

It is written from a description of the official code, with the parameter names of ``reference.LARES``. bench_train_step.py
checks its loss and its gradients against the reference before it times them. Like the official code, the baseline does work
whose results are not used (``dead_work``):

- It computes on padding.
- It scores the catalog after every step of the anchor pass.
- It stores the softmax over the catalog of every step and trajectory, for both models.
- It pads the trajectories to the longest one.
- It builds a graph through the frozen model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lares_fast import LARESConfig

_MASKED = -10000.0


class _Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.n_heads = config.n_heads
        self.drop_probabilities, self.drop = nn.Dropout(config.dropout), nn.Dropout(config.dropout)

    def forward(self, x, mask):
        query, key, value = (
            layer(x).unflatten(-1, (self.n_heads, -1)).permute(0, 2, 1, 3) for layer in (self.query, self.key, self.value)
        )
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + mask
        context = self.drop_probabilities(scores.softmax(-1)) @ value
        return self.norm(self.drop(self.output(context.permute(0, 2, 1, 3).flatten(-2))) + x)


class _FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.inner_size)
        self.down = nn.Linear(config.inner_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.norm(self.drop(self.down(F.gelu(self.up(x)))) + x)


class _Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention, self.feed_forward = _Attention(config), _FeedForward(config)

    def forward(self, x, mask):
        return self.feed_forward(self.attention(x, mask))


class _Block(nn.Module):
    def __init__(self, config, n_layers):
        super().__init__()
        self.layers = nn.ModuleList(_Layer(config) for _ in range(n_layers))

    def forward(self, x, mask):
        for layer in self.layers:
            x = layer(x, mask)
        return x


class _Recurrence(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.core = _Block(config, config.n_core_layers)

    def forward(self, h, pre, mask):
        return self.core(self.norm((h + pre) / 2), mask)


class OfficialLARES(nn.Module):
    """The model with the ``add`` adapter. It loads the state dict of ``reference.LARES``."""

    def __init__(self, config: LARESConfig) -> None:
        super().__init__()
        self.config = config
        self.item_embedding = nn.Embedding(config.n_items, config.hidden_size, padding_idx=0)
        self.position_embedding = nn.Embedding(config.max_len, config.hidden_size)
        self.input_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pre_block = _Block(config, config.n_pre_layers)
        self.recurrence = _Recurrence(config)
        self.drop = nn.Dropout(config.dropout)

    def encode(self, item_seq: Tensor, item_seq_len: Tensor, T: int, state: Tensor | None = None) -> Tensor:
        """Return the states [B, T, D] of the last position after every step. ``state`` is h0 [B, L, D]; None draws it."""
        B, L = item_seq.shape
        positions = self.position_embedding(torch.arange(L).expand(B, L))
        x = self.drop(self.input_norm(self.item_embedding(item_seq) + positions))
        seen = (item_seq != 0)[:, None, None] & torch.ones(L, L, dtype=torch.bool).tril()
        mask = torch.where(seen, 0.0, _MASKED)
        pre = self.pre_block(x, mask)
        if state is None:
            state = nn.init.trunc_normal_(torch.empty_like(x), a=-3, b=3) * self.config.state_scale
        last = (item_seq_len - 1)[:, None, None].expand(-1, 1, x.shape[-1])
        states = []
        for _ in range(T):
            state = self.recurrence(state, pre, mask)
            states.append(state.gather(1, last))
        return torch.cat(states, 1)

    def logits(self, states: Tensor) -> Tensor:
        """Return the scores [..., N] of every item."""
        return states @ self.item_embedding.weight.T


def spt_loss(model, sequences, target, partners, depths, step_index, *, alpha, gamma, dead_work=True, states=(None,) * 3):
    """Return the loss of phase 1. ``depths`` has T of the cross-entropy pass and T of the alignment passes."""
    loss = F.cross_entropy(model.logits(model.encode(*sequences, depths[0], states[0])[:, -1]), target)
    trajectory = model.encode(*sequences, depths[1], states[1])
    if dead_work:
        model.logits(trajectory).log_softmax(-1)
    anchor, partner = trajectory[:, -1], model.encode(*partners, depths[1], states[2])[:, -1]
    tau, state = model.config.tau, trajectory[:, step_index]
    loss = loss + alpha / 2 * (info_nce(anchor, partner, tau) + info_nce(partner, anchor, tau))
    return loss + gamma / 2 * (info_nce(anchor, state, tau) + info_nce(state, anchor, tau))


def info_nce(x, y, tau):
    """Return the contrastive loss, in which every other row of the batch is a negative."""
    return F.cross_entropy(x @ y.T / tau, torch.arange(len(x)))


def rpt_loss(model, start, sequences, target, depths, *, k, beta, dead_work=True, states=None, frozen_states=None):
    """Return (the loss of phase 2, rewards [G, B]). Each T of ``depths`` is one trajectory. The reward is recall at ``k``."""
    states, frozen_states = states or [None] * len(depths), frozen_states or [None] * len(depths)
    policy, frozen, rewards = [], [], []
    for member, T in enumerate(depths):
        scores = model.logits(model.encode(*sequences, T, states[member]))
        rewards.append((scores[:, -1].detach().topk(k).indices == target[:, None]).any(1).float())
        policy.append(_rows(scores.log_softmax(-1), target, dead_work))
        with torch.set_grad_enabled(dead_work):
            scores = start.logits(start.encode(*sequences, T, frozen_states[member]))
            frozen.append(_rows(scores.log_softmax(-1), target, dead_work))
    rewards = torch.stack(rewards)
    advantage = (rewards - rewards.mean(0)) / (rewards.std(0) + 1e-4)
    policy, frozen = _stack(policy), _stack(frozen)
    valid = policy[..., 0] != 0
    chosen = target[None, :, None, None].expand(*policy.shape[:3], 1)
    if dead_work:
        policy, frozen = policy.gather(-1, chosen), frozen.gather(-1, chosen)
    logprob, ratio = policy[..., -1], frozen[..., -1] - policy[..., -1]
    objective = advantage[..., None] * (logprob - logprob.detach()).exp() - beta * (ratio.exp() - ratio - 1)
    return -((objective * valid).sum(-1) / valid.sum(-1)).mean(), rewards


def _rows(logprobs, target, whole):
    """Return the log-probabilities [B, T, N], either ``whole`` or only for the target."""
    return logprobs if whole else logprobs.gather(-1, target[:, None, None].expand(-1, logprobs.shape[1], 1))


def _stack(members):
    """Return [G, B, T, N] with zeros after each member's own steps."""
    longest = max(member.shape[1] for member in members)
    return torch.stack([F.pad(member, (0, 0, 0, longest - member.shape[1])) for member in members])
