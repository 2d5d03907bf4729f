"""Build the program of tests/cpp, which calls the C++ code without Python."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process at a time work in ``folder``, because several tests share a build."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(name: str, *options: str, compiler: str = "g++") -> list[str]:
    """Return the command of the program, which is built once in build/native_tests-<name>."""
    folder = ROOT / "build" / f"native_tests-{name}"
    configure = ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", "-DNATIVE_TESTS=ON", "-DLARES_FAST_CUDA=0"]
    with locked(folder):
        for command in (
            [*configure, f"-DCMAKE_CXX_COMPILER={compiler}", *options],
            ["cmake", "--build", folder, "--parallel", "2"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [str(folder / "native_tests")]


def build_thread_program() -> list[str]:
    """Return the command of the program under the thread sanitizer."""
    # The runtime of gcc 12 does not know the address layout of newer kernels: do not randomise addresses, if that is allowed.
    fixed = ["setarch", "-R"]
    allowed = shutil.which("setarch") and subprocess.run([*fixed, "true"], capture_output=True, check=False).returncode == 0
    options = ("-DOPTIMISE=-O1", "-DCMAKE_CXX_FLAGS=-fsanitize=thread -g1", "-DUP_TO_AVX2=ON")
    return [*(fixed if allowed else []), *build("thread", *options)]
