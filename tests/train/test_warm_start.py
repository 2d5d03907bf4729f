"""A run that starts from the model of a run on another log: item rows are found by raw ids."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from lares_fast import load
from lares_fast._errors import InputError
from lares_fast.data import cutoffs, leave_one_out, log_from_sequences, temporal_split
from lares_fast.train import Trainer
from lares_fast.train.checkpoint import load_state
from tests.support import train_run

TABLE = "item_embedding.weight"


def sequences(items, seed=0):
    draw = np.random.default_rng(seed)
    return {f"u{user}": [items[at] for at in draw.permutation(len(items))[: draw.integers(5, 9)]] for user in range(60)}


def logs(kind=str):
    """Return the log of yesterday and the log of today: 5 items are gone, 7 are new, and the numbering differs."""
    first = [kind(number) for number in range(1, 61)]
    second = [kind(number) for number in range(67, 5, -1)]
    return log_from_sequences(sequences(first)), log_from_sequences(sequences(second, seed=1))


def trained(log, out, start=None, phases=("spt",), listener=lambda event: None, **changes):
    trainer = Trainer(train_run.config(**changes), log, leave_one_out(log), out, listener)
    if start is not None:
        trainer.start_from(start)
    trainer.run(phases)
    return trainer


@pytest.fixture(scope="module")
def yesterday(tmp_path_factory):
    out = tmp_path_factory.mktemp("warm") / "yesterday"
    trained(logs()[0], out)
    return out


def start(log, out, run, **changes):
    trainer = Trainer(train_run.config(**changes), log, leave_one_out(log), out)
    fresh = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.start_from(run)
    return trainer, fresh


def test_rows_follow_the_raw_ids(yesterday, tmp_path):
    before, log = load_state(yesterday / "state.pt")["best"], logs()[1]
    trainer, fresh = start(log, tmp_path / "today", yesterday)
    weights = trainer.model.state_dict()
    rows = {raw: row for row, raw in enumerate(json.loads((yesterday / "item_ids.json").read_text()))}
    kept = new = 0
    for row, raw in enumerate(log.item_ids.tolist()):
        if raw in rows:
            assert torch.equal(weights[TABLE][row], before[TABLE][rows[raw]])
            kept += row > 0
        else:
            assert torch.equal(weights[TABLE][row], fresh[TABLE][row])
            new += 1
    assert min(kept, new) > 3
    assert all(torch.equal(weights[name], before[name]) for name in before if name != TABLE)
    again, _ = start(log, tmp_path / "again", yesterday)
    assert torch.equal(again.model.state_dict()[TABLE], weights[TABLE])


def test_the_numbers_are_told_once_and_recorded(yesterday, tmp_path):
    log, out, seen = logs()[1], tmp_path / "today", []
    trained(log, out, yesterday, listener=seen.append)
    ids = {raw for raw in logs()[0].item_ids[1:]}, {raw for raw in log.item_ids[1:]}
    numbers = {"kept": len(ids[0] & ids[1]), "new": len(ids[1] - ids[0]), "missing": len(ids[0] - ids[1])}
    (told,) = (event for event in seen if event["event"] == "warm_start")
    assert {name: told[name] for name in numbers} == numbers and told["run"] == str(yesterday)
    (notice,) = (event["text"] for event in seen if event["event"] == "notice" and "another log" in event["text"])
    assert all(f"{number:,} " in notice for number in numbers.values())
    written = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert [event["kept"] for event in written if event["event"] == "warm_start"] == [numbers["kept"]]
    # The model that the run starts from is validated first.
    assert next(event["epoch"] for event in written if event["event"] == "valid") == 0
    assert set(load(out).item_ids) == ids[1]
    assert [event["event"] for event in seen].index("warm_start") < [event["event"] for event in seen].index("valid")
    later = []
    Trainer(train_run.config(spt_epochs=3), log, leave_one_out(log), out, later.append).run(("spt",))
    assert not [event for event in later if event["event"] == "warm_start"]


def test_both_phases_can_follow_and_a_chain_goes_on(yesterday, tmp_path):
    trained(logs()[1], tmp_path / "one", yesterday, phases=train_run.BOTH, spt_epochs=1, rpt_epochs=1)
    trained(logs()[0], tmp_path / "two", tmp_path / "one", phases=("rpt",), rpt_epochs=1)
    assert load_state(tmp_path / "two" / "state.pt")["restarts"] == 2


def test_ids_are_compared_as_text(yesterday, tmp_path):
    before, log = load_state(yesterday / "state.pt")["best"], logs(int)[1]
    assert log.item_ids.dtype == np.int64
    trainer, _ = start(log, tmp_path / "today", yesterday)
    row = json.loads((yesterday / "item_ids.json").read_text()).index("42")
    assert torch.equal(trainer.model.state_dict()[TABLE][log.lookup_items([42])[0]], before[TABLE][row])


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(yesterday, tmp_path):
    from lares_fast.train import Interrupted

    log = logs()[1]
    whole = trained(log, tmp_path / "whole", yesterday)
    stop = train_run.Stop("step", 2)
    stop.trainer = Trainer(train_run.config(), log, leave_one_out(log), tmp_path / "cut", stop)
    stop.trainer.start_from(yesterday)
    with pytest.raises(Interrupted):
        stop.trainer.run(("spt",))
    cut = trained(log, tmp_path / "cut")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, cut.model.state_dict()[name])


def test_what_cannot_be_taken_over_is_refused(yesterday, tmp_path):
    log = logs()[1]
    with pytest.raises(InputError, match=r"another model: start from the same one.*; mean_depth is 2 there and 3 here\.$"):
        start(log, tmp_path / "a", yesterday, model={"mean_depth": 3})
    other = log_from_sequences(sequences([f"other{number}" for number in range(60)]))
    with pytest.raises(InputError, match=r"no item of the run in .* is in this log"):
        start(other, tmp_path / "b", yesterday)
    timed = replace(log, times=np.arange(log.n_events))
    with pytest.raises(InputError, match="another split"):
        Trainer(train_run.config(), timed, temporal_split(timed, *cutoffs(timed, 0.1, 0.1)), tmp_path / "c").start_from(
            yesterday
        )


def test_a_log_of_the_same_events_must_have_the_same_split(yesterday, tmp_path):
    log = logs()[0]
    split = leave_one_out(log)
    less = replace(split, train=replace(split.train, users=split.train.users[1:], ends=split.train.ends[1:]))
    with pytest.raises(InputError, match="another split of the same name"):
        Trainer(train_run.config(), log, less, tmp_path).start_from(yesterday)


@pytest.mark.parametrize("fault", ["edited", "missing", "of another run"])
def test_the_list_of_items_is_verified(tmp_path, fault):
    before, log = logs()
    trained(before, tmp_path / "run", spt_epochs=1)
    path = tmp_path / "run" / "item_ids.json"
    if fault == "edited":
        path.write_text(path.read_text().replace('"42"', '"99"'))
    if fault == "missing":
        path.unlink()
    if fault == "of another run":
        trained(log, tmp_path / "other", spt_epochs=1)
        for name in ("item_ids.json", "model.safetensors"):
            (tmp_path / "run" / name).write_bytes((tmp_path / "other" / name).read_bytes())
    words = {"edited": "is damaged", "missing": "cannot be read", "of another run": "is not of the run in state.pt"}
    with pytest.raises(InputError, match=rf"{words[fault]}.*lares-fast train --resume .* writes it again"):
        start(log, tmp_path / "today", tmp_path / "run")
