"""Build lares_fast: Python files, and one native module, ``lares_fast._C``, that CMake makes from csrc/.

docs/env.md describes the settings LARES_FAST_BUILD, LARES_FAST_CUDA and LARES_FAST_CUDA_ARCHS. pyproject.toml has the metadata.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MODULE = "lares_fast._C"
SUPPORTED = "Linux x86-64 or aarch64 with a 64-bit CPython"
CUDA_FOLDERS = ("/usr/local/cuda", "/opt/cuda", "/usr/lib/cuda")
CUDA_ARCHS = ("80", "90", "100", "120")
# Seconds to wait for the driver. It usually answers in less than one second, but it may hang.
DRIVER_SECONDS = 20
# The remedy in errors of the native build.
WITHOUT_MODULE = "set LARES_FAST_BUILD=none to install without it"
# Variables that change what the compilers produce. A build folder is reused only if they have not changed.
COMPILER_SETTINGS = ("CXX", "CXXFLAGS", "LDFLAGS", "CUDAFLAGS", "CUDAHOSTCXX", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")


def stop(sentence: str) -> SystemExit:
    """Return the error that ends a build with one sentence and no traceback."""
    return SystemExit(f"lares_fast: {sentence}")


def say(sentence: str) -> None:
    """Write one line to the build's log."""
    print(f"lares_fast: {sentence}", file=sys.stderr, flush=True)


def switch(name: str, allowed: Sequence[str]) -> str:
    """Return the value of the setting ``name``. If it is unset or empty, the value is auto."""
    value = os.environ.get(name) or "auto"
    if value not in allowed:
        raise stop(f"{name}={value!r} is not known: use {', '.join(allowed[:-1])} or {allowed[-1]}.")
    return value


def architectures(name: str = "LARES_FAST_CUDA_ARCHS") -> str:
    """Return the GPU architectures to compile for, separated by commas. If the setting is unset or empty, return all."""
    wanted = [part.strip() for part in (os.environ.get(name) or ",".join(CUDA_ARCHS)).split(",")]
    if unknown := [part for part in wanted if part not in CUDA_ARCHS]:
        raise stop(f"{name} has {unknown[0]!r}, which is not known: name some of {','.join(CUDA_ARCHS)}, separated by commas.")
    return ",".join(arch for arch in CUDA_ARCHS if arch in wanted)


