"""A log is read alike by read_log and by the settings of a run, and the settings of a run fit files of other formats."""

import dataclasses
from pathlib import Path

import pytest

from lares_fast._errors import InputError
from lares_fast.cli.inputs import open_log, settings_for
from lares_fast.data import read_log
from lares_fast.train import DataConfig
from tests.support.command_line import events, write_csv

NAMES = {"user": "who", "item": "what", "time": "when", "rating": "stars"}
ARGUMENTS = {"min_rating": 2.0, "duplicates": "first", "min_events": 4, "min_item_events": 3, "separator": "semicolon"}
NOT_READING = ("split", "valid_fraction", "test_fraction", "synthetic_users", "synthetic_items", "synthetic_seed")


@pytest.fixture
def log_file(tmp_path):
    rows = [(user, item, time, item % 5 + 1) for user, item, time in events(int)]
    path = write_csv(tmp_path / "shop.csv", rows, list(NAMES.values()))
    path.write_text(path.read_text().replace(",", ";"))
    return path


def test_settings_and_arguments_have_the_same_names_and_defaults():
    arguments = {name: value for name, value in read_log.__kwdefaults__.items() if name not in ("columns", "progress")}
    settings = {field.name: field.default for field in dataclasses.fields(DataConfig) if field.name not in NOT_READING}
    assert settings == {"path": None, **dict.fromkeys(NAMES), **arguments}


@pytest.mark.parametrize("time", ["when", None])
def test_a_log_names_the_settings_that_read_it_again(log_file, time):
    log = read_log(log_file, columns={**NAMES, "time": time}, **ARGUMENTS)
    assert len(log.dropped) > 2 and (log.times is None) == (time is None)
    settings = DataConfig(**log.source)
    assert settings == DataConfig(path=str(log_file), **{**NAMES, "time": time or "none"}, **ARGUMENTS)
    again = open_log(settings)
    assert (again.fingerprint(), again.dropped) == (log.fingerprint(), log.dropped)
    histories = open_log(settings, histories=True)
    assert histories.lengths.min() < 4 and len(histories.dropped) < len(log.dropped)


def test_the_settings_of_a_run_fit_other_files(tmp_path, log_file):
    run = DataConfig(path=str(log_file), **NAMES, **ARGUMENTS)
    files = {
        "new.csv": "x",
        "new.parquet": "PAR1",
        "new.inter": "x",
        "new.json": "{",
        "new.dat": "1::2::3::4",
        "new.txt": "1 2 3",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    kept = {name: settings_for(tmp_path / name, run, run.path, ()) for name in files}
    assert kept["new.csv"] == run
    table = dataclasses.replace(run, format="auto", separator="auto")
    assert kept["new.parquet"] == kept["new.inter"] == table
    no_names = dataclasses.replace(table, user=None, item=None, time=None, rating=None)
    assert kept["new.dat"] == no_names
    assert kept["new.json"] == kept["new.txt"] == dataclasses.replace(no_names, min_rating=None)
    same_time = dataclasses.replace(run, duplicates="same-time")
    assert settings_for(tmp_path / "new.json", same_time, run.path, ()).duplicates == "keep"
    given = settings_for(tmp_path / "new.json", run, run.path, ("data.user", "data.min_rating"))
    assert (given.user, given.item, given.min_rating) == ("who", None, 2.0)


@pytest.mark.parametrize("change", [{"min_rating": 1.0}, {"duplicates": "last"}, {"min_events": 4}, {"min_item_events": 2}])
def test_a_synthetic_log_has_no_filters(change):
    with pytest.raises(InputError, match=rf"data\.{next(iter(change))} has no effect on a synthetic log"):
        open_log(DataConfig(**change))


@pytest.mark.parametrize("change", [{"min_events": 0}, {"min_item_events": -1}, {"duplicates": "all"}, {"min_rating": "4"}])
def test_wrong_settings_are_named(change):
    with pytest.raises(InputError, match=rf"data\.{next(iter(change))} must be"):
        DataConfig(**change)


def test_a_missing_file_is_one_sentence(log_file):
    with pytest.raises(InputError, match=r"nowhere\.csv cannot be read"):
        settings_for(Path("nowhere.csv"), DataConfig(), str(log_file), ())
