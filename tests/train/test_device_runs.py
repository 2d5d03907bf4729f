"""Whole runs on a stand-in for a GPU: they wait only where it is said, and continue bit for bit, with and without graphs."""

import json
import math
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lares_fast._errors import InputError
from lares_fast._finite import NotFiniteError
from lares_fast.train import Interrupted, Trainer, device_log, memory, steps
from lares_fast.train import run as run_module
from lares_fast.train.checkpoint import load_state
from lares_fast.train.spt import SPT
from tests.support import train_run
from tests.support.fake_device import CPU, DEVICE, DeviceTensor, FakeDevice
from tests.train.test_resume import assert_same

# The functions that may wait: the numbers of steps are read, a state is made, saved and loaded, and rows are ranked.
WAITING = {
    "train.steps.DeviceSteps.read", "_weights.weights_of", "train.optimizer.saved_state", "train.optimizer.adam",
    "train.checkpoint.load_into", "train.run.Run.__init__", "train.run.Run.enter", "train.validation.rank_test_rows",
    "_finite.largest", "_transfer.to_host",
}  # fmt: skip


@pytest.fixture(autouse=True)
def resolved(monkeypatch):
    """Let ``cuda`` be the stand-in, which reads numbers after a number of steps only: the stand-in is slow."""
    monkeypatch.setattr(run_module, "resolve", lambda name: CPU if name == "cpu" else DEVICE)
    monkeypatch.setattr(steps, "SECONDS_AHEAD", math.inf)


@contextmanager
def on_device(also=()):
    with FakeDevice({*WAITING, *also}, compute=True) as device:
        yield device


def config(device="cuda", **changes):
    short = {"model": {"dropout": 0.2}, "spt_epochs": 1, "rpt_epochs": 1}
    whole = train_run.config(device=device, **{**short, **changes})
    quick = {"rpt": replace(whole.rpt, filter_passes=1), "evaluation": replace(whole.evaluation, depth_ratios=(1.0,))}
    return replace(whole, **quick)


def train(out, stop=None, phases=train_run.BOTH, also=(), **changes):
    """Train on the device that the settings name, and return the trainer and the events."""
    events = []

    def emit(event):
        events.append(event)
        if stop is not None:
            stop(event)

    with on_device(also) if changes.get("device") != "cpu" else _nothing():
        trainer = Trainer(config(**changes), train_run.log(), train_run.split(), out, emit)
        if stop is not None:
            stop.trainer = trainer
        trainer.run(phases)
    return trainer, events


@contextmanager
def _nothing():
    yield


class Replays:
    """A stand-in for captures. A replay computes again what was captured, from what is in the buffer by then."""

    stream = nullcontext

    def __init__(self):
        self.captured = self.replayed = 0

    def __call__(self, function):
        self.captured += 1

        def replay():
            self.replayed += 1
            function()

        return replay


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the folder of a run on the stand-in that was not interrupted."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "resolve", lambda name: CPU if name == "cpu" else DEVICE)
        train(out)
    return out


def first_losses(out):
    rows = load_state(out / "state.pt")["history"]
    return torch.tensor([row["loss"] for row in rows if row["split"] == "valid" and row.get("epoch") == 1])


def test_both_devices_have_the_same_choices(whole, tmp_path):
    """The losses of the first epochs agree, so they have the same batches, partners, depths, noise and masks."""
    train(tmp_path, device="cpu")
    torch.testing.assert_close(first_losses(whole), first_losses(tmp_path), rtol=1e-3, atol=1e-4)


def test_a_state_has_no_device(whole):
    state = load_state(whole / "state.pt")
    tensors = [*state["model"].values(), *state["best"].values(), *state["start"].values()]
    tensors += [value for values in state["optimizer"]["state"].values() for value in values.values()]
    assert {type(value) for value in tensors} <= {torch.Tensor} and {value.device for value in tensors} == {CPU}
    (group,) = state["optimizer"]["param_groups"]
    assert (group["fused"], group["capturable"], group["foreach"]) == (None, False, None)


@pytest.mark.parametrize(("event", "count"), [("step", 1), ("step", 3), ("progress", 4)])
def test_an_interrupted_run_ends_with_the_same_bits(whole, tmp_path, event, count, monkeypatch):
    # The numbers of every second step are read.
    monkeypatch.setattr(steps, "STEPS_AHEAD", 2)
    with pytest.raises(Interrupted):
        train(tmp_path, stop=train_run.Stop(event, count))
    train(tmp_path)
    assert_same(whole, tmp_path)


def assert_same_first_phase(whole, out):
    """The second phase of ``whole`` started from the best model of the run of the first phase in ``out``."""
    start, best = load_state(whole / "state.pt")["start"], load_state(out / "state.pt")["best"]
    assert all(torch.equal(start[name], value) for name, value in best.items())
    assert first_losses(whole)[0] == first_losses(out)[0]


