"""Make the packages ``benchmarks`` and ``tests`` importable, and test the installed package instead of the bare sources."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

# Both are loaded from here before `benchmarks` moves this folder to the end of the path.
import benchmarks  # noqa: F401
import tests.support  # noqa: F401
