"""Settings of all tests. Every test runs on one thread: tensors are tiny, and on a busy machine waiting threads spin."""

import os

import pytest
import torch

os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# Markers of tests that take minutes.
SLOW = ("packaging", "emulator", "native_cpp", "interpreted", "compiled", "gpu")
# The number of slow tests that a plain pytest does not run.
_NOT_RUN = pytest.StashKey[int]()


def pytest_configure(config):
    """Set Triton's mode from ``-m``. Triton reads TRITON_INTERPRET once, so a process either interprets or compiles kernels."""
    config.stash[_NOT_RUN] = 0
    modes = [mode for mode in ("interpreted", "compiled", "gpu") if mode in (config.option.markexpr or "")]
    if len(modes) == 2:
        raise pytest.UsageError("-m interpreted and -m compiled need one process each")
    if modes:
        os.environ["TRITON_INTERPRET"] = str(int(modes == ["interpreted"]))
        os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"


def pytest_collection_modifyitems(config, items):
    """Deselect slow tests unless the ``-m`` expression names their marker."""
    left_out = [marker for marker in SLOW if marker not in (config.option.markexpr or "")]
    slow = [item for item in items if any(map(item.get_closest_marker, left_out))]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
    if not config.option.markexpr:
        config.stash[_NOT_RUN] = len(slow)


def pytest_sessionfinish(session):
    """Send the number from a worker of pytest-xdist to the process that prints it."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["slow_tests_not_run"] = session.config.stash[_NOT_RUN]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Take the number from a worker. Every worker collects all tests, so the number is the same in all."""
    node.config.stash[_NOT_RUN] = getattr(node, "workeroutput", {}).get("slow_tests_not_run", 0)


def pytest_terminal_summary(terminalreporter, config):
    """Say how many slow tests did not run."""
    if number := config.stash[_NOT_RUN]:
        terminalreporter.write_line(f"{number} slow tests not run: see CONTRIBUTING.md")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