def no_gpu() -> str | None:
    """Return None if the driver lists a GPU, else the reason why CUDA code is not compiled. Listing starts no GPU."""
    try:
        process = subprocess.Popen(
            ["nvidia-smi", "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
        )
    except OSError:
        return unseen("nvidia-smi -L: there is no such program")
    try:
        listing, _ = process.communicate(timeout=DRIVER_SECONDS)
    except subprocess.TimeoutExpired:
        # The build does not wait for the process to end: a process that hangs inside the driver cannot be ended.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        return unseen(f"nvidia-smi -L did not answer within {DRIVER_SECONDS} s")
    if process.returncode:
        return unseen(f"nvidia-smi -L failed with code {process.returncode}")
    return None if re.search(r"^GPU \d+:", listing, re.MULTILINE) else unseen("nvidia-smi -L lists none")


def unseen(detail: str) -> str:
    """Return the reason for leaving out CUDA code on a machine where the driver lists no GPU."""
    return f"no GPU was seen when it was installed ({detail}): set LARES_FAST_CUDA=1 to compile the CUDA code anyway"


def pure_reason(build: str) -> str | None:
    """Return the reason why this build is pure Python, or None if it has the native module."""
    if build == "none":
        return "LARES_FAST_BUILD=none when it was installed"
    supported = (
        sys.platform == "linux"
        and platform.machine().lower() in ("x86_64", "amd64", "aarch64", "arm64")
        and sys.maxsize > 2**32
        and sys.implementation.name == "cpython"
    )
    if supported:
        return None
    bits = 64 if sys.maxsize > 2**32 else 32
    return (
        f"the native module is built on {SUPPORTED} only, and this is {platform.system()} {platform.machine()} "
        f"with a {bits}-bit {platform.python_implementation()}"
    )


def find_nvcc(environ: Mapping[str, str], folders: Sequence[str] = CUDA_FOLDERS) -> str | None:
    """Return the first nvcc found in: the settings CUDACXX, CUDA_HOME and CUDA_PATH, then PATH, then ``folders``.

    This nvcc is used even if it does not work. Another one would be a toolkit that the user did not choose.
    """
    if environ.get("CUDACXX"):
        return environ["CUDACXX"]
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(name) and (found := shutil.which("nvcc", path=str(Path(environ[name]) / "bin"))):
            return found
    if found := shutil.which("nvcc", path=environ.get("PATH", os.defpath)):
        return found
    for folder in folders:
        if found := shutil.which("nvcc", path=str(Path(folder) / "bin")):
            return found
    return None


def tool(name: str, folder: str) -> str:
    """Return the path of a build program, from the Python package ``name`` or else from PATH.

    The attribute ``folder`` of the package names the folder of the program.
    """
    with contextlib.suppress(ImportError, AttributeError):
        module = importlib.import_module(name)
        if found := shutil.which(name, path=getattr(module, folder)):
            return found
    if found := shutil.which(name):
        return found
    raise stop(f"{name} is missing from the build environment: pip install {name}, or build with isolation.")


def pybind11_folder() -> str:
    """Return the folder where CMake finds pybind11."""
    try:
        import pybind11
    except ImportError as error:
        raise stop("pybind11 is missing from the build environment: pip install pybind11, or build with isolation.") from error
    return pybind11.get_cmake_dir()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a build folder's lock, so that two installations from one checkout use it one after the other."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class NativeBuild:
    """One CMake build of csrc/ in the folder build/cmake-<key>. A later build with the same key reuses its objects."""

    def __init__(self, version: str, cuda: str, archs: str) -> None:
        self.version = version
        self.cuda = cuda
        self.archs = archs
        self.cmake = tool("cmake", "CMAKE_BIN_DIR")
        self.ninja = tool("ninja", "BIN_DIR")

    def run(self) -> Path:
        """Build the module with or without CUDA code, and return its file."""
        if self.cuda == "0":
            return self.build("0", "LARES_FAST_CUDA=0 when it was installed")
        if self.cuda == "auto" and (reason := no_gpu()) is not None:
            return self.build("0", reason)
        if (nvcc := find_nvcc(os.environ)) is None:
            reason = "no nvcc found (looked in CUDACXX, CUDA_HOME, CUDA_PATH, PATH and " + ", ".join(CUDA_FOLDERS) + ")"
            return self.without_cuda(reason)
        if shutil.which(nvcc) is None:
            return self.without_cuda(f"{nvcc} is not a program")
        return self.build(self.cuda, "", nvcc)

    def without_cuda(self, reason: str) -> Path:
        """Build for the CPU because of ``reason``; raise an error if the user set LARES_FAST_CUDA=1."""
        if self.cuda == "1":
            raise stop(f"LARES_FAST_CUDA=1, but {reason}.")
        return self.build("0", reason)

    def build(self, cuda: str, reason: str, nvcc: str = "") -> Path:
        """Configure and compile with this value of LARES_FAST_CUDA. If CUDA code fails, continue with :meth:`without_cuda`."""
        folder = ROOT / "build" / f"cmake-{self.key(cuda, nvcc)}"
        with locked(folder):
            configured = self.configure(folder, cuda, reason, nvcc)
            with_cuda, said = self.decision(folder)
            if cuda != "0" and not with_cuda and said:
                # CMake would remember the failure. Without the folder, the next build tests this nvcc again.
                shutil.rmtree(folder, ignore_errors=True)
                return self.without_cuda(said)
            if not configured:
                raise stop(f"CMake could not configure the native module (see above); {WITHOUT_MODULE}.")
            if cuda != "0" and not self.compile(folder, "lares_fast_cuda"):
                return self.without_cuda(f"{nvcc} could not compile csrc/cuda (the build's log says why)")
            if not self.compile(folder, "_C"):
                raise stop(f"the native module did not compile (see above); {WITHOUT_MODULE}.")
            say(f"native module built {'with' if with_cuda else 'without'} CUDA: {said}")
            return next(folder.glob("_C.*.so"))

    @staticmethod
    def decision(folder: Path) -> tuple[bool, str]:
        """Return (whether CMake compiles CUDA code, the reason), which CMakeLists.txt writes into cuda.txt."""
        file = folder / "cuda.txt"
        built, _, said = (file.read_text() if file.is_file() else "").partition(" ")
        return built == "true", said

    def key(self, cuda: str, nvcc: str) -> str:
        """Return a name for the build folder that depends on everything that CMake stores in it."""
        parts = [
            str(ROOT),
            cuda,
            nvcc,
            self.archs if nvcc else "",
            sys.implementation.cache_tag or "",
            sysconfig.get_path("include"),
            platform.machine(),
        ]
        if nvcc:
            parts.append(subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout)
        parts += [os.environ.get(name, "") for name in COMPILER_SETTINGS]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:10]

    def configure(self, folder: Path, cuda: str, reason: str, nvcc: str) -> bool:
        """Configure with CMake. Return whether it succeeded."""
        environ = dict(os.environ)
        if nvcc:
            environ["CUDACXX"] = nvcc
        (folder / "cuda.txt").unlink(missing_ok=True)
        command = [
            self.cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={self.ninja}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11_folder()}",
            f"-DPACKAGE_VERSION={self.version}",
            f"-DLARES_FAST_CUDA={cuda}",
            f"-DLARES_FAST_CUDA_ARCHS={self.archs.replace(',', ';')}",
            f"-DCUDA_OFF_REASON={reason}",
        ]  # fmt: skip
        return subprocess.run(command, env=environ, check=False).returncode == 0

    def compile(self, folder: Path, target: str) -> bool:
        """Build one target. Return whether it succeeded."""
        return subprocess.run([self.cmake, "--build", str(folder), "--target", target], check=False).returncode == 0


