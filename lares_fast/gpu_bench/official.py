"""A baseline that computes what the published LARES code computes in one training step, in padded eager PyTorch.

It is written from a description of the official code, with the parameter names of ``reference.LARES``. Every benchmark
checks its loss and its gradients against the reference before it times them. Like the official code, the baseline does work
whose results are not used (``dead_work``):

- It computes on padding.
- It scores the catalog after every step of the anchor pass.
- It stores the softmax over the catalog of every step and trajectory, for both models.
- It pads the trajectories to the longest one.
- It builds a graph through the frozen model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lares_fast import LARESConfig

_MASKED = -10000.0


class _Attention(nn.Module):
    def __init__(self, config: LARESConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.n_heads = config.n_heads
        self.drop_probabilities, self.drop = nn.Dropout(config.dropout), nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (self.n_heads, -1)).permute(0, 2, 1, 3) for layer in (self.query, self.key, self.value)
        )
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + mask
        context = self.drop_probabilities(scores.softmax(-1)) @ value
        out: Tensor = self.norm(self.drop(self.output(context.permute(0, 2, 1, 3).flatten(-2))) + x)
        return out


class _FeedForward(nn.Module):
    def __init__(self, config: LARESConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.inner_size)
        self.down = nn.Linear(config.inner_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.drop(self.down(F.gelu(self.up(x)))) + x)
        return out


class _Layer(nn.Module):
    def __init__(self, config: LARESConfig) -> None:
        super().__init__()
        self.attention, self.feed_forward = _Attention(config), _FeedForward(config)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = self.feed_forward(self.attention(x, mask))
        return out


class _Block(nn.Module):
    def __init__(self, config: LARESConfig, n_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(config) for _ in range(n_layers))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask)
        return x


class _Recurrence(nn.Module):
    def __init__(self, config: LARESConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.core = _Block(config, config.n_core_layers)

    def forward(self, h: Tensor, pre: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = self.core(self.norm((h + pre) / 2), mask)
        return out


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
        device = item_seq.device
        positions = self.position_embedding(torch.arange(L, device=device).expand(B, L))
        x = self.drop(self.input_norm(self.item_embedding(item_seq) + positions))
        seen = (item_seq != 0)[:, None, None] & torch.ones(L, L, dtype=torch.bool, device=device).tril()
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


def compile_parts(model: OfficialLARES, mode: str) -> None:
    """Compile the pre-block and the step of ``model`` in place, with the ``mode`` of :func:`torch.compile`.

    Training draws another T for every batch, so a compiled loop over T steps would be compiled again and again.
    """
    for part in (model.pre_block, model.recurrence):
        part.compile(mode=mode, dynamic=False)


def spt_loss(
    model: OfficialLARES,
    sequences: tuple[Tensor, Tensor],
    target: Tensor,
    partners: tuple[Tensor, Tensor],
    depths: Sequence[int],
    step_index: int,
    *,
    alpha: float,
    gamma: float,
    dead_work: bool = True,
    states: Sequence[Tensor | None] = (None,) * 3,
    head: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Return the loss of phase 1. ``depths`` has T of the cross-entropy pass and T of the alignment passes.

    ``head`` computes it from the states. The default is :func:`spt_head`.
    """
    last = model.encode(*sequences, depths[0], states[0])[:, -1]
    trajectory = model.encode(*sequences, depths[1], states[1])
    if dead_work:
        model.logits(trajectory).log_softmax(-1)
    partner = model.encode(*partners, depths[1], states[2])[:, -1]
    given = last, model.item_embedding.weight, target, trajectory[:, -1], trajectory[:, step_index], partner
    return (head or spt_head)(*given, tau=model.config.tau, alpha=alpha, gamma=gamma)


