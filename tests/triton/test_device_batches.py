"""Training steps on the interpreted Triton kernels, on batches as a GPU gets them: packed from the log, with fillers."""

from dataclasses import replace

import pytest
import torch

import lares_fast
from lares_fast import reference
from lares_fast.train.device_log import DeviceLog
from lares_fast.train.padding import Padding
from lares_fast.train.parcel import Parcel
from tests.support import oracle
from tests.triton.test_training import phase_of, two_steps

pytestmark = pytest.mark.interpreted
CPU = torch.device("cpu")


def as_on_a_gpu(phase):
    """Let ``phase`` prepare batches with rounded sizes, which are sent in one buffer and packed by the kernel."""
    padding, log = Padding(fillers=4, tokens=16, depth=4, states=7), DeviceLog(phase.log, CPU, 2**40)

    def batch(index, key):
        parcel = Parcel(phase.places(index, key, padding), pinned=False)
        content = parcel.opened(parcel.host.clone())
        return replace(content, inputs=log.after(content.inputs))

    phase.batch = batch
    return phase


@pytest.mark.parametrize("name", ["spt", "rpt"])
def test_two_steps_keep_the_tolerances(name, monkeypatch):
    from tests.support import triton_interpreter

    truth = two_steps(phase_of(name, torch.float64, reference.LARES))
    twin = two_steps(phase_of(name, torch.float32, reference.LARES))
    with triton_interpreter.interpreted(monkeypatch):
        found = two_steps(as_on_a_gpu(phase_of(name, torch.float32, lambda c: lares_fast.LARES(c, backend="triton"))))
    oracle.check("forward", found[0], twin[0], truth[0])
    oracle.check("gradient", found[1], twin[1], truth[1])
