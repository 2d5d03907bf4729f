"""``python -P -m lares_fast.verify NAME ARGUMENTS``: run one check and print its result as a line of JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from lares_fast.verify import gpu_checks, gpu_edge_cases, gpu_large, offline

CHECKS: dict[str, Callable[..., dict[str, Any]]] = {
    "interpret": offline.interpret,
    "compile_for": offline.compile_for,
    **gpu_checks.CHECKS,
    **gpu_edge_cases.CHECKS,
    **gpu_large.CHECKS,
}

if __name__ == "__main__":
    print(json.dumps(CHECKS[sys.argv[1]](**json.loads(sys.argv[2]))))
