"""The memory that a run needs is predicted, compared with the free memory, and named in one sentence."""

import resource
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from lares_fast import LARES, LARESConfig, _memory, _weights, ops, reference
from lares_fast._errors import InputError
from lares_fast.cli import main
from lares_fast.train import Trainer, checkpoint, memory
from lares_fast.train import trainer as trainer_module
from lares_fast.train.memory import LogSizes, Need, _Weights, peak, require_memory, training_needs
from tests.support import train_run

CPU = torch.device("cpu")
SIZES = LogSizes.assumed(users=1000, items=5000, events=30_000, max_len=20)


@pytest.mark.parametrize("changes", [{}, {"adapter": "concat"}, {"adapter": "linear", "n_pre_layers": 3}, {"max_len": 7}])
def test_weights_are_counted_without_a_model(changes):
    config = LARESConfig(n_items=50, hidden_size=32, inner_size=48, **changes)
    model = LARES(config)
    weights = _Weights.of(config)
    assert weights.all == sum(value.nbytes for value in model.parameters())
    assert weights.table == model.item_embedding.weight.nbytes
    blocks = (model.pre_block, model.recurrence)
    assert weights.block == max(sum(value.nbytes for value in block.parameters()) for block in blocks)


def test_a_model_without_numbers_draws_none(monkeypatch):
    """A draw on the device ``meta`` imports PyTorch's compiler."""

    def draw(*_, **__):
        raise AssertionError("a number was drawn")

    config = LARESConfig(n_items=50, hidden_size=32)
    expected = LARES(config).state_dict()
    monkeypatch.setattr(torch.nn.init, "_no_grad_normal_", draw)
    found = reference.without_numbers(config).state_dict()
    assert {name: value.shape for name, value in found.items()} == {name: value.shape for name, value in expected.items()}
    assert all(value.is_meta for value in found.values())


def test_the_peak_counts_what_earlier_parts_keep():
    assert peak([Need("a", 10), Need("b", 5, 100), Need("c", 20, 1)]) == 115


def needed(device="cpu", phase="spt", **changes):
    config = train_run.config(**changes)
    return peak(training_needs(phase, config, LARESConfig(n_items=5000, **config.model), SIZES, device))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_larger_setting_needs_more(device):
    small, base = needed(device), train_run.config()
    for model in ({"hidden_size": 64}, {"inner_size": 512}, {"mean_depth": 9}):
        assert needed(device, model={**base.model, **model}) > small
    for phase in ("spt", "rpt"):
        settings = getattr(base, phase)
        config = replace(base, **{phase: replace(settings, batch_size=8 * settings.batch_size)})
        model = LARESConfig(n_items=5000, **config.model)
        assert peak(training_needs(phase, config, model, SIZES, device)) > needed(device, phase)


def test_a_batch_is_no_larger_than_the_log():
    """A batch size far above the number of rows must not refuse a run."""
    base = train_run.config()
    configs = [replace(base, spt=replace(base.spt, batch_size=size)) for size in (SIZES.rows, 10**9)]
    found = [peak(training_needs("spt", each, LARESConfig(n_items=5000, **each.model), SIZES, "cpu")) for each in configs]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("section", "change", "setting"),
    [
        ("spt", {"batch_size": 4096}, "spt.batch_size"),
        ("model", {"mean_depth": 5000}, "model.mean_depth"),
        ("model", {"inner_size": 10**9}, "model.inner_size"),
        ("model", {"hidden_size": 10**8}, "model.hidden_size"),
    ],
)
def test_a_run_that_does_not_fit_is_refused_with_the_setting_to_lower(monkeypatch, section, change, setting):
    base, log, split = train_run.config(), train_run.log(), train_run.split()
    free = memory._needed(base, phase="spt", log=log, split=split, device=CPU, there=0, free=0)
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    require_memory(base, log, split, ["spt"], CPU)
    old = getattr(base, section)
    large = replace(base, **{section: {**old, **change} if section == "model" else replace(old, **change)})
    with pytest.raises(
        InputError, match=rf"phase spt needs about .* of memory, and .* are free: lower {setting}, which"
    ) as error:
        require_memory(large, log, split, ["spt"], CPU)
    name, _, value = error.value.setting.partition("=")
    assert name == setting and int(value) < next(iter(change.values()))


def test_the_trainer_refuses_before_its_first_step(tmp_path, monkeypatch):
    trainer = Trainer(train_run.config(), train_run.log(), train_run.split(), tmp_path / "run")
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**20)
    with pytest.raises(InputError, match=r"phase spt needs about .* 1\.0 MiB are free"):
        trainer.run(("spt",))
    assert not (tmp_path / "run").exists()


def test_an_allocation_that_fails_names_the_batch_size(tmp_path, monkeypatch):
    trainer = Trainer(train_run.config(), train_run.log(), train_run.split(), tmp_path / "run")

    def fail(*_, **__):
        torch.empty(2**60)

    monkeypatch.setattr(trainer_module, "make_phase", fail)
    with pytest.raises(InputError, match=r"free memory is not enough for spt.batch_size .*; 4294967296.00 GiB could") as error:
        trainer.run(("spt",))
    assert error.value.setting.startswith("spt.batch_size=")


