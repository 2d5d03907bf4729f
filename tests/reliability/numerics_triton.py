"""Print the faults of the interpreted Triton kernels for the part ``numerics``, one JSON array a line.

Triton reads once whether it interprets. So this is a process of its own: ``python -m tests.reliability.numerics_triton N M``.
"""

from __future__ import annotations

import json
import sys
import warnings

import pytest
import torch

from tests.reliability.numerics import triton_rows
from tests.support import triton_interpreter


def main() -> None:
    """Run N cases of the cross entropy, and M of each check of special numbers."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with triton_interpreter.interpreted(pytest.MonkeyPatch()):
        for row in triton_rows(*map(int, sys.argv[1:])):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
