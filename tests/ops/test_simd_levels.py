"""Run the tests of every op with a native backend once at each SIMD level."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lares_fast.ops  # noqa: F401 - fills the table of backends
from lares_fast import _dispatch
from tests.support.catalog_cases import needs_native

# A backward is tested with its op.
STEMS = sorted(
    {op.removesuffix("_backward") for op, row in _dispatch._TABLE.items() if any(backend.name == "native" for backend in row)}
)
# The ends of the names of the test files that run the native backend of an op.
PARTS = ("", "_index", "_native", "_losses")
RUN = """
import sys
import pytest
from lares_fast import _native
try:
    _native.load()
except ValueError as error:
    sys.exit(f"skip: {error}")
code = pytest.main(sys.argv[1:])
print("ran at level", _native.load().level())
sys.exit(code)
"""


@needs_native
@pytest.mark.parametrize(
    ("level", "stems"),
    # Other ops have no code of their own for amx and use avx512.
    [("generic", STEMS), ("avx2", STEMS), ("avx512", STEMS), ("amx", ["recurrence"])],
    ids=["generic", "avx2", "avx512", "amx"],
)
def test_ops_at_the_level(level, stems):
    folder = Path(__file__).parent
    files = [str(file) for stem in stems for part in PARTS if (file := folder / f"test_{stem}{part}.py").exists()]
    assert set(stems) <= set(STEMS) and len(STEMS) >= 2
    core = ["-q", "-p", "no:cacheprovider", "-k", "not compile and not bad and not reference"]
    done = subprocess.run(
        [sys.executable, "-P", "-c", RUN, *core, *files],
        env={**os.environ, "LARES_FAST_SIMD": level}, capture_output=True, text=True, check=False,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    if done.stderr.startswith("skip: "):
        pytest.skip(done.stderr.strip().removeprefix("skip: "))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert f"ran at level {level}\n" in done.stdout
    assert " passed" in done.stdout
