"""Arguments that several commands share."""

from __future__ import annotations

from argparse import ArgumentParser

from lares_fast._errors import InputError
from lares_fast._numbers import MOST_STEPS
from lares_fast._settings import PRECISIONS


def add_device_arguments(parser: ArgumentParser) -> None:
    """Add the arguments ``--device`` and ``--precision`` of a command that trains nothing."""
    parser.add_argument(
        "--device",
        default="auto",
        help="auto, cpu, cuda or cuda:N (default: auto, the first GPU whose kernels pass their self-test, else the CPU)",
    )
    text = "fp32, or bf16 to round the operands of products (default: fp32)"
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help=text)


def require_steps(steps: int | None) -> None:
    """Raise :class:`InputError` if a model cannot make the number of ``--steps``; ``None`` is the model's own number."""
    if steps is not None and not 1 <= steps <= MOST_STEPS:
        raise InputError(f"--steps must be at least 1 and at most {MOST_STEPS:,}, but got {steps}.")