def spt_head(
    last: Tensor,
    items: Tensor,
    target: Tensor,
    anchor: Tensor,
    state: Tensor,
    partner: Tensor,
    *,
    tau: float,
    alpha: float,
    gamma: float,
) -> Tensor:
    """Return the loss of phase 1 from the states [B, D] that it needs and the item table [N, D]."""
    loss = F.cross_entropy(last @ items.T, target)
    loss = loss + alpha / 2 * (info_nce(anchor, partner, tau) + info_nce(partner, anchor, tau))
    return loss + gamma / 2 * (info_nce(anchor, state, tau) + info_nce(state, anchor, tau))


def info_nce(x: Tensor, y: Tensor, tau: float) -> Tensor:
    """Return the contrastive loss, in which every other row of the batch is a negative."""
    return F.cross_entropy(x @ y.T / tau, torch.arange(len(x), device=x.device))


def rpt_loss(
    model: OfficialLARES,
    start: OfficialLARES,
    sequences: tuple[Tensor, Tensor],
    target: Tensor,
    depths: Sequence[int],
    *,
    k: int,
    beta: float,
    dead_work: bool = True,
    states: Sequence[Tensor | None] | None = None,
    frozen_states: Sequence[Tensor | None] | None = None,
    head: Callable[..., Tensor] | None = None,
    together: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return (the loss of phase 2, rewards [G, B]). Each T of ``depths`` is one trajectory. The reward is recall at ``k``.

    ``head`` computes log-probabilities from states. The default is :func:`rpt_head`. With ``together`` it gets the states of
    all trajectories at once, which needs ``dead_work=False``.
    """
    states, frozen_states = states or [None] * len(depths), frozen_states or [None] * len(depths)

    def logprobs_of(trajectories: list[Tensor], items: Tensor) -> list[Tensor]:
        if not together:
            return [(head or rpt_head)(trajectory, items, target, dead_work) for trajectory in trajectories]
        every = torch.cat([trajectory.flatten(0, 1) for trajectory in trajectories])
        wanted = torch.cat([target.repeat_interleave(T) for T in depths])
        parts = (head or rpt_head)(every[:, None], items, wanted, False).split([T * len(target) for T in depths])
        return [part.view(len(target), T, 1) for part, T in zip(parts, depths, strict=True)]

    trajectories = [model.encode(*sequences, T, state) for T, state in zip(depths, states, strict=True)]
    policy = logprobs_of(trajectories, model.item_embedding.weight)
    with torch.no_grad():
        best = [model.logits(trajectory[:, -1]).topk(k).indices for trajectory in trajectories]
        rewards = torch.stack([(items == target[:, None]).any(1).float() for items in best])
    with torch.set_grad_enabled(dead_work):
        trajectories = [start.encode(*sequences, T, state) for T, state in zip(depths, frozen_states, strict=True)]
        frozen = logprobs_of(trajectories, start.item_embedding.weight)
    advantage = (rewards - rewards.mean(0)) / (rewards.std(0) + 1e-4)
    logprobs, reference = _stack(policy), _stack(frozen)
    valid = logprobs[..., 0] != 0
    chosen = target[None, :, None, None].expand(*logprobs.shape[:3], 1)
    if dead_work:
        logprobs, reference = logprobs.gather(-1, chosen), reference.gather(-1, chosen)
    logprob, ratio = logprobs[..., -1], reference[..., -1] - logprobs[..., -1]
    objective = advantage[..., None] * (logprob - logprob.detach()).exp() - beta * (ratio.exp() - ratio - 1)
    return -((objective * valid).sum(-1) / valid.sum(-1)).mean(), rewards


def rpt_head(states: Tensor, items: Tensor, target: Tensor, whole: bool) -> Tensor:
    """Return the log-probabilities [B, T, N] of ``states`` [B, T, D], either ``whole`` or only for the target."""
    logprobs = (states @ items.T).log_softmax(-1)
    return logprobs if whole else logprobs.gather(-1, target[:, None, None].expand(-1, logprobs.shape[1], 1))


def _stack(members: Sequence[Tensor]) -> Tensor:
    """Return [G, B, T, N] with zeros after each member's own steps."""
    longest = max(member.shape[1] for member in members)
    return torch.stack([F.pad(member, (0, 0, 0, longest - member.shape[1])) for member in members])
