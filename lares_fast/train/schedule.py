"""The learning rate of each step of a phase. It is a function of the step alone, so a checkpoint needs no state for it."""

from __future__ import annotations

import math

from lares_fast.train.config import PhaseConfig


def steps_of_epoch(settings: PhaseConfig, rows: int) -> int:
    """Return the number of steps in an epoch of ``rows`` training rows."""
    return math.ceil(math.ceil(rows / settings.batch_size) / settings.accumulate)


def most_steps(settings: PhaseConfig, rows: int) -> int:
    """Return the largest number of steps that a phase with ``rows`` training rows can make."""
    every = settings.epochs * steps_of_epoch(settings, rows)
    return every if settings.max_steps is None else min(every, settings.max_steps)


def learning_rate(settings: PhaseConfig, step: int, steps: int) -> float:
    """Return the learning rate of step number ``step`` (from 0) of a phase that makes at most ``steps`` steps.

    During the first ``warmup_steps`` steps it rises in equal parts to ``settings.lr``. Then it stays there (``constant``), or
    falls along a line (``linear``) or half a cosine (``cosine``) that would reach 0 one step after the last.
    """
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    done = min(1.0, (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps))
    return settings.lr * (1 - done if settings.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2)


def is_constant(settings: PhaseConfig) -> bool:
    """Return whether every step has the same learning rate."""
    return settings.schedule == "constant" and not settings.warmup_steps
