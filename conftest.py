"""Tests run against the installed package.

``python -m pytest`` puts the current folder first on the path, where the bare sources would shadow the
installed package and its native module. An editable install is found either way.
"""

import importlib.metadata
import sys
from pathlib import Path

ROOT = Path(__file__).parent

try:
    importlib.metadata.distribution("lares_fast")
except importlib.metadata.PackageNotFoundError:
    pass
else:
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
