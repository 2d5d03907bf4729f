"""The emulator and its test program, compiled once a session for each sanitizer. Workers of pytest-xdist share the objects."""

import contextlib
import fcntl
import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
FLAGS = (
    "-std=c++17",
    "-O1",
    "-g",
    "-DLARES_EMULATOR",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-ffp-contract=off",
    f"-I{HERE}",
)
SANITIZE = {
    "plain": [],
    "asan": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "tsan": ["-fsanitize=thread"],
}
KERNELS = {"topk": HERE / "topk.cpp", "target_rank": HERE / "target_rank.cpp"}
OTHERS = {"device": CSRC / "emulator/device.cpp", "plan": CSRC / "catalog/plan.cpp", "cases": HERE / "cases.cpp"}


@contextlib.contextmanager
def locked(folder):
    """Let one process at a time work in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def gcc(*arguments):
    done = subprocess.run(["g++", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def compile(source, kind, to, spoilt=None):
    """Compile one source. A header in the folder ``spoilt`` replaces the header of the same path in csrc/."""
    sanitize = SANITIZE[kind]
    if kind == "tsan" and source == OTHERS["device"]:
        # TSan must not see the memory of the device itself.
        sanitize = ["-DLARES_EMULATOR_TSAN"]
    includes = [f"-I{folder}" for folder in (spoilt, CSRC) if folder]
    gcc(*FLAGS, *sanitize, *includes, "-c", source, "-o", to)


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """Return a function ``program(kind, to, spoilt, kernels)`` that links the test program of a sanitizer and returns its path.

    ``kernels`` are compiled with the headers in the folder ``spoilt``. All other objects are shared.
    """
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "emulator"

    def link(kind, to, spoilt=None, kernels=()):
        objects = {name: shared / f"{name}_{kind}.o" for name in (*KERNELS, *OTHERS)}
        with locked(shared):
            for name, source in {**KERNELS, **OTHERS}.items():
                if name not in kernels and not objects[name].is_file():
                    compile(source, kind, objects[name])
        for name in kernels:
            objects[name] = to / f"{name}_{kind}.o"
            compile(KERNELS[name], kind, objects[name], spoilt)
        gcc(*SANITIZE[kind], *objects.values(), "-o", to / f"cases_{kind}")
        return to / f"cases_{kind}"

    return link
