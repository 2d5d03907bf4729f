"""Every test runs on one thread: tensors are tiny, and a busy machine makes waiting threads spin."""

import os

import pytest
import torch

os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# Suites of minutes: run only under a ``-m`` expression that speaks of them.
ON_REQUEST = ("packaging", "interpreted", "compiled")


def pytest_configure(config):
    """Triton reads TRITON_INTERPRET once, when it is imported, so a process interprets kernels or compiles them."""
    asked = [kind for kind in ("interpreted", "compiled") if kind in (config.option.markexpr or "")]
    if len(asked) == 2:
        raise pytest.UsageError("-m interpreted and -m compiled need a process each")
    if asked:
        os.environ["TRITON_INTERPRET"] = str(int(asked == ["interpreted"]))
        os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"


def pytest_collection_modifyitems(config, items):
    expression = config.option.markexpr or ""
    unasked = [name for name in ON_REQUEST if name not in expression]
    deselected = [item for item in items if any(item.get_closest_marker(name) for name in unasked)]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        gone = set(deselected)
        items[:] = [item for item in items if item not in gone]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
