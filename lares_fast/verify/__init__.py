"""Checks of kernels against the reference: tolerances, cases, self-tests before first use, tuning, and checks of a whole GPU.

The three names below are what :mod:`lares_fast.ops` calls when it loads a Triton kernel.
"""

from lares_fast.verify.self_test import refusal
from lares_fast.verify.tuning import find as launch_settings
from lares_fast.verify.tuning import note as launch_note

__all__ = ["launch_note", "launch_settings", "refusal"]
