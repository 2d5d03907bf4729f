"""Build the wheel, and use it in fresh environments with other versions of Python, torch and NumPy."""

from __future__ import annotations

import shutil
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

from tests.reliability import hosts
from tests.reliability.counts import ROOT, Counts

WHAT = "environments: install, import, doctor, train (both phases), eval, recommend, report"
PYTHONS = ("3.11.7", "3.12.1", "3.13.0")
SETTINGS = ("data.synthetic_users=60", "data.synthetic_items=200", "spt.epochs=1", "rpt.epochs=1")
TRAIN = [word for setting in SETTINGS for word in ("--set", setting)]
VERSIONS = "import torch, numpy; print(torch.__version__, numpy.__version__, torch.version.cuda, torch.cuda.is_available())"
# The steps after the installation, as arguments of ``python -m lares_fast``.
COMMANDS = (
    ("doctor",),
    ("train", *TRAIN, "--out", "run"),
    ("eval", "--run", "run"),
    ("recommend", "--run", "run", "--k", "5", "--user", "user-0001"),
    ("report", "--dtype", "float32"),
)


@dataclass(frozen=True)
class Environment:
    """A Python with the versions that ``pins`` fixes; other packages are the newest ones. ``torch`` says what is expected."""

    python: str
    pins: tuple[str, ...]
    cuda: bool = False

    @property
    def name(self) -> str:
        """Return a short description."""
        return f"Python {self.python}, {', '.join(self.pins)}"


def oldest() -> tuple[str, ...]:
    """Return the oldest versions that pyproject.toml allows, of the library and of the command line."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["train"]]
    return tuple(requirement.replace(">=", "==") for requirement in wanted)


def environments() -> list[Environment]:
    """Return the environments of the long form."""
    return [
        Environment("3.11.7", ("torch==2.13.0+cpu",)),
        Environment("3.11.7", oldest(), cuda=True),
        *(Environment(python, ("torch==2.15.0",), cuda=True) for python in PYTHONS),
    ]


def measure(counts: Counts) -> None:
    """Test all environments that this machine can make."""
    found = []
    with tempfile.TemporaryDirectory(prefix="lares-hosts-") as folder:
        for i, environment in enumerate(environments()):
            if shutil.disk_usage(folder).free < 12 << 30:
                counts.note(WHAT, "not enough disk for all environments")
                break
            base = Path(folder) / str(i)
            base.mkdir()
            versions = check(counts, environment, base, Path(folder))
            shutil.rmtree(base)
            found.append(f"Python {environment.python} with {versions}")
    counts.note(WHAT, "; ".join(found))


def interpreter(version: str) -> Path:
    """Return the path of a Python that pyenv has installed."""
    return Path.home() / ".pyenv" / "versions" / version / "bin" / "python"


def check(counts: Counts, environment: Environment, base: Path, folder: Path) -> str:
    """Make one environment in ``base``, use the package in it, and return the versions.

    ``folder`` keeps the wheels, one for each Python, and the downloads.
    """
    constraints = base / "constraints.txt"
    constraints.write_text("\n".join(environment.pins) + "\n")
    how = {"PIP_CONSTRAINT": constraints, "PIP_CACHE_DIR": folder / "cache", "LARES_FAST_CUDA": 0, "TMPDIR": base}
    if shutil.which("ccache"):
        how["CMAKE_CXX_COMPILER_LAUNCHER"] = "ccache"
    python = base / "venv" / "bin" / "python"
    wheels = folder / f"wheels-{environment.python}"
    build = (python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", wheels, ROOT)
    code = "import torch, lares_fast; assert lares_fast.build_info()['native']"
    steps = [
        lambda: (interpreter(environment.python), "-m", "venv", base / "venv"),
        *([] if wheels.exists() else [lambda: build]),
        lambda: (python, "-m", "pip", "install", "-q", f"{next(wheels.glob('*.whl'))}[train]"),
        lambda: (python, "-W", "error", "-c", code),
        *(lambda command=command: (python, "-m", "lares_fast", *command) for command in COMMANDS),
    ]
    for step in steps:
        words = step()
        done = hosts.run(*words, cwd=base, **how)
        counts.tried(WHAT)
        if done.returncode:
            text = " ".join(map(str, words[1:])).replace(str(base), "")
            counts.failed(WHAT, f"{environment.name}: {text}: {(done.stdout + done.stderr)[-1500:]}")
            return "a failure"
    torch, numpy, cuda, there = hosts.run(python, "-c", VERSIONS, cwd=base).stdout.split()
    if environment.cuda != (cuda != "None") or there == "True":
        counts.failed(WHAT, f"{environment.name}: torch {torch} is built for CUDA {cuda}, and a GPU is {there}")
    return f"torch {torch}, NumPy {numpy}" + (f" (CUDA {cuda}, no GPU)" if cuda != "None" else "")
