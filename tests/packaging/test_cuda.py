"""The one build with CUDA; it compiles for GPUs and asks for none."""

import json
import os
import shutil
import zipfile

import pytest

pytestmark = pytest.mark.packaging

REPORT = "import json, lares_fast._native as n; print(json.dumps([n.build_info(), n.capability()]))"


def test_cuda_build(sources, builder, runner, needed, tmp_path):
    environ = {
        "LARES_FAST_CUDA": "1",
        **{name: os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH", "CUDACXX") if name in os.environ},
    }
    nvcc = builder.ok("-c", "import os, setup; print(setup.find_nvcc(os.environ) or '')", cwd=sources, **environ).strip()
    if not nvcc:
        pytest.skip("no nvcc in CUDACXX, CUDA_HOME, CUDA_PATH, PATH or the usual folders")
    wheel, output = builder.wheel(sources, tmp_path, **environ)
    assert "lares_fast: native module built with CUDA: built by nvcc" in output
    assert wheel.stat().st_size <= 10 << 20
    shutil.unpack_archive(wheel, tmp_path / "unpacked", "zip")
    info, capability = json.loads(runner.ok("-c", REPORT, cwd=tmp_path / "unpacked").splitlines()[-1])
    assert info["native"] and info["cuda_built"] and info["nvcc_version"]
    assert info["cuda_archs"][0].endswith("-real")
    # The oldest architecture's PTX, for devices between the listed ones.
    assert info["cuda_archs"][-1] == info["cuda_archs"][0].replace("real", "virtual")
    assert capability.startswith(("ok: ", "no driver", "no device", "driver older", "no kernel image"))

    objects = list(sources.glob("build/cmake-*/CMakeFiles/lares_fast_cuda.dir/**/*.o"))
    assert objects
    times = [file.stat().st_mtime_ns for file in objects]
    (tmp_path / "again").mkdir()
    again, _ = builder.wheel(sources, tmp_path / "again", **environ)
    assert [file.stat().st_mtime_ns for file in objects] == times
    assert zipfile.ZipFile(again).namelist() == zipfile.ZipFile(wheel).namelist()

    (module,) = (tmp_path / "unpacked" / "lares_fast").glob("_C.*.so")
    assert "libcuda" not in needed(module)
