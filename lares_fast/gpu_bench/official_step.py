"""Training steps of the official way, eager or compiled, on the batches of a phase of ``lares_fast.train``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from lares_fast import LARESConfig, reference
from lares_fast.gpu_bench import official
from lares_fast.gpu_bench.candidates import BF16
from lares_fast.gpu_bench.machine import Machine
from lares_fast.train import RPTConfig, SPTConfig
from lares_fast.train.rpt import RPTBatch
from lares_fast.train.spt import SPTBatch

MODES = ("default", "reduce-overhead", "max-autotune")
Padded = tuple[Tensor, Tensor]
# The weights of the model in training and of the frozen model of phase ``rpt``.
Weights = tuple[dict[str, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Inputs:
    """A padded batch on the device. ``states`` holds h0 of each pass; ``None`` draws it in every step."""

    sequences: Padded
    target: Tensor
    depths: tuple[int, ...]
    states: Sequence[Tensor | None]
    # Phase 1 only.
    partners: Padded | None = None
    step_index: int = 0


def depths_of(batch: SPTBatch[Any] | RPTBatch[Any]) -> tuple[int, ...]:
    """Return T of each pass over the rows of ``batch``, of which all rows have the same T."""
    passes = batch.choices if isinstance(batch, SPTBatch) else batch.policy_pass
    return tuple(torch.as_tensor(passes.num_steps).view(-1, len(batch))[:, 0].tolist())


def inputs_of(batch: SPTBatch[Any] | RPTBatch[Any], model: reference.LARES, device: torch.device, *, fixed: bool) -> Inputs:
    """Return the padded form of ``batch`` on ``device``. With ``fixed``, h0 has the numbers that the batch addresses."""
    L, B, depths = model.config.max_len, len(batch), depths_of(batch)
    items, lengths = (x.to(device).split(B) for x in batch.inputs.sequences.padded(L))
    target, own = batch.inputs.target[:B].to(device), (items[0], lengths[0])
    states: list[Tensor | None] = []
    for one in (batch.choices,) if isinstance(batch, SPTBatch) else (batch.policy_pass, batch.start_pass):
        assert one.draw is not None
        states += model.initial_state(one.draw, L).to(device).split(B) if fixed else [None] * len(depths)
    if not isinstance(batch, SPTBatch):
        return Inputs(own, target, depths, states)
    # The states that the loss reads: the last ones of three passes, and those of an earlier step of the anchors.
    anchor, earlier = int(batch.rows.chosen[B]), int(batch.rows.chosen[3 * B])
    return Inputs(own, target, depths, states, (items[2], lengths[2]), depths[1] - 1 - (anchor - earlier))


class OfficialStep:
    """A step of the official way with Adam. Each call takes the next of ``inputs``.

    ``mode`` is a mode of :func:`torch.compile`, or empty for eager PyTorch. ``bf16`` runs the forward under autocast.
    """

    def __init__(
        self,
        machine: Machine,
        config: LARESConfig,
        settings: SPTConfig | RPTConfig,
        weights: Weights,
        inputs: Sequence[Inputs],
        *,
        mode: str = "",
        bf16: bool = False,
        dead_work: bool = False,
    ) -> None:
        self.device, self.settings, self.bf16, self.dead_work = machine.device, settings, bf16, dead_work
        self.model, self.start = (official.OfficialLARES(config) for _ in range(2))
        for model, values in zip((self.model, self.start), weights, strict=True):
            model.load_state_dict(values)
            model.to(machine.device)
            if mode:
                official.compile_parts(model, mode)
        self.start.eval().requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3, fused=not machine.rehearse)
        compiled = partial(torch.compile, mode=mode, dynamic=False) if mode else lambda head: head
        self._heads = compiled(official.spt_head), compiled(official.rpt_head)
        self._inputs, self._together = cycle(inputs), bool(mode)

    def loss(self) -> Tensor:
        """Return the loss of the next batch."""
        batch, settings = next(self._inputs), self.settings
        torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(self.device.type, BF16, enabled=self.bf16):
            if isinstance(settings, SPTConfig):
                assert batch.partners is not None
                return official.spt_loss(
                    self.model,
                    batch.sequences,
                    batch.target,
                    batch.partners,
                    batch.depths,
                    batch.step_index,
                    alpha=settings.alpha,
                    gamma=settings.gamma,
                    dead_work=self.dead_work,
                    states=batch.states,
                    head=self._heads[0],
                )
            G = len(batch.depths)
            loss, _ = official.rpt_loss(
                self.model,
                self.start,
                batch.sequences,
                batch.target,
                batch.depths,
                k=settings.k,
                beta=settings.beta,
                dead_work=self.dead_work,
                states=batch.states[:G],
                frozen_states=batch.states[G:],
                head=self._heads[1],
                # A compiled head would be compiled again for every T.
                together=self._together,
            )
            return loss

    def gradients(self) -> list[Tensor]:
        """Return the loss and the gradient of each parameter, by name."""
        return loss_and_gradients(self.model, self.loss())

    def __call__(self) -> Tensor:
        """Make a step and return its loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def loss_and_gradients(model: torch.nn.Module, loss: Tensor) -> list[Tensor]:
    """Return ``loss`` and its gradient for each parameter of ``model``, in the order of their names."""
    loss.backward()
    gradients = [parameter.grad for _, parameter in sorted(model.named_parameters())]
    return [loss.detach(), *(gradient for gradient in gradients if gradient is not None)]
