"""Measure the share of one core's peak that the matrix products of the recurrence reach when they run alone.

The shares of the whole recurrence in ``bench_recurrence.py`` cannot be higher. Run ``python -m benchmarks.product_peak``;
``LARES_FAST_SIMD=avx2`` chooses the SIMD level.
"""

import subprocess
import tempfile
from pathlib import Path

from benchmarks import fma_peak, harness


def main() -> None:
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "product_peak"
        sources = [here / "product_peak.cpp", here / "fma_peak.cpp"]
        flags = ["-std=c++17", "-O3", "-ffp-contract=off", *fma_peak.flags(), f"-I{here.parent / 'csrc'}"]
        subprocess.run(["c++", *flags, *sources, "-o", program], check=True)
        with harness.one_core():
            subprocess.run([program], check=True)


if __name__ == "__main__":
    main()
