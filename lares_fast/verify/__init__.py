"""Checks of kernels against the reference: tolerances, test cases, self-tests, tuning, and the checks of a whole GPU.

:mod:`lares_fast.ops` calls the three names below when it loads a Triton kernel.
"""

from lares_fast.verify.self_test import refusal
from lares_fast.verify.tuning import find as launch_settings
from lares_fast.verify.tuning import note as launch_note

__all__ = ["launch_note", "launch_settings", "refusal"]
