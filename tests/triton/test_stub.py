"""Triton's real launcher on a machine without a GPU: grids, variants and shared memory of the ops' launches."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lares_fast.verify.process import run_check

pytestmark = pytest.mark.compiled
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# Triton's driver is loaded before torch, because torch would tell it that there is no GPU. Triton 3.6 loads torch itself.
DRIVER = """
import os, sys, triton
if triton.__version__.startswith("3.6."):
    import torch
    capability = divmod(int(os.environ["STUB_CAPABILITY"]), 10)
    answers = {"is_available": True, "get_device_capability": capability, "current_device": 0, "set_device": None}
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    torch._C._cuda_getCurrentRawStream = lambda device: 0
triton.runtime.driver.active.get_current_device()
"""
START = (
    DRIVER
    + """
sys.path.append(sys.argv[1])
from tests.support import stub_calls
"""
)


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    """Build a libcuda.so.1 that needs no GPU, and return its folder."""
    folder = tmp_path_factory.mktemp("stub")
    compiler = shutil.which("gcc") or shutil.which("cc") or pytest.skip("no C compiler")
    library = folder / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, HERE / "stub_cuda.c"], check=True)
    return folder


def environment(stub, tmp_path, capability=80, shared=166_912):
    return {
        **os.environ,
        "TRITON_LIBCUDA_PATH": str(stub),
        "LD_LIBRARY_PATH": str(stub),
        "TRITON_DEFAULT_BACKEND": "nvidia",
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "STUB_LOG": str(tmp_path / "log"),
        "STUB_CAPABILITY": str(capability),
        "STUB_SHARED": str(shared),
    }


# CI runs the case for Hopper on Triton 3.6 (-m hopper_triton), and the other ones on the newest Triton.
HOPPER = pytest.param(90, 232_448, marks=pytest.mark.hopper_triton)


@pytest.mark.parametrize(("capability", "shared"), [(80, 166_912), HOPPER, (120, 101_376)])
def test_launches(capability, shared, stub, tmp_path):
    environ = environment(stub, tmp_path, capability, shared)
    done = subprocess.run([sys.executable, "-P", "-c", START, str(ROOT)], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "launched as planned\n"


TRIAL = (
    DRIVER
    + """
import torch
from lares_fast.ops import _triton
from lares_fast.verify import cases
with _triton.anywhere():
    cases.case("linear_cross_entropy", integers=False).results("triton", torch.bfloat16)
"""
)


def test_what_was_compiled_elsewhere_is_not_compiled_again(stub, tmp_path):
    """Triton's cache has the same keys with and without the GPU."""
    environ = environment(stub, tmp_path)

    def compiled():
        return {path.relative_to(tmp_path / "cache") for path in (tmp_path / "cache").rglob("*.cubin")}

    how = {"ops": ["linear_cross_entropy"], "dtypes": ["bfloat16"], "architectures": [80]}
    plain = {"TRITON_CACHE_DIR": environ["TRITON_CACHE_DIR"], "TRITON_INTERPRET": "0"}
    assert run_check("compile_for", seconds=300, environ=plain, **how)["status"] == "passed"
    before = compiled()
    subprocess.run([sys.executable, "-P", "-c", TRIAL], env=environ, cwd=HERE, check=True)
    assert (tmp_path / "log").read_text()
    assert compiled() == before
