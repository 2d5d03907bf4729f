"""An install has the right files, and works outside the sources."""

import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.support import elf

pytestmark = pytest.mark.packaging

TOPK = "import torch, lares_fast.ops as o; print(o.topk(torch.ones(1, 2), torch.ones(3, 2), 2, backend='native')[1].tolist())"
MEGABYTE = 1 << 20


def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_wheel_contents(wheel, sources):
    files = names(wheel)
    assert {name.split("/")[0] for name in files} == {"lares_fast", next(n for n in files if ".dist-info" in n).split("/")[0]}
    assert sum(name.startswith("lares_fast/_C.") for name in files) == 1
    assert {"lares_fast/py.typed", "lares_fast/_build.json", "lares_fast/kernels/__init__.py"} <= set(files)
    sources_of = {"lares_fast": "lares_fast", "lares_fast/kernels": "kernels"}
    for target, source in sources_of.items():
        for file in (sources / source).rglob("*"):
            if file.suffix in (".py", ".yaml"):
                assert f"{target}/{file.relative_to(sources / source)}" in files
    assert not [name for name in files if name.endswith((".cpp", ".h", ".cu", ".pyc"))]
    assert any(name.endswith("licenses/LICENSE") for name in files)
    assert wheel.stat().st_size <= 10 * MEGABYTE


def test_module_needs_neither_cuda_nor_torch(wheel, needed, tmp_path):
    shutil.unpack_archive(wheel, tmp_path, "zip")
    (module,) = (tmp_path / "lares_fast").glob("_C.*.so")
    for foreign in ("libcuda", "libtorch", "libc10", "libpython", "PATH"):
        assert foreign not in needed(module)
    assert elf.faults(module) == []


def test_sdist_builds_the_same_wheel(sdist, wheel, builder, tmp_path):
    with tarfile.open(sdist) as archive:
        inside = [name.partition("/")[2] for name in archive.getnames()]
    assert {"CMakeLists.txt", "LICENSE", "csrc/bindings.cpp", "csrc/build_info.cpp.in", "kernels/__init__.py"} <= set(inside)
    assert not [name for name in inside if name.startswith(("tests", "benchmarks", "build/cmake", "build/lib"))]
    assert not [name for name in inside if name.endswith((".so", "_build.json"))]
    rebuilt, _ = builder.wheel(sdist, tmp_path)
    assert sorted(names(rebuilt)) == sorted(names(wheel))


def test_plain_install_with_isolation(sources, user, tmp_path):
    """``pip install .`` as a user types it; then the package is used from another folder."""
    python = user()
    torch = python.ok("-c", "import torch; print(torch.__version__.partition('+')[0])", cwd=tmp_path).strip()
    (tmp_path / "constraints.txt").write_text(f"torch=={torch}\n")
    python.ok("-m", "pip", "install", ".", cwd=sources, PIP_CONSTRAINT=tmp_path / "constraints.txt")
    info = python.info(tmp_path)
    assert info["native"]
    assert info["version"] == python.ok("-c", "import lares_fast; print(lares_fast.__version__)", cwd=tmp_path).strip()
    assert not info["cuda_built"] and "LARES_FAST_CUDA=0" in info["cuda_reason"]
    assert "[[0, 1]]" in python.ok("-c", TOPK, cwd=tmp_path)
    where = python.ok("-c", "import lares_fast.kernels as k; print(k.__file__)", cwd=tmp_path)
    assert str(sources) not in where and "lares_fast/kernels" in where
    assert python("-c", "import kernels", cwd=tmp_path).code != 0


def test_editable_install(sources, user, tmp_path):
    python = user(build_requirements=True)
    install = ("-m", "pip", "install", "--no-deps", "--no-build-isolation", "-e", ".")
    copy = shutil.copytree(sources, tmp_path / "checkout", ignore=shutil.ignore_patterns("build"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    python.ok(*install, cwd=copy)
    info = python.info(elsewhere)
    assert info["native"] and Path(info["file"]).parent == copy / "lares_fast"
    assert "[[0, 1]]" in python.ok("-c", TOPK, cwd=elsewhere)
    where = python.ok("-c", "import lares_fast.kernels as k; print(k.__file__)", cwd=elsewhere).strip()
    assert Path(where) == copy / "kernels" / "__init__.py"
    assert python("-c", "import kernels", cwd=elsewhere).code != 0
    assert not list(copy.glob("*.egg-info"))
    # A later edit takes effect at once, and a later pure build removes the native module.
    (copy / "lares_fast" / "_errors.py").open("a").write("\nMARK = 1\n")
    python.ok("-c", "from lares_fast._errors import MARK", cwd=elsewhere)
    python.ok(*install, cwd=copy, LARES_FAST_BUILD="none", LARES_FAST_CUDA=None)
    info = python.info(elsewhere)
    assert info["native"] is False and "LARES_FAST_BUILD=none" in info["reason"]


def test_bare_checkout_says_what_is_missing(runner, sources, tmp_path):
    copy = shutil.copytree(sources, tmp_path / "bare", ignore=shutil.ignore_patterns("build", "_build.json", "*.so"))
    info = runner.info(copy)
    assert info["native"] is False and "the package was not installed" in info["reason"]
    code = "from lares_fast._native import load; load()"
    result = runner("-c", code, cwd=tmp_path, PYTHONPATH=copy)
    assert result.code != 0
    message = "NotBuiltError: The native module is not built, because the package was not installed: run pip install ."
    assert message in result.output
    auto = runner.ok("-c", TOPK.replace("'native'", "None"), cwd=tmp_path, PYTHONPATH=copy)
    assert "[[0, 1]]" in auto
