"""The values of every step are on the disk, and interruptions leave no trace in them."""

import csv

import pytest

from lares_fast.train import Interrupted, Trainer
from lares_fast.train.checkpoint import load_state
from lares_fast.train.steps_file import StepsFiles
from tests.support import train_run

NAMES = ("steps-spt.csv", "steps-rpt.csv")


def texts(out):
    return [(out / name).read_text() for name in NAMES]


def rows(out, name=NAMES[0]):
    return list(csv.DictReader((out / name).open()))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    train_run.train(out)
    return out


def test_there_is_a_row_for_each_step(whole):
    spt, rpt = (rows(whole, name) for name in NAMES)
    assert list(spt[0]) == ["epoch", "number", "loss", "ce", "trajectory", "step", "T", "grad_norm", "lr"]
    assert list(rpt[0]) == ["epoch", "number", "loss", "reward", "kl", "adv-nonzero", "T", "grad_norm", "lr"]
    for found, lr in ((spt, 0.001), (rpt, 0.0005)):
        assert [int(row["number"]) for row in found] == list(range(1, len(found) + 1))
        assert {row["epoch"] for row in found} == {"1", "2"}
        assert all(float(row["lr"]) == lr and float(row["grad_norm"]) > 0 for row in found)
    history = load_state(whole / "state.pt")["history"]
    (expected,) = {row["loss"] for row in history if (row["phase"], row["split"], row.get("epoch")) == ("spt", "valid", 2)}
    losses = [float(row["loss"]) for row in spt if row["epoch"] == "2"]
    assert sum(losses) / len(losses) == pytest.approx(expected, rel=1e-12)


def test_interruptions_leave_no_trace(whole, tmp_path):
    for event, count in (("step", 2), ("step", 2), ("valid", 2), ("step", 1)):
        with pytest.raises(Interrupted):
            train_run.train(tmp_path, stop=train_run.Stop(event, count))
    train_run.train(tmp_path)
    assert texts(tmp_path) == texts(whole)


def test_steps_after_the_saved_state_are_cut(whole, tmp_path):
    """A killed process may have written more rows, and half a row."""
    with pytest.raises(Interrupted):
        train_run.train(tmp_path, stop=train_run.Stop("step", 2))
    with (tmp_path / NAMES[0]).open("a") as file:
        file.write("1,3,9.0,9.0,9.0,9.0,9.0,9.0,9.0\n1,4,9")
    trainer = train_run.train(tmp_path)
    assert texts(tmp_path) == texts(whole)
    assert "steps-" not in str(trainer.state.history)


def test_steps_of_a_run_that_was_never_saved_are_replaced(whole, tmp_path):
    (tmp_path / NAMES[0]).write_text("epoch,number\n1,1\n")
    train_run.train(tmp_path)
    assert texts(tmp_path) == texts(whole)


@pytest.mark.parametrize("damage", [lambda data: data[:40], lambda data: b"x" + data[1:], lambda data: b""])
def test_damage_is_told_and_training_goes_on(tmp_path, damage):
    train_run.train(tmp_path, ("spt",), spt_epochs=1)
    path = tmp_path / NAMES[0]
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    events = []
    trainer = Trainer(train_run.config(), train_run.log(), train_run.split(), tmp_path, events.append)
    trainer.run(("spt",))
    told = [event["text"] for event in events if event["event"] == "notice" and NAMES[0] in event["text"]]
    assert len(told) == 1 and "is damaged or lacks lines that it had" in told[0]
    assert path.read_bytes().startswith(damaged) and path.read_text().endswith("\n")
    # The next run finds the file as the state describes it.
    events.clear()
    Trainer(train_run.config(spt_epochs=3), train_run.log(), train_run.split(), tmp_path, events.append).run(("spt",))
    assert not [event for event in events if event["event"] == "notice" and NAMES[0] in event["text"]]


def test_rows_are_written_before_there_are_many(tmp_path):
    files = StepsFiles(tmp_path, {})
    for number in range(250):
        files.add("spt", {"number": number, "loss": 0.5})
    assert len(rows(tmp_path)) == 200
    files.flush()
    assert [int(row["number"]) for row in rows(tmp_path)] == list(range(250))
    size, _ = files.sizes()["spt"]
    assert size == (tmp_path / NAMES[0]).stat().st_size and list(files.sizes()) == ["spt"]
