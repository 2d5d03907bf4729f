"""Build the package with CUDA. The build compiles for GPUs that the machine need not have."""

import json
import os
import re
import shutil
import subprocess
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.support import elf

pytestmark = pytest.mark.packaging

REPORT = "import json, lares_fast._native as n; print(json.dumps([n.build_info(), n.capability()]))"


@pytest.fixture
def environ():
    """Return the variables that make the build compile CUDA code and name the folder of CUDA."""
    places = {name: os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH", "CUDACXX") if name in os.environ}
    return {"LARES_FAST_CUDA": "1", **places}


@pytest.fixture
def nvcc(sources, builder, environ):
    """Return the nvcc that the build uses."""
    found = builder.ok("-c", "import os, setup; print(setup.find_nvcc(os.environ) or '')", cwd=sources, **environ).strip()
    return found or pytest.skip("no nvcc in CUDACXX, CUDA_HOME, CUDA_PATH, PATH or the usual folders")


@pytest.mark.parametrize("version", ["==3.24.*", "==3.25.*", "==3.28.*", ">=4"])
def test_every_cmake_finds_that_nvcc_compiles(version, sources, builder, nvcc, tmp_path):
    """The versions are the oldest that is allowed, the ones in Debian 12 and Ubuntu 24.04, and the newest."""
    builder.ok("-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path / "tools", f"cmake{version}", cwd=tmp_path)
    # This is the program itself. The script of the same name would use the package of the environment that runs it.
    cmake = tmp_path / "tools" / "cmake" / "data" / "bin" / "cmake"
    settings = (
        f"-DCMAKE_MAKE_PROGRAM={builder.path.parent / 'ninja'}",
        f"-DPython_EXECUTABLE={builder.path}",
        f"-Dpybind11_DIR={builder.ok('-m', 'pybind11', '--cmakedir', cwd=tmp_path).strip()}",
        "-DLARES_FAST_CUDA=auto",
        "-DLARES_FAST_CUDA_ARCHS=90",
    )
    for command in (
        [cmake, "-S", sources, "-B", tmp_path / "build", "-G", "Ninja", *settings],
        [cmake, "--build", tmp_path / "build", "--target", "lares_fast_cuda"],
    ):
        done = subprocess.run(command, env={**os.environ, "CUDACXX": nvcc}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    said = (tmp_path / "build" / "cuda.txt").read_text()
    assert said.startswith("true built by nvcc "), said
    assert len(list(tmp_path.glob("build/CMakeFiles/lares_fast_cuda.dir/**/*.o"))) == 3


def test_cuda_build(sources, builder, runner, needed, nvcc, environ, tmp_path):
    wheel, output = builder.wheel(sources, tmp_path, **environ)
    assert "lares_fast: native module built with CUDA: built by nvcc" in output
    assert wheel.stat().st_size <= 10 << 20
    shutil.unpack_archive(wheel, tmp_path / "unpacked", "zip")
    info, capability = json.loads(runner.ok("-c", REPORT, cwd=tmp_path / "unpacked").splitlines()[-1])
    assert info["native"] and info["cuda_built"] and info["nvcc_version"]
    assert info["cuda_archs"][0].endswith("-real")
    # The last entry is PTX of the oldest architecture, for devices between the listed ones.
    assert info["cuda_archs"][-1] == info["cuda_archs"][0].replace("real", "virtual")
    assert capability.startswith(("ok: ", "no driver", "no device", "driver older", "no kernel image"))

    objects = list(sources.glob("build/cmake-*/CMakeFiles/lares_fast_cuda.dir/**/*.o"))
    assert objects
    if kept := os.environ.get("LARES_FAST_CUDA_BUILD"):
        # tests/emulator/test_static.py reads them there instead of compiling the sources again.
        Path(kept).mkdir(parents=True, exist_ok=True)
        (Path(kept) / "build.log").write_text(output)
        for file in objects:
            shutil.copy(file, kept)
    times = [file.stat().st_mtime_ns for file in objects]
    (tmp_path / "again").mkdir()
    again, _ = builder.wheel(sources, tmp_path / "again", **environ)
    assert [file.stat().st_mtime_ns for file in objects] == times
    assert zipfile.ZipFile(again).namelist() == zipfile.ZipFile(wheel).namelist()

    (module,) = (tmp_path / "unpacked" / "lares_fast").glob("_C.*.so")
    assert "libcuda" not in needed(module)
    assert elf.faults(module) == []

    if (cuobjdump := find_cuobjdump()) is None:
        pytest.skip("the images were not checked: pip install nvidia-cuda-cuobjdump")
    listed, used = (subprocess.check_output([cuobjdump, *what, module], text=True) for what in (IMAGES, ["-res-usage"]))
    archs = sorted(arch.removesuffix("-real") for arch in info["cuda_archs"][:-1])
    images = re.findall(r"sm_(\d+)\.cubin", listed)
    # Each source has an image for each architecture, and PTX of the oldest one.
    assert sorted(images) == sorted(archs * (len(images) // len(archs))) and len(images) >= len(archs)
    assert set(re.findall(r"sm_(\d+)\.ptx", listed)) == {info["cuda_archs"][-1].removesuffix("-virtual")}
    assert all(kernel in used for kernel in ("topk_scan", "topk_merge", "rank_count"))


IMAGES = ["-lelf", "-lptx"]


def find_cuobjdump():
    """Return the path of cuobjdump: from PATH, the usual folder or its package; or None."""
    folders = [None, "/usr/local/cuda/bin", *map(str, (Path(sysconfig.get_path("purelib")) / "nvidia").glob("*/bin"))]
    return next((found for folder in folders if (found := shutil.which("cuobjdump", path=folder))), None)
