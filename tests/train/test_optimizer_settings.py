"""The optimizer, the learning rate of each step, the clipping of gradients, and steps of several batches."""

from dataclasses import replace

import pytest
import torch

from lares_fast._errors import InputError
from lares_fast.train import Interrupted, SPTConfig, Trainer
from lares_fast.train.keys import step_key
from lares_fast.train.phases import make_phase
from lares_fast.train.schedule import learning_rate, most_steps, steps_of_epoch
from lares_fast.train.steps import make_steps
from tests.support import train_run
from tests.train.test_resume import assert_same

ALL = {"optimizer": "adamw", "weight_decay": 0.1, "schedule": "cosine", "warmup_steps": 2, "clip_norm": 0.5, "accumulate": 2}
SMALL = {"batch_size": 32}
# A loss that is a mean over its rows, without any random number.
PLAIN = {"alpha": 0.0, "gamma": 0.0}
STILL = {"dropout": 0.0, "depth_sampling": "constant", "state_init": "zero"}


def config(*, model=None, rpt=None, **spt):
    whole = train_run.config(spt_epochs=2, rpt_epochs=1, model=model)
    return replace(whole, spt=replace(whole.spt, **spt), rpt=replace(whole.rpt, **(rpt or {})))


def trainer(out, listen=lambda _: None, **changes):
    return Trainer(config(**changes), train_run.log(), train_run.split(), out, listen)


def steps_of(out, **changes):
    """Return the steps of phase 1, ready to be made."""
    run = trainer(out, **changes)._run
    phase = make_phase(run).train()
    return make_steps(run, phase, run.make_optimizer(phase.settings))


def test_the_rate_of_each_step():
    rates = {
        "constant": [0.5, 1.0, 1.0, 1.0, 1.0, 1.0],
        "linear": [0.5, 1.0, 1.0, 0.75, 0.5, 0.25],
        "cosine": [0.5, 1.0, 1.0, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2],
    }
    for schedule, expected in rates.items():
        settings = SPTConfig(lr=1.0, schedule=schedule, warmup_steps=2)
        assert [learning_rate(settings, step, 6) for step in range(6)] == pytest.approx(expected, abs=1e-15)
        # A resumed run may have made more steps than are left by its new settings.
        assert learning_rate(settings, 9, 6) == pytest.approx(1.0 if schedule == "constant" else 0.0)


def test_the_number_of_steps():
    settings = SPTConfig(batch_size=10, accumulate=3, epochs=4)
    assert [steps_of_epoch(settings, rows) for rows in (1, 30, 31, 61)] == [1, 1, 2, 3]
    assert most_steps(settings, 61) == 12
    assert most_steps(replace(settings, max_steps=5), 61) == 5


def test_a_run_uses_the_rate_of_each_step(tmp_path):
    rates = []
    run = trainer(tmp_path, **SMALL, schedule="linear", warmup_steps=3)
    made = run._run.make_optimizer

    def make(settings):
        optimizer = made(settings)
        optimizer.register_step_post_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
        return optimizer

    run._run.make_optimizer = make
    run.run(("spt",))
    steps = most_steps(run.config.spt, len(run.split.train))
    assert len(rates) == steps > 6
    assert rates == [learning_rate(run.config.spt, step, steps) for step in range(steps)]


def test_batches_of_one_step_are_averaged(tmp_path):
    """The gradient of two batches in one step is that of both rows in one batch, also if one batch is smaller."""
    index, found = torch.arange(50), []
    for name, sizes, accumulate in (("whole", [50], 1), ("parts", [32, 18], 2)):
        steps = steps_of(tmp_path / name, model=STILL, batch_size=max(sizes), accumulate=accumulate, **PLAIN)
        parts = [(part, step_key((1, 2), number)) for number, part in enumerate(index.split(sizes))]
        numbers = steps._numbers(steps.prepare(parts))
        found.append([*numbers, *(each.grad for each in steps.run.model.parameters())])
    # Both add the same fp32 numbers, in another order. A wrong weight of a batch would be an error of more than a tenth.
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_a_long_gradient_is_shortened(tmp_path):
    norms = []
    for name, most in (("free", None), ("loose", 1e6), ("tight", 0.01)):
        steps = steps_of(tmp_path / name, clip_norm=most)
        norm = steps._numbers(steps.prepare([(torch.arange(64), (1, 2))]))[0]
        left = torch.nn.utils.get_total_norm([each.grad for each in steps.run.model.parameters()])
        norms.append((float(norm), float(left)))
    free, loose, tight = norms
    assert free == loose and free[0] == free[1] > 0.01
    assert tight[0] == free[0] and tight[1] == pytest.approx(0.01, rel=1e-4)


def test_adamw_is_the_optimizer_of_that_name(tmp_path):
    steps = steps_of(tmp_path, optimizer="adamw", weight_decay=0.3, lr=0.01)
    expected = [each.detach().clone().requires_grad_() for each in steps.run.model.parameters()]
    own = torch.optim.AdamW(expected, lr=0.01, weight_decay=0.3)
    batch = steps.prepare([(torch.arange(64), (1, 2))])
    steps._numbers(batch)
    for mine, theirs in zip(steps.run.model.parameters(), expected, strict=True):
        theirs.grad = mine.grad.clone()
    steps.optimizer.step()
    own.step()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(steps.run.model.parameters(), expected, strict=True))


def test_a_run_with_all_of_them_is_resumed_bit_for_bit(tmp_path):
    changes = {**SMALL, **ALL, "rpt": {**SMALL, **ALL}}
    trainer(tmp_path / "whole", **changes).run(train_run.BOTH)
    for count in (3, 4, 5):
        stop = train_run.Stop("step", count)
        stop.trainer = trainer(tmp_path / "cut", stop, **changes)
        with pytest.raises(Interrupted):
            stop.trainer.run(train_run.BOTH)
        # Each cut goes on from the one before.
    trainer(tmp_path / "cut", **changes).run(train_run.BOTH)
    assert_same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"optimizer": "sgd"}, "spt.optimizer must be one of adam, adamw, but got 'sgd'"),
        ({"schedule": "step"}, "spt.schedule must be one of constant, linear, cosine, but got 'step'"),
        ({"warmup_steps": -1}, "spt.warmup_steps must be 0 or greater, but got -1"),
        ({"clip_norm": 0.0}, r"spt.clip_norm must be greater than 0, but got 0\.0"),
        ({"accumulate": 0}, "spt.accumulate must be greater than 0, but got 0"),
    ],
)
def test_wrong_values(changes, text):
    with pytest.raises(InputError, match=text):
        SPTConfig(**changes)
