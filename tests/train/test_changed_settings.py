"""A setting that has another value when a run is resumed is applied and announced, or rejected."""

import json
from dataclasses import fields, replace
from itertools import chain

import numpy as np
import pytest
import torch

from lares_fast import LARESConfig, _native
from lares_fast._errors import InputError
from lares_fast.data import leave_one_out, log_from_sequences, temporal_split
from lares_fast.train import DataConfig, EvalConfig, Interrupted, RPTConfig, RunConfig, SPTConfig, Trainer, resume
from lares_fast.train.checkpoint import load_state, save_state
from lares_fast.train.config import SECTIONS
from lares_fast.train.identity import events_digest
from lares_fast.train.resume import changed_environment, environment, settings_of
from lares_fast.train.source import with_source
from tests.support import train_run
from tests.support.changed_settings import BEST, EVERY, OTHER, REFUSED, TOP, changed, stopped_runs


def test_the_table_has_every_setting():
    for section, kind in (("data", DataConfig), ("spt", SPTConfig), ("rpt", RPTConfig), ("evaluation", EvalConfig)):
        assert set(OTHER[section]) == {field.name for field in fields(kind)}
    assert {field.name for field in fields(RunConfig)} == {*OTHER, "model", "seed", *TOP}
    assert len(settings_of(RunConfig())) == len(EVERY)
    assert {"model": LARESConfig, "data": DataConfig, "spt": SPTConfig, "rpt": RPTConfig, "evaluation": EvalConfig} == SECTIONS


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Stop runs in the places of the table, and return the folder of their state files."""
    return stopped_runs(tmp_path_factory.mktemp("stopped"))


def test_the_places_are_what_they_are_called(stopped):
    found = {place: load_state(stopped / place / "state.pt") for place in REFUSED}
    for place, state in found.items():
        assert state["phase"] == place[:3]
        assert bool(state["step"]) == ("epoch" in place)
        assert (state["best_value"] >= 0) == bool(REFUSED[place] & BEST)
    assert found["spt, in the second epoch"]["epoch"] == 1
    assert found["rpt, in the filter"]["kept"] is None


@pytest.mark.parametrize(("section", "name"), EVERY)
def test_every_setting_is_applied_and_announced_or_refused(stopped, section, name, monkeypatch):
    # The CPU would refuse bf16.
    monkeypatch.setattr("lares_fast.train.run.checked_device", lambda config: torch.device("cpu"))
    key = f"{section}.{name}".removeprefix(".")
    for place, refused in REFUSED.items():
        new = changed(train_run.config(), section, name)
        if (section, name) in refused:
            with pytest.raises(InputError, match=rf"^{key} cannot change .* resume with {key}=") as error:
                Trainer(new, train_run.log(), train_run.split(), stopped / place)
            assert error.value.setting == f"{key}={settings_of(train_run.config())[key]}"
            continue
        trainer = Trainer(new, train_run.log(), train_run.split(), stopped / place)
        before, after = (
            settings_of(with_source(each, train_run.log(), train_run.split())) for each in (train_run.config(), new)
        )
        changes = {name: (before[name], after[name]) for name in after if before[name] != after[name]}
        assert trainer._run.news == [
            {"event": "changed", "what": "setting", "name": name, "old": old, "new": now}
            for name, (old, now) in changes.items()
        ]
        # The log in memory and its split decide about two settings. With a path, the format is no longer that of memory.
        others = {"data.format": set(), "data.split": set(), "data.path": {"data.path", "data.format"}}
        assert changes.keys() == others.get(key, {key})


def test_what_has_changed_is_emitted_and_written_once(tmp_path):
    train_run.train(tmp_path, ("spt",), spt_epochs=1)
    new = train_run.config(spt_epochs=2)
    new = replace(new, spt=replace(new.spt, lr=0.01), evaluation=replace(new.evaluation, ks=(5, 10)))
    for expected in ({"spt.epochs": (1, 2), "spt.lr": (0.001, 0.01), "evaluation.ks": ([5, 10, 20, 50], [5, 10])}, {}):
        seen = []
        Trainer(new, train_run.log(), train_run.split(), tmp_path, seen.append).run(("spt",))
        assert {event["name"]: (event["old"], event["new"]) for event in seen if event["event"] == "changed"} == expected
    written = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["name"] for event in written if event["event"] == "changed"] == ["spt.lr", "spt.epochs", "evaluation.ks"]


def test_the_settings_of_a_filter_that_is_off_may_change(tmp_path):
    config = train_run.config(spt_epochs=1, rpt_epochs=1)
    config = replace(config, rpt=replace(config.rpt, data_filter=False))
    Trainer(config, train_run.log(), train_run.split(), tmp_path).run(train_run.BOTH)
    Trainer(replace(config, rpt=replace(config.rpt, filter_top=7)), train_run.log(), train_run.split(), tmp_path)
    with pytest.raises(InputError, match=r"rpt\.data_filter cannot change"):
        Trainer(train_run.config(spt_epochs=1, rpt_epochs=1), train_run.log(), train_run.split(), tmp_path)


def test_an_epoch_trains_on_every_row_once_in_spite_of_stops(tmp_path, monkeypatch):
    """Another batch size is rejected in the middle of an epoch, and applied between two epochs."""
    from lares_fast.train.spt import SPT

    seen, whole = [], SPT.batch
    monkeypatch.setattr(SPT, "batch", lambda self, index, key: (seen.append(index.tolist()), whole(self, index, key))[1])
    with pytest.raises(Interrupted):
        train_run.train(tmp_path, ("spt",), stop=train_run.Stop("step", 2), spt_epochs=1)

    def sized(size, epochs):
        config = train_run.config(spt_epochs=epochs)
        return replace(config, spt=replace(config.spt, batch_size=size))

    for size in (64, 127, 256):
        with pytest.raises(InputError, match=r"spt\.batch_size cannot change from 128"):
            Trainer(sized(size, 1), train_run.log(), train_run.split(), tmp_path)
    train_run.train(tmp_path, ("spt",), spt_epochs=1)
    rows = list(range(len(train_run.split().train)))
    assert sorted(chain(*seen)) == rows
    seen.clear()
    Trainer(sized(64, 2), train_run.log(), train_run.split(), tmp_path).run(("spt",))
    assert sorted(chain(*seen)) == rows and set(map(len, seen[:-1])) == {64}


def test_a_state_of_an_earlier_version_goes_on_with_a_notice(tmp_path):
    train_run.train(tmp_path, ("spt",))
    state = load_state(tmp_path / "state.pt")
    for name in ("settings", "environment", "restarts", "seconds", "waited", "format"):
        del state[name]
    for name in ("rows", "events"):
        del state["identity"][name]
    save_state(tmp_path / "state.pt", state)
    seen = []
    Trainer(train_run.config(), train_run.log(), train_run.split(), tmp_path, seen.append).run(train_run.BOTH)
    assert any("of an earlier version and holds no settings" in event.get("text", "") for event in seen)
    assert {"settings", "environment"} <= load_state(tmp_path / "state.pt").keys()


def test_a_changed_environment_is_announced(tmp_path, monkeypatch):
    train_run.train(tmp_path, ("spt",), spt_epochs=1)
    saved = load_state(tmp_path / "state.pt")["environment"]
    assert saved["torch"] == torch.__version__ and saved["threads"] == torch.get_num_threads()
    assert saved["torch_simd"] == torch.backends.cpu.get_cpu_capability() and saved["numpy"] == np.__version__ and saved["cpu"]
    assert saved["simd"] == _native.build_info().get("simd", "none") and saved["lares_fast"] and saved["backend"] == "auto"
    monkeypatch.setenv("LARES_FAST_BACKEND", "reference")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    seen = []
    Trainer(train_run.config(spt_epochs=1), train_run.log(), train_run.split(), tmp_path, seen.append).run(("spt",))
    told = {event["name"]: (event["old"], event["new"]) for event in seen if event["event"] == "changed"}
    assert told == {"threads": (saved["threads"], 77), "backend": ("auto", "reference")}


_CPU = torch.device("cpu")


def test_everything_that_chooses_instructions_is_compared(monkeypatch):
    old = environment(_CPU)
    assert changed_environment(old, _CPU) == {}
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "OTHER")
    monkeypatch.setattr(resume, "_cpu", lambda: "Another CPU")
    monkeypatch.setattr("importlib.metadata.version", lambda name: {"lares_fast": "0.2"}.get(name, "0.1"))
    for name, value in (("MKL_CBWR", "AVX"), ("MKL_ENABLE_INSTRUCTIONS", "SSE4_2"), ("ONEDNN_MAX_CPU_ISA", "SSE41")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("lares_fast._settings.strict", lambda: True)
    new = {name: value for name, (_, value) in changed_environment(old, _CPU).items() if name != "lares_fast"}
    assert new == {
        "torch_simd": "OTHER", "cpu": "Another CPU", "numpy": "0.1", "strict": True, "MKL_CBWR": "AVX",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41",
    }  # fmt: skip


def test_a_program_that_rounds_products_to_bf16_has_another_environment():
    old, precision = environment(_CPU), torch.backends.mkldnn.matmul.fp32_precision
    assert old["fp32_precision"] == "ieee"
    try:
        # From now on torch.get_float32_matmul_precision raises an error.
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        assert changed_environment(old, _CPU) == {"fp32_precision": ("ieee", "bf16")}
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = precision


def test_entries_that_an_earlier_state_lacks_are_no_difference():
    assert changed_environment({}, _CPU) == {}
    assert changed_environment({"threads": 77, "gone": 1}, _CPU) == {"threads": (77, torch.get_num_threads())}
    # Before GPUs, states had no device.
    assert changed_environment({}, torch.device("meta")) == {"device": ("cpu", "meta")}


@pytest.mark.parametrize(
    ("phases", "meant"),
    [
        ("both", "('spt', 'rpt')"), ("spt", "('spt',)"), ("rpt", "('rpt',)"), ("", ""), (("SPT",), "('spt',)"),
        (("phase1",), "('spt',)"), (["phase2"], "('rpt',)"), (("spt", "rtp"), "('spt', 'rpt')"), ((), "('spt', 'rpt')"),
        ([], "('spt', 'rpt')"), (None, "('spt', 'rpt')"), (1, "('spt', 'rpt')"), (("spt", None), ""), (("spt", 2), ""),
        (("spt,rpt",), ""), (b"spt", ""), ({"spt": 1}, ""),
    ],
)  # fmt: skip
def test_unknown_phases_are_refused_with_a_suggestion(tmp_path, phases, meant):
    trainer = Trainer(train_run.config(), train_run.log(), train_run.split(), tmp_path)
    with pytest.raises(InputError) as error:
        trainer.run(phases)
    assert f"did you mean {meant}" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_phases_in_any_form(tmp_path):
    for number, phases in enumerate((["spt", "rpt"], ("rpt", "spt"), {"spt", "rpt"}, ("spt", "rpt", "spt"))):
        trainer = Trainer(
            train_run.config(spt_epochs=1, rpt_epochs=1), train_run.log(), train_run.split(), tmp_path / str(number)
        )
        assert {row["phase"] for row in trainer.run(phases)} >= {"spt", "rpt"}
    seen = []
    Trainer(train_run.config(spt_epochs=1, rpt_epochs=1), train_run.log(), train_run.split(), tmp_path / "0", seen.append).run(
        ["spt"]
    )
    assert any("phase spt is finished" in event.get("text", "") for event in seen)


def test_a_run_that_has_begun_does_not_start_from_another(tmp_path):
    train_run.train(tmp_path / "one", ("spt",), spt_epochs=1)
    train_run.train(tmp_path / "two", ("spt",), spt_epochs=1)
    with pytest.raises(InputError, match="needs a new folder"):
        Trainer(train_run.config(), train_run.log(), train_run.split(), tmp_path / "two").start_from(tmp_path / "one")


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (SPTConfig, {"lr": float("nan")}), (SPTConfig, {"lr": float("inf")}), (SPTConfig, {"lr": 1e39}),
        (SPTConfig, {"lr": "0.1"}), (SPTConfig, {"lr": True}), (SPTConfig, {"batch_size": 2.5}),
        (SPTConfig, {"batch_size": "8"}), (SPTConfig, {"batch_size": torch.ones(2)}), (SPTConfig, {"epochs": None}),
        (SPTConfig, {"max_steps": 1.0}), (SPTConfig, {"same_step": 1}), (SPTConfig, {"weight_decay": float("nan")}),
        (RPTConfig, {"beta": float("nan")}), (RPTConfig, {"dropout": float("nan")}), (RPTConfig, {"reward": None}),
        (EvalConfig, {"ks": 10}), (EvalConfig, {"ks": (10, 2.5)}), (EvalConfig, {"ks": "10"}),
        (EvalConfig, {"depth_ratios": (float("inf"),)}), (EvalConfig, {"noise_seed": 0.5}), (EvalConfig, {"test": "no"}),
        (DataConfig, {"path": 3}), (DataConfig, {"valid_fraction": float("nan")}), (RunConfig, {"seed": 1.5}),
        (RunConfig, {"seed": True}), (RunConfig, {"checkpoint_minutes": float("nan")}), (RunConfig, {"checkpoint_minutes": -1}),
        (RunConfig, {"spt": {"lr": 1}}), (RunConfig, {"model": None}),
    ],
)  # fmt: skip
def test_values_that_a_setting_cannot_have(kind, values):
    (name,) = values
    with pytest.raises(InputError, match=rf"{name} must be") as error:
        kind(**values)
    section = {kind: f"{section}." for section, kind in SECTIONS.items()}.get(kind, "")
    assert error.value.setting == f"{section}{name}"


def test_a_preview_checks_the_settings_of_a_model_whose_catalog_is_unknown():
    preview = LARESConfig.preview(**train_run.MODEL)
    assert preview.n_items == 2 and preview.replace(n_items=9) == LARESConfig(n_items=9, **train_run.MODEL)
    with pytest.raises(InputError, match="max_len must be at least 1"):
        LARESConfig.preview(max_len=0)


def test_numbers_of_array_libraries_can_be_saved_and_read_again(tmp_path):
    config = train_run.config(spt_epochs=1)
    config = replace(
        config,
        spt=replace(config.spt, batch_size=np.int64(128), lr=np.float64(0.001), epochs=torch.tensor(1)),
        evaluation=replace(config.evaluation, ks=[np.int32(5), 10], noise_seed=np.uint8(3)),
        model={**config.model, "mean_depth": np.int64(2), "dropout": np.float32(0.5)},
        seed=np.int64(7),
    )
    Trainer(config, train_run.log(), train_run.split(), tmp_path).run(("spt",))
    assert config.evaluation.ks == (5, 10) and type(config.spt.lr) is float
    Trainer(config, train_run.log(), train_run.split(), tmp_path).run(("spt",))


# The identity of a run

USERS = {f"u{n}": [f"i{(n * 7 + step * (n % 3 + 1)) % 23}" for step in range(6)] for n in range(30)}


def small(**changes):
    return replace(train_run.config(spt_epochs=1), evaluation=EvalConfig(ks=(5, 10)), **changes)


def test_another_log_of_the_same_shape_is_refused(tmp_path):
    """The other log has other raw ids, so the exported ids would no longer fit the model."""
    log = log_from_sequences(USERS)
    Trainer(small(), log, leave_one_out(log), tmp_path).run(("spt",))
    renamed = log_from_sequences({user: [f"x{item}" for item in items] for user, items in USERS.items()})
    reversed_items = log_from_sequences({user: items[::-1] for user, items in USERS.items()})
    for other in (renamed, reversed_items):
        with pytest.raises(InputError, match="another data"):
            Trainer(small(), other, leave_one_out(other), tmp_path)


def test_another_split_of_the_same_name_is_refused(tmp_path):
    log = log_from_sequences(USERS)
    times = np.tile(np.arange(6), 30)
    early, late = (replace(log, times=times + shift) for shift in (np.zeros(180, np.int64), np.repeat(np.arange(30) % 2, 6)))
    Trainer(small(), early, temporal_split(early, 4, 5), tmp_path).run(("spt",))
    with pytest.raises(InputError, match="another split of the same name"):
        Trainer(small(), late, temporal_split(late, 4, 5), tmp_path)


def test_the_digest_of_events_depends_on_raw_ids_but_not_on_the_order_of_users():
    shuffled = dict(sorted(USERS.items(), key=lambda pair: hash(pair[0]) % 7))
    assert list(shuffled) != list(USERS)
    digests = [
        events_digest(log_from_sequences(users))
        for users in (
            USERS,
            shuffled,
            {**USERS, "u3": USERS["u3"][::-1]},
            {f"{user}x" if user == "u3" else user: items for user, items in USERS.items()},
            {user: [item if item != "i5" else "i99" for item in items] for user, items in USERS.items()},
            {**USERS, "u3": USERS["u4"], "u4": USERS["u3"]},
        )
    ]
    assert digests[0] == digests[1] and len(set(digests)) == 5
