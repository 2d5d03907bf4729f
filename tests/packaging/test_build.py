"""What the build decides, and how it says so."""

import importlib.util
import os
import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.packaging

ROOT = Path(__file__).parents[2]


def unpacked_info(python, wheel, to):
    """``build_info()`` of a wheel that is only unpacked."""
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
    # The compiler and git keep their links; nvcc is what PATH loses.
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("c++", "cc", "gcc", "g++", "as", "ld", "ar", "ranlib", "strip", "sh", "uname"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
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


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("lares_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_nvcc_is_looked_for_in_order(script, tmp_path):
    def place(name):
        file = tmp_path / name / "bin" / "nvcc"
        file.parent.mkdir(parents=True)
        file.touch(mode=0o755)
        return str(file)

    home, path, cuda_path, usual = (place(name) for name in ("home", "path", "cuda_path", "usual"))
    environ = {
        "CUDACXX": "/x/nvcc",
        "CUDA_HOME": tmp_path / "home",
        "CUDA_PATH": tmp_path / "cuda_path",
        "PATH": str(Path(path).parent),
    }
    environ = {name: str(value) for name, value in environ.items()}
    folders = (str(tmp_path / "nowhere"), str(tmp_path / "usual"))
    for name, found in (("CUDACXX", "/x/nvcc"), ("CUDA_HOME", home), ("CUDA_PATH", cuda_path), ("PATH", path)):
        assert script.find_nvcc(environ, folders) == found
        environ[name] = "" if name != "PATH" else os.devnull
    assert script.find_nvcc(environ, folders) == usual
    assert script.find_nvcc(environ, ()) is None


@pytest.mark.parametrize(
    ("system", "machine"), [("darwin", "arm64"), ("win32", "AMD64"), ("linux", "riscv64"), ("linux", "i686")]
)
def test_other_platforms_are_pure_python_and_told_so(script, monkeypatch, system, machine):
    assert script.pure_reason("auto") is None
    monkeypatch.setattr(script.sys, "platform", system)
    monkeypatch.setattr(script.platform, "machine", lambda: machine)
    assert "Linux x86-64 or aarch64" in script.pure_reason("auto")