class BuildNative(build_ext):
    """Build the extension with CMake. Copy it to where setuptools expects it: for an editable install, beside the sources."""

    def build_extension(self, ext: Extension) -> None:
        """Build and copy ``ext``."""
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(NativeBuild(self.distribution.get_version(), CUDA, ARCHS).run(), target)


class BuildPython(build_py):
    """Copy the packages, and write into ``_build.json`` whether this build has the native module."""

    def run(self) -> None:
        """Copy the packages, then write ``_build.json``."""
        package = ROOT / "lares_fast" if self.editable_mode else Path(self.build_lib) / "lares_fast"
        if not self.editable_mode:
            # Otherwise files of an earlier build, which the sources no longer have, would be in the wheel.
            shutil.rmtree(package, ignore_errors=True)
        elif PURE:
            for stale in package.glob("_C.*.so"):
                stale.unlink()
        super().run()
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build.json").write_text(json.dumps({"native": PURE is None, "reason": PURE or ""}) + "\n")


def packages() -> list[str]:
    """Return every package in lares_fast/, and lares_fast.kernels, which is the folder kernels/."""
    found = find_packages(str(ROOT), include=["lares_fast", "lares_fast.*"])
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "lares_fast").rglob("*.py")}
    if lost := sorted(str(folder) for folder in folders if ".".join(folder.parts) not in found):
        raise stop(f"{', '.join(lost)} would not be installed: add an __init__.py.")
    return [*found, "lares_fast.kernels"]


BUILD = switch("LARES_FAST_BUILD", ("auto", "none"))
CUDA = switch("LARES_FAST_CUDA", ("auto", "0", "1"))
ARCHS = architectures()
PURE = pure_reason(BUILD)


def main() -> None:
    """Run setuptools."""
    if PURE and CUDA == "1":
        raise stop(f"LARES_FAST_CUDA=1, but {PURE.replace(' when it was installed', '')}.")
    if PURE:
        say(f"pure Python: {PURE}.")
    # The egg-info folder goes into build/. Beside the sources, Python would take it for an installed distribution.
    (ROOT / "build").mkdir(exist_ok=True)
    setup(
        options={"egg_info": {"egg_base": "build"}},
        packages=packages(),
        package_dir={"lares_fast": "lares_fast", "lares_fast.kernels": "kernels"},
        package_data={"lares_fast": ["py.typed"], "lares_fast.cli": ["configs/*.yaml"]},
        include_package_data=False,
        ext_modules=[] if PURE else [Extension(MODULE, sources=[])],
        cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
        zip_safe=False,
    )


if __name__ == "__main__":
    main()
