"""The decisions of setup.py alone: nothing is built, and scripts stand in for the driver and the toolkit."""

import importlib.util
import os
import time
from pathlib import Path

import pytest

from tests.support.fake_tools import ONE_GPU, nvidia_smi

ROOT = Path(__file__).parents[2]
pytest.importorskip("setuptools")


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


@pytest.fixture
def driver(script, tmp_path, monkeypatch):
    """Return a function that returns ``no_gpu()`` on a machine whose nvidia-smi is the given script."""

    def ask(lines):
        if lines is not None:
            nvidia_smi(tmp_path / "driver", lines)
        monkeypatch.setenv("PATH", f"{tmp_path / 'driver'}{os.pathsep}/usr/bin{os.pathsep}/bin")
        return script.no_gpu()

    return ask


@pytest.mark.parametrize("lines", [
    ONE_GPU,
    f"{ONE_GPU}; echo '  MIG 1g.10gb     Device  0: (UUID: MIG-0)'",
    "echo 'WARNING: infoROM is corrupted'; echo 'GPU 7: Tesla (UUID: GPU-7)'",
])  # fmt: skip
def test_a_gpu_that_the_driver_lists_is_seen(driver, lines):
    assert driver(lines) is None


@pytest.mark.parametrize(("lines", "why"), [
    ("exit 9", "nvidia-smi -L failed with code 9"),
    (f"{ONE_GPU}; exit 1", "nvidia-smi -L failed with code 1"),
    ("echo 'No devices were found'", "nvidia-smi -L lists none"),
    ("true", "nvidia-smi -L lists none"),
    ("echo 'no GPU 0: here'", "nvidia-smi -L lists none"),
])  # fmt: skip
def test_why_no_gpu_is_seen_is_told(driver, lines, why):
    remedy = "set LARES_FAST_CUDA=1 to compile the CUDA code anyway"
    assert driver(lines) == f"no GPU was seen when it was installed ({why}): {remedy}"


def test_a_machine_without_the_program_shows_no_gpu(script, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "(nvidia-smi -L: there is no such program)" in script.no_gpu()


def test_a_driver_that_hangs_is_not_waited_for(script, driver, monkeypatch):
    monkeypatch.setattr(script, "DRIVER_SECONDS", 1)
    began = time.monotonic()
    assert "(nvidia-smi -L did not answer within 1 s)" in driver("sleep 60 & sleep 60")
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(("cuda", "lines", "asked"), [
    ("auto", "exit 1", ["0"]), ("auto", ONE_GPU, ["auto"]), ("1", "exit 1", ["1"]), ("0", ONE_GPU, ["0"]),
])  # fmt: skip
def test_cuda_code_is_compiled_where_a_gpu_is_seen_or_it_is_asked_for(
    script, driver, monkeypatch, tmp_path, cuda, lines, asked
):
    driver(lines)
    (tmp_path / "nvcc").touch(mode=0o755)
    monkeypatch.setenv("CUDACXX", str(tmp_path / "nvcc"))
    build, seen = script.NativeBuild.__new__(script.NativeBuild), []
    build.cuda, build.archs = cuda, "90"
    monkeypatch.setattr(script.NativeBuild, "build", lambda self, cuda, reason, nvcc="": seen.append(cuda))
    build.run()
    assert seen == asked


@pytest.mark.parametrize(("value", "archs"), [
    (None, "80,90,100,120"), ("", "80,90,100,120"), ("90", "90"), ("120, 80", "80,120"), ("90,90", "90"),
])  # fmt: skip
def test_architectures(script, monkeypatch, value, archs):
    monkeypatch.delenv("LARES_FAST_CUDA_ARCHS", raising=False)
    if value is not None:
        monkeypatch.setenv("LARES_FAST_CUDA_ARCHS", value)
    assert script.architectures() == archs


@pytest.mark.parametrize(("value", "wrong"), [
    ("91", "91"), ("sm_90", "sm_90"), ("80;90", "80;90"), ("80,", ""), ("90a", "90a"), ("auto", "auto"), ("80 90", "80 90"),
])  # fmt: skip
def test_an_architecture_that_is_not_known_is_an_error(script, monkeypatch, value, wrong):
    monkeypatch.setenv("LARES_FAST_CUDA_ARCHS", value)
    with pytest.raises(SystemExit) as error:
        script.architectures()
    assert str(error.value) == (
        f"lares_fast: LARES_FAST_CUDA_ARCHS has {wrong!r}, which is not known: name some of 80,90,100,120, separated by commas."
    )


def test_other_architectures_are_built_in_another_folder(script):
    build = script.NativeBuild.__new__(script.NativeBuild)
    keys = {}
    for nvcc in ("", "/bin/true"):
        for archs in ("90", "80,90"):
            build.archs = archs
            keys[nvcc, archs] = build.key("1", nvcc)
    # Without nvcc the architectures change nothing.
    assert keys["", "90"] == keys["", "80,90"]
    assert len(set(keys.values())) == 3
