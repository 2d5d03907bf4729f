"""Fixtures that build the package: a copy of the sources, an environment with the build requirements, and shared wheels.

These tests take minutes, so they run only under ``-m packaging``. Only ``test_cuda.py`` builds CUDA code. All builds share one
copy of the sources, so that objects are compiled once.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

from tests.support.fake_tools import ONE_GPU, broken, nvidia_smi

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass
class Result:
    code: int
    output: str


@dataclasses.dataclass
class Python:
    """The interpreter of a separate environment."""

    path: Path

    def __call__(self, *arguments, cwd, **environ) -> Result:
        """Run it in ``cwd``, outside the sources. ``environ`` adds variables; None removes a variable.

        Variables of the package, of Python and of CUDA that the tests were started with are removed.
        """
        settings = {k: v for k, v in os.environ.items() if not k.startswith(("LARES_FAST_", "PYTHON", "CUDA"))}
        settings = {**settings, "LARES_FAST_CUDA": "0", **environ}
        settings = {k: str(v) for k, v in settings.items() if v is not None}
        done = subprocess.run([self.path, *map(str, arguments)], cwd=cwd, env=settings, capture_output=True, text=True)
        return Result(done.returncode, done.stdout + done.stderr)

    def ok(self, *arguments, cwd, **environ) -> str:
        result = self(*arguments, cwd=cwd, **environ)
        assert result.code == 0, result.output
        return result.output

    def info(self, cwd) -> dict:
        """Return ``lares_fast.build_info()`` of the package that this interpreter finds from ``cwd``."""
        code = "import json, lares_fast; print(json.dumps(lares_fast.build_info()))"
        return json.loads(self.ok("-c", code, cwd=cwd).splitlines()[-1])

    def wheel(self, source, to, *options, **environ) -> tuple[Path, str]:
        """Build a wheel with this environment's build requirements. Return the wheel and the output of the build."""
        arguments = ("-m", "pip", "wheel", source, "--no-deps", "--no-build-isolation", "-v", "-w", to, *options)
        output = self.ok(*arguments, cwd=to, **environ)
        (wheel,) = to.glob("*.whl")
        return wheel, output


def copy_sources(to: Path) -> Path:
    """Copy the current files of the checkout, except files that git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    return to


def create(folder: Path, *, with_pip: bool = True) -> Python:
    """Create an environment, with pip or empty."""
    venv.create(folder, with_pip=with_pip, symlinks=True)
    return Python(folder / "bin" / "python")


def packages_of(folder: Path) -> Path:
    return folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"


def link(folder: Path, origin: Path, leave: tuple[str, ...] = ()) -> None:
    """Link the packages of ``origin`` into the environment in ``folder``."""
    for entry in origin.iterdir():
        target = packages_of(folder) / entry.name
        if not entry.name.startswith(("pip", "__", *leave)) and not target.exists():
            target.symlink_to(entry)


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """Return the copy of the sources that the builds share. A test that changes files makes its own copy."""
    return copy_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="session")
def builder(tmp_path_factory):
    """Return an environment with the build requirements only, so without torch."""
    python = create(tmp_path_factory.mktemp("builder"))
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    python.ok("-m", "pip", "install", "-q", *requirements, cwd=ROOT.parent)
    assert python("-c", "import torch", cwd=ROOT.parent).code != 0
    return python


@pytest.fixture(scope="session")
def user(builder, tmp_path_factory):
    """Make environments that have the dependencies, linked from the running environment, but not lares_fast."""

    def make(*, with_pip: bool = True, build_requirements: bool = False) -> Python:
        folder = tmp_path_factory.mktemp("user")
        python = create(folder, with_pip=with_pip)
        shutil.rmtree(packages_of(folder) / "setuptools", ignore_errors=True)
        if build_requirements:
            link(folder, packages_of(builder.path.parents[1]))
        link(
            folder,
            Path(sysconfig.get_path("purelib")),
            leave=("lares_fast", "setuptools", "_distutils", "distutils", "pkg_resources"),
        )
        return python

    return make


@pytest.fixture(scope="session")
def runner(user):
    """Return an environment that runs packages which are unpacked in a folder."""
    return user(with_pip=False)


@pytest.fixture(scope="session")
def sdist(sources, builder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    builder.ok("-c", f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})", cwd=sources)
    (file,) = folder.glob("*.tar.gz")
    return file


@pytest.fixture(scope="session")
def wheel(sources, builder, tmp_path_factory):
    """Return the CPU wheel of the sources."""
    return builder.wheel(sources, tmp_path_factory.mktemp("wheel"))[0]


@pytest.fixture
def needed():
    """Return a function that returns the libraries and search paths that a shared object needs."""

    def read(library: Path) -> str:
        listing = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
        lines = [line for line in listing.splitlines() if "NEEDED" in line or "PATH" in line]
        assert lines, listing
        return "\n".join(lines)

    return read


@pytest.fixture
def broken_nvcc(tmp_path):
    """Return a PATH whose first nvcc fails, and whose nvidia-smi lists a GPU."""
    folder = broken(tmp_path)
    nvidia_smi(folder, ONE_GPU)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"
