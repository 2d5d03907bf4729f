"""A run that is cut at any point and resumed ends with the same bits as an uninterrupted run."""

import itertools
from dataclasses import replace

import pytest
import torch

from lares_fast._errors import InputError
from lares_fast.train import Interrupted, Trainer
from lares_fast.train.checkpoint import load_state, save_state
from lares_fast.train.state import load_run
from tests.support import train_run

WALL_TIME = ("seconds", "data_wait", "ms_per_user")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the folder of an uninterrupted run of both phases, two epochs each."""
    out = tmp_path_factory.mktemp("whole")
    train_run.train(out)
    return out


def assert_same(one, other):
    a, b = (load_state(out / "state.pt") for out in (one, other))
    for part in ("model", "best", "start"):
        assert a[part].keys() == b[part].keys()
        assert all(torch.equal(a[part][name], b[part][name]) for name in a[part]), f"{part} differs"
    for index, moments in a["optimizer"]["state"].items():
        assert all(torch.equal(value, b["optimizer"]["state"][index][name]) for name, value in moments.items())
    histories = [
        sorted(str({k: v for k, v in row.items() if k not in WALL_TIME}) for row in state["history"]) for state in (a, b)
    ]
    assert histories[0] == histories[1]
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_more_epochs_equal_one_run(whole, tmp_path):
    """In both phases, k epochs and N - k epochs after a resume equal N epochs."""
    train_run.train(tmp_path, ("spt",), spt_epochs=1)
    train_run.train(tmp_path, rpt_epochs=1)
    train_run.train(tmp_path)
    assert_same(whole, tmp_path)


def test_a_newer_best_model_makes_an_earlier_test_void(tmp_path):
    """A tested run is resumed, finds a better model and is stopped before its next test."""

    def tests(history):
        return [row for row in history if (row["phase"], row["split"]) == ("spt", "test")]

    trainer = train_run.train(tmp_path, ("spt",), spt_epochs=1)
    assert tests(trainer.state.history)
    # Any later model is better.
    trainer.state.progress.best_value = 0.0
    trainer._run.save()
    with pytest.raises(Interrupted):
        train_run.train(tmp_path, ("spt",), stop=train_run.Stop("valid", 1), spt_epochs=3)
    assert not tests(load_state(tmp_path / "state.pt")["history"])


def test_the_same_run_again_is_the_same_and_another_seed_is_not(whole, tmp_path):
    train_run.train(tmp_path / "again")
    assert_same(whole, tmp_path / "again")
    other = Trainer(replace(train_run.config(), seed=8), train_run.log(), train_run.split(), tmp_path / "other")
    other.run(("spt",))
    name = "item_embedding.weight"
    assert not torch.equal(other.model.state_dict()[name], load_state(whole / "state.pt")["start"][name])


@pytest.mark.parametrize(("event", "count"), [
    ("step", 1), ("step", 3), ("step", 5), ("step", 7),
    ("progress", 1), ("progress", 2), ("progress", 3), ("progress", 6), ("progress", 8), ("progress", 10),
])  # fmt: skip
def test_a_stop_anywhere(event, count, whole, tmp_path):
    """The run stops within or after an epoch, in validation, in the test or in the row filter, in each phase."""
    with pytest.raises(Interrupted, match="resume with lares-fast train --resume"):
        train_run.train(tmp_path, stop=train_run.Stop(event, count))
    train_run.train(tmp_path)
    assert_same(whole, tmp_path)


@pytest.mark.parametrize(("event", "error"), [("begin", KeyError), ("step", KeyboardInterrupt), ("valid", KeyError)])
def test_a_trainer_runs_again_after_its_listener_has_raised(event, error, whole, tmp_path, monkeypatch):
    """It continues from the last saved state, in the same folder even if the working directory has changed."""
    seen = []

    def fail_at_the_second(record):
        if record["event"] == event:
            seen.append(record)
            if len(seen) == (1 if event == "begin" else 2):
                monkeypatch.chdir("/")
                raise error

    monkeypatch.chdir(tmp_path)
    trainer = Trainer(train_run.config(), train_run.log(), train_run.split(), "run", fail_at_the_second)
    with pytest.raises(error):
        trainer.run(train_run.BOTH)
    trainer.run(train_run.BOTH)
    assert_same(whole, tmp_path / "run")


def test_a_trainer_runs_again_after_a_stop(whole, tmp_path):
    stop = train_run.Stop("step", 3)
    stop.trainer = Trainer(train_run.config(), train_run.log(), train_run.split(), tmp_path, stop)
    with pytest.raises(Interrupted):
        stop.trainer.run(train_run.BOTH)
    stop.trainer.run(train_run.BOTH)
    assert_same(whole, tmp_path)


def test_the_state_file_holds_exactly_these_entries(whole):
    """Other versions read them by these names."""
    names = (
        "format identity phase restarts history epoch step steps sums seconds waited best_value best_epoch bad_epochs best "
        "kept optimizer model start settings environment files"
    )
    state = load_state(whole / "state.pt")
    assert list(state) == names.split()
    saved = load_run(whole / "state.pt")
    assert (saved.state.phase, saved.state.progress.epoch, saved.state.history) == ("rpt", 2, state["history"])
    assert all(torch.equal(saved.model[name], value) for name, value in state["model"].items())


def test_a_stop_in_the_validation_after_the_last_allowed_step(tmp_path):
    """The resumed run validates the epoch that ``max_steps`` ended, and so has a best model."""
    short = replace(train_run.config(), spt=replace(train_run.config().spt, max_steps=2))
    stop = train_run.Stop("progress", 1)
    stop.trainer = Trainer(short, train_run.log(), train_run.split(), tmp_path / "cut", stop)
    with pytest.raises(Interrupted):
        stop.trainer.run(("spt",))
    for out in ("cut", "whole"):
        Trainer(short, train_run.log(), train_run.split(), tmp_path / out).run(("spt",))
    cut, whole = (load_state(tmp_path / out / "state.pt") for out in ("cut", "whole"))
    assert cut["best_epoch"] == 1
    assert all(torch.equal(cut["best"][name], whole["best"][name]) for name in whole["best"])


def test_stopped_twice(whole, tmp_path):
    for _ in range(2):
        with pytest.raises(Interrupted):
            train_run.train(tmp_path, stop=train_run.Stop("step", 2))
    train_run.train(tmp_path)
    assert_same(whole, tmp_path)


def test_a_periodic_checkpoint_in_the_middle_of_an_epoch(whole, tmp_path, monkeypatch):
    """A killed run is resumed from its last periodic checkpoint."""

    class KilledError(Exception):
        pass

    def kill(record):
        if record["event"] == "step" and record["step"] == 2:
            raise KilledError

    with pytest.raises(KilledError):
        Trainer(train_run.config(checkpoint_minutes=0.0), train_run.log(), train_run.split(), tmp_path, kill).run(
            train_run.BOTH
        )
    assert load_state(tmp_path / "state.pt")["step"] == 1
    train_run.train(tmp_path)
    assert_same(whole, tmp_path)


def test_a_resumed_run_takes_other_settings(tmp_path):
    """The optimizer uses the new settings too, although its saved state holds the old ones."""
    before = train_run.train(tmp_path, ("spt",), spt_epochs=1).model.state_dict()
    settings = train_run.config()
    other = replace(settings, spt=replace(settings.spt, lr=1e-30))
    trainer = Trainer(other, train_run.log(), train_run.split(), tmp_path)
    trainer.run(("spt",))
    after = load_state(tmp_path / "state.pt")["model"]
    assert trainer.state.history[-1]["epoch"] == 2
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(("change", "named"), [
    ({"model": {"mean_depth": 3}}, "another model"),
])  # fmt: skip
def test_another_run_is_not_resumed(change, named, whole):
    with pytest.raises(InputError, match=named):
        train_run.train(whole, **change)


def test_rpt_from_the_model_of_another_run(whole, tmp_path):
    """The result equals a run of both phases in one folder, whether the other run is in phase 1 or in phase 2."""
    train_run.train(tmp_path / "spt", ("spt",))
    for parent in (whole, tmp_path / "spt"):
        out = tmp_path / f"from-{parent.name}"
        before = (parent / "state.pt").read_bytes()
        stop = train_run.Stop("step", 3)
        stop.trainer = Trainer(train_run.config(), train_run.log(), train_run.split(), out, stop)
        stop.trainer.start_from(parent)
        with pytest.raises(Interrupted):
            stop.trainer.run(("rpt",))
        train_run.train(out, ("rpt",))
        assert (parent / "state.pt").read_bytes() == before
        ended, expected = load_state(out / "state.pt"), load_state(whole / "state.pt")
        for part in ("model", "best", "start"):
            assert all(torch.equal(ended[part][name], expected[part][name]) for name in expected[part])
        assert {row["phase"] for row in ended["history"]} == {"popularity", "markov", "rpt"}


def test_spt_goes_on_from_the_model_of_another_run(tmp_path):
    """A later model must beat that model. With steps too small to change it, the run ends with it."""
    train_run.train(tmp_path / "parent", ("spt",))
    settings = train_run.config()
    for lr in (1e-30, settings.spt.lr):
        config, out = replace(settings, spt=replace(settings.spt, lr=lr)), tmp_path / f"lr-{lr}"
        # The run stops in its first validation, which ranks the model that it starts from.
        stop = train_run.Stop("progress", 1)
        stop.trainer = Trainer(config, train_run.log(), train_run.split(), out, stop)
        stop.trainer.start_from(tmp_path / "parent")
        with pytest.raises(Interrupted):
            stop.trainer.run(("spt",))
        rows = Trainer(config, train_run.log(), train_run.split(), out).run(("spt",))
        ended, parent = (load_state(folder / "state.pt") for folder in (out, tmp_path / "parent"))
        watched = [
            row["ndcg@10"]
            for row in rows
            if row["split"] == "valid" and row["history"] == "not masked" and row["phase"] == "spt"
        ]
        assert len(watched) == 1 + settings.spt.epochs and watched[0] == parent["best_value"]
        same = all(torch.equal(ended["model"][name], value) for name, value in parent["best"].items())
        assert same == (lr == 1e-30)
        assert ended["best_value"] == max(watched)


def test_each_run_of_a_chain_draws_other_random_numbers(tmp_path):
    """Steps too small to change the model still give each run of a chain another loss in its first epoch."""
    settings = train_run.config()
    still = replace(settings, spt=replace(settings.spt, lr=1e-30, epochs=1))
    losses = []
    for number in range(3):
        trainer = Trainer(still, train_run.log(), train_run.split(), tmp_path / str(number))
        if number:
            trainer.start_from(tmp_path / str(number - 1))
        losses.append(next(row["loss"] for row in trainer.run(("spt",)) if "loss" in row))
    assert len(set(losses)) == 3


def test_rpt_does_not_start_from_another_model(whole, tmp_path):
    trainer = Trainer(train_run.config(model={"mean_depth": 3}), train_run.log(), train_run.split(), tmp_path)
    with pytest.raises(InputError, match="another model: start from the same one"):
        trainer.start_from(whole)


def test_a_state_without_newer_settings_and_counters_is_resumed(whole, tmp_path):
    train_run.train(tmp_path, ("spt",))
    state = load_state(tmp_path / "state.pt")
    del state["seconds"], state["waited"], state["identity"]["model"]["per_sequence_depth"], state["format"]
    save_state(tmp_path / "state.pt", state)
    train_run.train(tmp_path)
    assert_same(whole, tmp_path)


def test_an_epoch_that_was_cut_counts_the_seconds_of_both_parts(tmp_path, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr("lares_fast.train.epoch.time.monotonic", lambda: next(clock))
    train_run.train(tmp_path / "whole", ("spt",), spt_epochs=1)
    with pytest.raises(Interrupted):
        train_run.train(tmp_path / "cut", ("spt",), spt_epochs=1, stop=train_run.Stop("step", 2))
    train_run.train(tmp_path / "cut", ("spt",), spt_epochs=1)
    whole, cut = (
        next(row["seconds"] for row in load_state(tmp_path / name / "state.pt")["history"] if "seconds" in row)
        for name in ("whole", "cut")
    )
    # The clock ticks at each reading, and a stop may add or remove one reading.
    assert abs(cut - whole) <= 1


def test_a_trial_leaves_the_test_rows_alone(tmp_path):
    trial = replace(train_run.config(), evaluation=replace(train_run.config().evaluation, test=False))
    rows = Trainer(trial, train_run.log(), train_run.split(), tmp_path).run(train_run.BOTH)
    assert {row["phase"] for row in rows if row["split"] == "test"} == {"popularity", "markov"}
    assert {row["phase"] for row in rows if row["split"] == "valid"} == {"popularity", "markov", "spt", "rpt"}


@pytest.mark.parametrize(("watch_masked", "history"), [(False, "not masked"), (True, "masked")])
def test_early_stopping_watches_the_chosen_ranking(watch_masked, history, tmp_path):
    settings = replace(train_run.config().evaluation, watch_masked=watch_masked)
    trainer = Trainer(replace(train_run.config(), evaluation=settings), train_run.log(), train_run.split(), tmp_path)
    rows = [row for row in trainer.run(("spt",)) if (row["phase"], row["split"]) == ("spt", "valid")]
    assert trainer.state.progress.best_value == max(row["ndcg@10"] for row in rows if row["history"] == history)
    assert len({row["ndcg@10"] for row in rows}) == len(rows)


def test_rpt_needs_a_model(tmp_path):
    with pytest.raises(InputError, match="holds no model of phase spt"):
        train_run.train(tmp_path, ("rpt",))
    assert not list(tmp_path.iterdir())
