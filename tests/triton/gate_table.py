"""Compile the kernels with older versions of Triton, and write the table in docs/kernels/gate.md.

    python -m tests.triton.gate_table 3.5.1 3.6.0 3.7.1 3.8.0 installed

Each version is installed into a temporary folder, which comes first on the path of a separate process.
"""

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/kernels/gate.md"


def measure():
    """Return the lines of the table for the Triton of this process."""
    import pytest
    import torch
    import triton
    from lares_fast.kernels import _launch

    from tests.support import triton_gate
    from tests.triton import test_gate

    cases = {
        "attention D/H 32, dropout": lambda: test_gate.run(32, torch.bfloat16, 0.2, 50),
        "attention D/H 64": lambda: test_gate.run(64, torch.bfloat16, 0.0, 50),
        "linear_cross_entropy D 64": lambda: test_gate.catalog(64, torch.bfloat16),
        "recurrence D 64, forward alone": lambda: test_gate.recurrence(64, 2, torch.bfloat16, 0.0, 50, "add", False),
    }
    patch, lines = pytest.MonkeyPatch(), {}
    for case, call in cases.items():
        for architecture in (80, 90, 100, 120):
            try:
                found = triton_gate.compile_launches(patch, architecture, call)
            except triton.compiler.errors.CompilationError:
                lines.setdefault(case, {})[architecture] = "does not compile"
                continue
            for kernel in {kernel.name: kernel for kernel in found}.values():
                assert kernel.count("HGMMA") == kernel.count("UTC") == 0, f"{kernel} has products that are not sound"
                cell = f"{kernel.registers}, {kernel.stack}, {kernel.shared / 1024:.0f}, {kernel.products}"
                lines.setdefault(f"{case}: {kernel.name}", {})[architecture] = cell
    versions = {a: ".".join(map(str, _launch._ptxas(a))) for a in (80, 90, 100)}
    return {"triton": triton.__version__, "ptxas": versions, "lines": lines}


def install(version, folder):
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, f"triton=={version}"]
    subprocess.run(command, check=True)


def repeat(version):
    """Run :func:`measure` with Triton ``version``."""
    with tempfile.TemporaryDirectory() as folder:
        if version != "installed":
            install(version, folder)
        environ = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
        environ["PYTHONPATH"] = os.pathsep.join([*([folder] if version != "installed" else []), str(ROOT)])
        code = "import json; from tests.triton import gate_table; print(json.dumps(gate_table.measure()))"
        done = subprocess.run([sys.executable, "-P", "-c", code], env=environ, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"Triton {version}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def page(found):
    text = [
        "# The compile gate on older Tritons",
        "",
        "This page shows how each version of Triton compiles the kernels in bf16, for each GPU. A cell has four numbers: "
        "registers a thread, bytes of stack, KB of shared memory, and products of tensor cores.",
        "All products are `HMMA`. The command fails if WGMMA or tcgen05 occurs. The kernels were compiled on a machine "
        "without a GPU. None of them ran on one.",
        "",
        "The full compile gate (`tests/triton/test_gate.py`) runs in CI. The newest Triton and Triton 3.8.0 share its cases. "
        "Triton 3.6.0 also compiles the cases for sm_90, with its own limits where it needs more.",
        "",
        "```",
        f"python -m tests.triton.gate_table {' '.join(sys.argv[1:])}",
        "```",
    ]
    for one in found:
        ptxas = ", ".join(f"{version} for sm_{a}" for a, version in one["ptxas"].items())
        text += [
            "",
            f"## Triton {one['triton']}",
            f"ptxas {ptxas}",
            "",
            "| kernel | sm_80 | sm_90 | sm_100 | sm_120 |",
            "|---|---|---|---|---|",
        ]
        text += [f"| {name} | {' | '.join(cells.values())} |" for name, cells in one["lines"].items()]
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    with ThreadPoolExecutor(2) as pool:
        PAGE.write_text(page(list(pool.map(repeat, sys.argv[1:]))))
