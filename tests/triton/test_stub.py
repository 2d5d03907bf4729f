"""Triton's real launcher on a machine without a GPU: the grids, variants and shared memory of what the ops launch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.compiled
HERE = Path(__file__).parent
# Triton's driver comes before torch, which would tell it that there is no GPU.
START = "import triton; triton.runtime.driver.active.get_current_device(); import stub_calls"


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    """The folder of a libcuda.so.1 that has no GPU."""
    folder = tmp_path_factory.mktemp("stub")
    compiler = shutil.which("gcc") or shutil.which("cc") or pytest.skip("no C compiler")
    library = folder / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, HERE / "stub_cuda.c"], check=True)
    return folder


@pytest.mark.parametrize(("capability", "shared"), [(80, 166_912), (90, 232_448), (120, 101_376)])
def test_launches(capability, shared, stub, tmp_path):
    environ = {
        **os.environ,
        "TRITON_LIBCUDA_PATH": str(stub),
        "LD_LIBRARY_PATH": str(stub),
        "TRITON_DEFAULT_BACKEND": "nvidia",
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "STUB_LOG": str(tmp_path / "log"),
        "STUB_CAPABILITY": str(capability),
        "STUB_SHARED": str(shared),
    }
    done = subprocess.run([sys.executable, "-c", START], env=environ, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "launched as planned\n"
