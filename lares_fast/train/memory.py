"""Estimate the memory of a GPU that a phase needs, before its first step."""

from __future__ import annotations

import sys

import torch

from lares_fast._errors import InputError
from lares_fast.config import LARESConfig
from lares_fast.train.config import needs_start
from lares_fast.train.device_log import DeviceLog
from lares_fast.train.phases import Phase
from lares_fast.train.run import Run

# The most rows times parts of the softmax whose gradients are summed after its kernel.
_SOFTMAX_ROWS = 2**16
_NUMBER = 4


def require_memory(run: Run, phase: Phase) -> int:
    """Return the free bytes of the GPU of ``run``. Raises :class:`InputError` if the estimate for ``phase`` is larger."""
    free = free_bytes(run.device)
    parameters = sum(value.numel() for value in run.model.parameters())
    needed = _bytes_of_weights(parameters, needs_start(phase.name)) + _bytes_of_a_step(run.model.config, phase)
    needed += DeviceLog.size(run.log, free)
    if needed > free:
        name, size = f"{phase.name}.batch_size", phase.settings.batch_size
        raise InputError(
            f"phase {phase.name} needs about {needed / 2**30:.2f} GiB of memory on {run.device}, where "
            f"{free / 2**30:.2f} GiB are free: lower {name}, which is {size}, or end other programs on the GPU.",
            setting=name,
        )
    return free


def free_bytes(device: torch.device) -> int:
    """Return the bytes that this process can still take on ``device``. Only GPUs have a limit that is known."""
    if device.type != "cuda":
        return sys.maxsize
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def _bytes_of_weights(parameters: int, start: bool) -> int:
    """Return the bytes of gradients, of Adam's two moments and of the copy in phase 2. The weights are there already."""
    return _NUMBER * parameters * (4 if start else 3)


def _bytes_of_a_step(config: LARESConfig, phase: Phase) -> int:
    """Return the bytes of all tensors of a step with the deepest trajectories."""
    sizes = phase.sizes()
    tokens = round(sizes.tokens) * sizes.repeats
    most = {"constant": 1, "non-recurrent": 1, "uniform": 2, "poisson-bounded": 2}.get(config.depth_sampling, 3)
    depth, layers, width = most * config.mean_depth, config.n_pre_layers + config.n_core_layers, config.hidden_size
    # The state before every step, the output of every step and its gradient, and what the backward keeps of one step.
    states = (tokens + 3 * sizes.trajectories) * depth * width
    one_step = tokens * ((2 * layers + 7) * width + layers * (8 * width + 2 * config.inner_size))
    scores = 2 * width * (_SOFTMAX_ROWS + sizes.scored)
    # Graphs have memory of their own, besides the memory of the steps that run launch by launch.
    return 2 * _NUMBER * (states + one_step + scores)
