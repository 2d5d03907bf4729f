"""The build's decisions, and its messages about them."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.fake_tools import ONE_GPU, broken, nvidia_smi

pytestmark = pytest.mark.packaging

ROOT = Path(__file__).parents[2]


def unpacked_info(python, wheel, to):
    """Return ``build_info()`` of a wheel that is unpacked but not installed."""
    shutil.unpack_archive(wheel, to, "zip")
    return python.info(to)


def lines_about_cuda(output):
    return [line.strip() for line in output.splitlines() if line.strip().startswith("lares_fast: ")]


def test_pure_build_on_request(sources, builder, runner, tmp_path):
    wheel, output = builder.wheel(sources, tmp_path, LARES_FAST_BUILD="none", LARES_FAST_CUDA=None)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "lares_fast: pure Python: LARES_FAST_BUILD=none" in output
    info = unpacked_info(runner, wheel, tmp_path / "unpacked")
    assert info["native"] is False and "LARES_FAST_BUILD=none" in info["reason"]
    code = "import torch, lares_fast.ops as o; print(o.topk(torch.ones(1, 2), torch.ones(3, 2), 2)[1].tolist())"
    assert "[[0, 1]]" in runner.ok("-c", code, cwd=tmp_path / "unpacked")


def test_no_nvcc_gives_a_cpu_build_and_one_line(builder, runner, sources, tmp_path):
    copy = shutil.copytree(sources, tmp_path / "copy", ignore=shutil.ignore_patterns("build"))
    script = (copy / "setup.py").read_text()
    emptied = script.replace('CUDA_FOLDERS = ("/usr/local/cuda", "/opt/cuda", "/usr/lib/cuda")', 'CUDA_FOLDERS = ("/nowhere",)')
    assert emptied != script
    (copy / "setup.py").write_text(emptied)
    # This PATH has the compiler, but no nvcc.
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("c++", "cc", "gcc", "g++", "as", "ld", "ar", "ranlib", "strip", "sh", "uname"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    nvidia_smi(tools, ONE_GPU)
    environ = {"LARES_FAST_CUDA": "auto", "PATH": str(tools)}
    wheel, output = builder.wheel(copy, tmp_path, **environ)
    (line,) = lines_about_cuda(output)
    assert line.startswith("lares_fast: native module built without CUDA: no nvcc found (looked in ")
    info = unpacked_info(runner, wheel, tmp_path / "unpacked")
    assert info["native"] and not info["cuda_built"] and info["cuda_reason"].startswith("no nvcc found")
    result = builder(
        "-m", "pip", "wheel", copy, "--no-deps", "--no-build-isolation", cwd=tmp_path, **{**environ, "LARES_FAST_CUDA": 1}
    )
    assert result.code != 0 and "lares_fast: LARES_FAST_CUDA=1, but no nvcc found" in result.output


def test_without_a_gpu_no_cuda_code_is_compiled_unasked(sources, builder, runner, tmp_path):
    """The build does not try nvcc, which is broken here."""
    tools = broken(tmp_path)
    nvidia_smi(tools, "echo 'No devices were found'")
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    wheel, output = builder.wheel(sources, tmp_path, LARES_FAST_CUDA="auto", PATH=path)
    (line,) = lines_about_cuda(output)
    remedy = "set LARES_FAST_CUDA=1 to compile the CUDA code anyway"
    reason = f"no GPU was seen when it was installed (nvidia-smi -L lists none): {remedy}"
    assert line == f"lares_fast: native module built without CUDA: {reason}"
    info = unpacked_info(runner, wheel, tmp_path / "unpacked")
    assert info["native"] and not info["cuda_built"] and info["cuda_reason"] == reason
    assert reason in runner.ok("-m", "lares_fast", "doctor", cwd=tmp_path / "unpacked")


def test_broken_nvcc_gives_a_cpu_build_and_one_line(sources, builder, runner, broken_nvcc, tmp_path):
    wheel, output = builder.wheel(sources, tmp_path, LARES_FAST_CUDA="auto", PATH=broken_nvcc)
    (line,) = lines_about_cuda(output)
    assert line.startswith("lares_fast: native module built without CUDA: ")
    assert "does not work: nvcc: this toolkit is damaged" in line
    info = unpacked_info(runner, wheel, tmp_path / "unpacked")
    assert info["native"] and "this toolkit is damaged" in info["cuda_reason"]


@pytest.mark.parametrize("home", [None, "broken", "/nowhere"])
def test_required_cuda_with_a_broken_nvcc_is_an_error(sources, builder, broken_nvcc, home, tmp_path):
    arguments = ("-m", "pip", "wheel", sources, "--no-deps", "--no-build-isolation", "-w", tmp_path)
    if home == "broken":
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "bin").symlink_to(tmp_path / "broken")
        environ = {"CUDA_HOME": tmp_path / "home"}
    else:
        environ = {"CUDA_HOME": home, "PATH": broken_nvcc}
    result = builder(*arguments, cwd=tmp_path, LARES_FAST_CUDA="1", **environ)
    assert result.code != 0
    assert "lares_fast: LARES_FAST_CUDA=1, but " in result.output and "this toolkit is damaged" in result.output


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"LARES_FAST_BUILD": "cpu"}, "LARES_FAST_BUILD='cpu' is not known: use auto or none."),
        ({"LARES_FAST_CUDA": "yes"}, "LARES_FAST_CUDA='yes' is not known: use auto, 0 or 1."),
        (
            {"LARES_FAST_CUDA_ARCHS": "80,91"},
            "LARES_FAST_CUDA_ARCHS has '91', which is not known: name some of 80,90,100,120, separated by commas.",
        ),
        ({"LARES_FAST_BUILD": "none", "LARES_FAST_CUDA": "1"}, "LARES_FAST_CUDA=1, but LARES_FAST_BUILD=none."),
    ],
)
def test_contradictory_settings_are_errors(sources, builder, environ, said, tmp_path):
    result = builder("-m", "pip", "wheel", sources, "--no-deps", "--no-build-isolation", cwd=tmp_path, **environ)
    assert result.code != 0 and said in result.output


def test_a_package_without_init_is_an_error(sources, builder, tmp_path):
    copy = shutil.copytree(sources, tmp_path / "copy", ignore=shutil.ignore_patterns("build"))
    (copy / "lares_fast" / "forgotten").mkdir()
    (copy / "lares_fast" / "forgotten" / "module.py").touch()
    result = builder("setup.py", "--version", cwd=copy)
    assert result.code != 0 and "lares_fast/forgotten would not be installed" in result.output


def cmake(builder, tmp_path, *options):
    programs = builder.path.parent
    pybind11 = builder.ok("-m", "pybind11", "--cmakedir", cwd=tmp_path).strip()
    command = [programs / "cmake", "-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja", *options]
    command += [
        f"-DCMAKE_MAKE_PROGRAM={programs / 'ninja'}",
        f"-Dpybind11_DIR={pybind11}",
        f"-DPython_EXECUTABLE={builder.path}",
    ]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("archs", ["91", "80;91", "80,90", "all", "80;"])
def test_cmake_alone_refuses_an_unknown_architecture(builder, tmp_path, archs):
    done = cmake(builder, tmp_path, "-DLARES_FAST_CUDA=0", f"-DLARES_FAST_CUDA_ARCHS={archs}")
    assert done.returncode != 0
    assert f"LARES_FAST_CUDA_ARCHS={archs} is not known: name some of 80;90;100;120" in " ".join(done.stderr.split())


def test_cmake_compiles_for_the_architecture_that_is_asked_for(builder, tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on the PATH")
    done = cmake(builder, tmp_path, "-DLARES_FAST_CUDA=1", "-DLARES_FAST_CUDA_ARCHS=90")
    assert done.returncode == 0, done.stderr
    rules = (tmp_path / "build/build.ninja").read_text()
    assert set(re.findall(r"code=\[?((?:sm|compute)_\d+(?:,(?:sm|compute)_\d+)*)", rules)) <= {"sm_90", "compute_90"}
    assert "sm_90" in rules and "sm_80" not in rules
