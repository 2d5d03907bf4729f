"""The number of launches of a training step on a GPU, without CUDA graphs: forward, backward and the update of the weights."""

import itertools
import re
from pathlib import Path

import pytest
import torch

from lares_fast.train import EvalConfig, RPTConfig, RunConfig, SPTConfig, phases, rpt, spt
from lares_fast.train.keys import step_key
from lares_fast.train.run import Run
from lares_fast.train.steps import DeviceSteps, make_steps
from tests.support import train_run
from tests.support.fake_device import DEVICE, FakeDevice

PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"
# Phase -> (the depths T, the most launches).
MOST = {"spt": ((5, 5, 5), 100), "rpt": ((3, 8, 5, 4), 130)}


def counted(name, monkeypatch, tmp_path, precision="fp32", **model):
    """Return the launches of one step after the first one. The model has the published sizes."""
    depths = itertools.cycle(MOST[name][0][:2] if name == "spt" else MOST[name][0])
    for module in (spt, rpt):
        monkeypatch.setattr(module, "sample_batch_depth", lambda config, batch, generator: torch.full((batch,), next(depths)))
    monkeypatch.setattr("lares_fast.train.run.checked_device", lambda config: DEVICE)
    config = RunConfig(
        model={"max_len": 8, **model}, spt=SPTConfig(batch_size=8), rpt=RPTConfig(batch_size=8, data_filter=False),
        evaluation=EvalConfig(), precision=precision,
    )  # fmt: skip
    with FakeDevice(allowed=True) as device:
        run = Run(config, train_run.log(), train_run.split(), tmp_path, lambda _: None)
        if name == "rpt":
            run.state.progress.best = {key: value.cpu() for key, value in run.model.state_dict().items()}
            run.enter("rpt")
        phase = phases.make_phase(run)
        steps = make_steps(run, phase, run.make_optimizer(phase.settings))
        assert isinstance(steps, DeviceSteps)
        phase.train()
        for number in range(2):
            device.launches.clear()
            device.allowed = number == 0
            steps.make(steps.prepare([(torch.arange(8), step_key((1, 2), number))]), None)
    return device.launches


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MOST)
def test_a_step_has_few_launches_and_the_page_says_how_many(name, precision, monkeypatch, tmp_path):
    launches = counted(name, monkeypatch, tmp_path, precision)
    assert launches.total() <= MOST[name][1], launches.table()
    (row,) = re.findall(rf"^\| phase {1 + (name == 'rpt')}, T .* \| (\d+) \| (\d+) \|$", PAGE.read_text(), re.M)
    assert int(row[precision == "bf16"]) == launches.total(), launches.table()