def test_saves_within_an_epoch_change_nothing(whole, tmp_path, monkeypatch):
    """The step of such a save waits for its loss before it updates the weights."""
    saved, save = [], run_module.Run.save
    monkeypatch.setattr(run_module.Run, "save", lambda self: (saved.append(self.state.progress.step), save(self)))
    train(tmp_path, phases=("spt",), checkpoint_minutes=0.0, also={"train.steps.DeviceSteps._make"})
    assert_same_first_phase(whole, tmp_path)
    # Before the first step, before the update of each step, after the epoch, and after the test.
    assert saved == [0, 0, 1, 2, 0, 0]


def test_replays_change_nothing(whole, tmp_path, monkeypatch):
    """All full batches have one size here. The first is no replay, and the last batch of an epoch is not full."""
    few = {"model": {"dropout": 0.2, "depth_sampling": "constant", "max_len": 1}, "spt_epochs": 2, "phases": ("spt",)}
    train(tmp_path / "whole", **few)
    replays = Replays()
    monkeypatch.setattr(steps, "capture_on", lambda device, backend: replays)
    train(tmp_path / "replayed", **few)
    assert (replays.captured, replays.replayed) == (1, 2 * 2 - 1)
    a, b = (load_state(tmp_path / name / "state.pt") for name in ("whole", "replayed"))
    assert all(torch.equal(a["model"][name], value) for name, value in b["model"].items())
    assert [row["loss"] for row in a["history"] if "loss" in row] == [row["loss"] for row in b["history"] if "loss" in row]


