"""Every test runs on one thread: tensors are tiny, and a busy machine makes waiting threads spin."""

import os

import pytest
import torch

os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# Markers of tests that take minutes.
SLOW = ("packaging", "emulator", "native_cpp", "interpreted", "compiled", "gpu")


def pytest_configure(config):
    """Triton reads TRITON_INTERPRET once, when it is imported, so a process interprets kernels or compiles them."""
    asked = [kind for kind in ("interpreted", "compiled", "gpu") if kind in (config.option.markexpr or "")]
    if len(asked) == 2:
        raise pytest.UsageError("-m interpreted and -m compiled need a process each")
    if asked:
        os.environ["TRITON_INTERPRET"] = str(int(asked == ["interpreted"]))
        os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"


def pytest_collection_modifyitems(config, items):
    """Deselect what is slow unless a ``-m`` expression speaks of it."""
    left_out = [marker for marker in SLOW if marker not in (config.option.markexpr or "")]
    slow = [item for item in items if any(map(item.get_closest_marker, left_out))]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
