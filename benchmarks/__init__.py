"""Benchmarks: ``python -m benchmarks.NAME`` from the root of the repository, or ``pytest benchmarks --benchmark-only``.

``python -m`` puts the root of the repository first on the path. There the bare sources would hide the installed package and its
native module, so this file moves the root to the end of the path. An editable install is found in both cases.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

sys.path[:] = [*(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT), str(ROOT)]