def test_a_log_that_does_not_fit_changes_nothing(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(device_log, "SHARE", 0)
    train(tmp_path, phases=("spt",))
    assert_same_first_phase(whole, tmp_path)


@pytest.mark.parametrize(("first", "second"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_run_goes_on_on_the_other_device(first, second, tmp_path):
    train(tmp_path, phases=("spt",), device=first, spt_epochs=1)
    trainer, events = train(tmp_path, phases=("spt",), device=second, spt_epochs=2)
    told = {event["name"]: (event["old"], event["new"]) for event in events if event["event"] == "changed"}
    assert told["device"] in [(first, second), (first.replace("cuda", "meta"), second.replace("cuda", "meta"))]
    assert {(e["what"], e["name"]) for e in events if e["event"] == "changed"} >= {
        ("setting", "device"),
        ("environment", "device"),
    }
    assert trainer.state.progress.epoch == 2


def test_a_state_of_a_time_without_devices_came_from_the_cpu(tmp_path):
    from lares_fast.train.checkpoint import save_state

    train(tmp_path, phases=("spt",), device="cpu", spt_epochs=1)
    state = load_state(tmp_path / "state.pt")
    for part, name in (("settings", "device"), ("settings", "precision"), ("environment", "device")):
        del state[part][name]
    del state["format"]
    save_state(tmp_path / "state.pt", state)
    _, events = train(tmp_path, phases=("spt",), device="cpu", spt_epochs=1)
    assert not [event for event in events if event["event"] == "changed"]


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_does_not_reach_the_weights(at, what, tmp_path, monkeypatch):
    """The device goes on to the end of the epoch without a change of the weights. Then the host reads what happened."""
    forward, seen = SPT.forward, []

    def broken(self, batch):
        loss = forward(self, batch)
        seen.append({name: value.inner.clone() for name, value in self.model.named_parameters()})
        if len(seen) - 1 != at:
            return loss
        # The square root has the value 0 and an infinite slope.
        zero = (self.model.input_norm.bias[0] - self.model.input_norm.bias[0].detach()).abs()
        return loss * torch.nan if what == "loss" else loss + zero.sqrt()

    monkeypatch.setattr(SPT, "forward", broken)
    found = "the loss is nan" if what == "loss" else r"the loss is \d.* and the norm of its gradient nan"
    with on_device():
        trainer = Trainer(config(spt_epochs=1), train_run.log(), train_run.split(), tmp_path)
        with pytest.raises(NotFiniteError, match=rf"{found}.* in epoch 1 of phase spt, after {at} of its steps"):
            trainer.run(("spt",))
    assert len(seen) == 3 and trainer.state.progress.step == at
    last = {name: value.inner for name, value in trainer.model.named_parameters()}
    assert all(torch.equal(value, seen[at][name]) for name, value in last.items())


def test_too_little_memory_is_known_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 25 * 2**20)
    with on_device():
        trainer = Trainer(config(), train_run.log(), train_run.split(), tmp_path)
        with pytest.raises(
            InputError, match=r"needs about \d+\.\d MiB of memory on .*, where 25\.0 MiB are free: lower"
        ) as error:
            trainer.run(("spt",))
    assert error.value.setting.startswith("spt.batch_size=")
    events = (tmp_path / "events.jsonl").read_text().splitlines() if (tmp_path / "events.jsonl").exists() else []
    assert not [event for event in map(json.loads, events) if event["event"] == "valid"]


def test_a_step_that_does_not_fit_keeps_the_last_state_and_names_a_batch_size(tmp_path, monkeypatch):
    forward, count = SPT.forward, iter(range(100))

    def too_large(self, batch):
        if next(count) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")
        return forward(self, batch)

    monkeypatch.setattr(SPT, "forward", too_large)
    with on_device():
        trainer = Trainer(config(spt_epochs=2), train_run.log(), train_run.split(), tmp_path)
        with pytest.raises(InputError, match=r"not enough for spt\.batch_size 128: try spt\.batch_size 64") as error:
            trainer.run(("spt",))
    assert error.value.setting == "spt.batch_size=64"
    assert load_state(tmp_path / "state.pt")["epoch"] == 1
    monkeypatch.setattr(SPT, "forward", forward)
    smaller = config()
    smaller = replace(smaller, spt=replace(smaller.spt, batch_size=64))
    with on_device():
        Trainer(smaller, train_run.log(), train_run.split(), tmp_path).run(("spt",))


def test_bf16_is_for_gpus(tmp_path):
    with pytest.raises(InputError, match="precision bf16 needs a GPU, but device cpu is the CPU here") as error:
        Trainer(config("cpu", precision="bf16"), train_run.log(), train_run.split(), tmp_path)
    assert error.value.setting == "precision=fp32"


def test_bf16_rounds_the_operands_and_keeps_the_weights_in_fp32(whole, tmp_path):
    trainer, _ = train(tmp_path, precision="bf16")
    assert {value.dtype for value in trainer.model.parameters()} == {torch.float32}
    found, exact = first_losses(tmp_path), first_losses(whole)
    assert (found != exact).all()
    torch.testing.assert_close(found[0], exact[0], rtol=2e-2, atol=0)
    dtypes = {
        value.dtype for values in load_state(tmp_path / "state.pt")["optimizer"]["state"].values() for value in values.values()
    }
    assert dtypes == {torch.float32}


class NothingFromTheHost(TorchDispatchMode):
    """Fails if a launch gets a tensor that is on the CPU: replays of a graph would get its first values again."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [x for x in pytree.tree_leaves((args, kwargs or {})) if isinstance(x, torch.Tensor)]
        there = [x for x in tensors if isinstance(x, DeviceTensor)]
        out = function(*args, **(kwargs or {}))
        there += [x for x in pytree.tree_leaves(out) if isinstance(x, DeviceTensor)]
        assert not there or all(isinstance(x, DeviceTensor) for x in tensors), function
        return out


@pytest.mark.parametrize("model", [{}, {"similarity": "cos", "tau": 0.1, "per_sequence_depth": True, "adapter": "concat"}])
def test_a_step_reads_nothing_from_the_host(model, tmp_path, monkeypatch):
    """This holds from the moment when its buffer is on the device. So a graph of it has no number of its first batch."""
    step, count = steps.DeviceSteps._step, []

    def watched(self, content):
        count.append(self.phase.name)
        with NothingFromTheHost():
            step(self, content)

    monkeypatch.setattr(steps.DeviceSteps, "_step", watched)
    train(tmp_path, model={"dropout": 0.2, **model})
    assert set(count) == {"spt", "rpt"}


def test_what_comes_from_the_host_is_noticed():
    with on_device(), NothingFromTheHost():
        there = torch.ones(3, device=DEVICE)
        there.add_(1).sum()
        for call in (
            lambda: torch.ones(3).to(DEVICE, non_blocking=True),
            lambda: there.copy_(torch.ones(3), non_blocking=True),
        ):
            with pytest.raises(AssertionError):
                call()


def test_bookkeeping_is_few_launches():
    """Everything around the loss and its gradient: the batch, the norm, the numbers of the step, and Adam."""
    torch.manual_seed(0)
    with FakeDevice(WAITING, compute=True) as device:
        trainer = Trainer(config(), train_run.log(), train_run.split(), "unused")
        run = trainer._run
        from lares_fast.train.phases import make_phase

        phase = make_phase(run)
        made = steps.make_steps(run, phase, run.make_optimizer(phase.settings))
        key = (1, 2)
        for _ in range(2):
            device.launches.clear()
            batch = made.prepare([(torch.arange(128), key)])
            made.make(batch, None)
        total = sum(device.launches.values())
        device.launches.clear()
        _, (content,) = batch[0].opened(DeviceTensor(batch[0].host))
        content = replace(content, inputs=made._log.after(content.inputs))
        device.launches.clear()
        phase(content).backward()
        assert total - sum(device.launches.values()) <= 30, device.launches


def test_numbers_are_read_after_a_number_of_steps_or_of_seconds(tmp_path, monkeypatch):
    read, reads = steps.DeviceSteps.read, []
    monkeypatch.setattr(steps.DeviceSteps, "read", lambda self: (reads.append(self._unread), read(self)))
    for ahead, seconds, expected in ((50, math.inf, [3]), (2, math.inf, [2, 1]), (50, -1.0, [1, 1, 1])):
        monkeypatch.setattr(steps, "STEPS_AHEAD", ahead)
        monkeypatch.setattr(steps, "SECONDS_AHEAD", seconds)
        train(tmp_path / f"{ahead} {seconds}", phases=("spt",))
        assert reads == expected
        reads.clear()
