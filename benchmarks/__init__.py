"""Benchmarks: ``python -m benchmarks.NAME`` from the root of the repository, or ``pytest benchmarks --benchmark-only``.

``python -m`` puts the root first on the path, where the bare sources would hide an installed package and its native module.
The root therefore goes to the end of the path. An editable install is found either way.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

sys.path[:] = [*(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT), str(ROOT)]