def test_the_free_memory_is_the_least_of_all_limits(tmp_path, monkeypatch):
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    monkeypatch.setattr(_memory, "_PROC", proc)
    monkeypatch.setattr(_memory, "_CGROUPS", groups)
    limits = {}
    no_limit = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(_memory.resource, "getrlimit", lambda which: limits.get(which, no_limit))
    assert _memory.free_bytes(CPU) == sys.maxsize and _memory.resident_bytes() == 0
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    (proc / "self/status").write_text("VmSize:\t 100 kB\nVmRSS:\t 50 kB\nVmData:\t 40 kB\n")
    assert _memory.free_bytes(CPU) == 8000 * 1024 and _memory.resident_bytes() == 50 * 1024

    (proc / "self/cgroup").write_text("4:cpu,memory:/a\n3:cpu:/b\n0::/c/d\n")
    for name, limit, used in (("c/d", "max", 0), ("c", 6_000_000, 1_000_000)):
        (groups / name).mkdir(parents=True, exist_ok=True)
        (groups / name / "memory.max").write_text(f"{limit}\n")
        (groups / name / "memory.current").write_text(f"{used}\n")
        (groups / name / "memory.stat").write_text("anon 5\ninactive_file 1000\n")
    assert _memory.free_bytes(CPU) == 5_001_000
    (groups / "memory/a").mkdir(parents=True)
    (groups / "memory/a/memory.limit_in_bytes").write_text("4000000")
    (groups / "memory/a/memory.usage_in_bytes").write_text("500000")
    (groups / "memory/a/memory.stat").write_text("inactive_file 7\ntotal_inactive_file 2000\n")
    assert _memory.free_bytes(CPU) == 3_502_000

    limits[resource.RLIMIT_AS] = (2_000_000, 0)
    assert _memory.free_bytes(CPU) == 2_000_000 - 100 * 1024
    limits[resource.RLIMIT_DATA] = (1_000_000, 0)
    assert _memory.free_bytes(CPU) == 1_000_000 - 40 * 1024
    limits[resource.RLIMIT_DATA] = (1000, 0)
    assert _memory.free_bytes(CPU) == 0


def test_a_damage_is_not_reported_where_memory_is_missing(tmp_path, monkeypatch):
    checkpoint.save_state(tmp_path / "state.pt", {"a": torch.zeros(3)})

    def fail(*_, **__):
        raise MemoryError("bad_alloc")

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(MemoryError):
        checkpoint.load_state(tmp_path / "state.pt")


def test_weights_are_written_in_the_format_of_safetensors(tmp_path):
    config = LARESConfig(n_items=20, hidden_size=16, inner_size=32, adapter="linear")
    weights = LARES(config).state_dict()
    weights["transposed"] = weights["recurrence.core.layers.0.feed_forward.up.weight"].T
    _weights.save_weights(tmp_path / "model", weights, config)
    found = load_file(tmp_path / "model")
    assert found.keys() == weights.keys() and all(torch.equal(found[name], value) for name, value in weights.items())


def test_a_plan_has_a_line_for_each_part(capsys, tmp_path):
    assert main(["doctor", "--plan", "tiny", "--items", "1000", "--events", "20000", "--users", "900"]) == 0
    text = capsys.readouterr().out
    assert "a log of 900 users, 1,000 items and 20,000 events" in text
    for word in ("Python and PyTorch", "log, split", "step", "evaluation", "checkpoint", "recommend", "phase rpt", "free"):
        assert word in text
    (tmp_path / "log.txt").write_text("".join(f"{user} 1 2 3 4 5 6\n" for user in range(1, 9)))
    assert main(["doctor", "--plan", "tiny", "--data", str(tmp_path / "log.txt"), "--set", "spt.batch_size=4"]) == 0
    assert "a log of 8 users, 6 items and 48 events" in capsys.readouterr().out
    assert main(["doctor", "--plan", "tiny", "--data", str(tmp_path / "log.txt"), "--users", "3"]) == 2
    assert main(["doctor", "--plan", "tiny", "--users", "3", "--events", "4"]) == 2
    assert main(["doctor", "--plan", "no such preset"]) == 2


def test_attention_needs_no_memory_for_a_bound():
    """The bound of the lengths may be huge. Scores of that size would need 2**64 bytes."""
    query = torch.randn(5, 2, 16, requires_grad=True)
    found = ops.attention(query, query, query, torch.tensor([0, 2, 5]), 2**31)
    assert torch.equal(found, ops.attention(query, query, query, torch.tensor([0, 2, 5]), 3))
    found.sum().backward()


def test_a_plan_for_a_gpu_leaves_the_host_out():
    config, model = train_run.config(), LARESConfig(n_items=5000)
    assert [need.what for need in training_needs("spt", config, model, SIZES, "cuda")] == ["model, gradients, Adam", "step"]
