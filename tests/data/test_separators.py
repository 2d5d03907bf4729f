"""The separators of text tables: guessed from the header, or given."""

import pytest

from lares_fast._errors import InputError
from lares_fast.data import read_log
from tests.support.event_tables import HEADER, events, table, written

ROWS = [(user, f"i{(user * 3 + at) % 7}", at, "x") for user in range(1, 6) for at in range(4)]
SEPARATORS = {"comma": ",", "tab": "\t", "semicolon": ";", "pipe": "|"}


def separated(path, separator, rows=ROWS, header=HEADER):
    return written(path, "".join(separator.join(map(str, row)) + "\n" for row in [header, *rows]))


@pytest.mark.parametrize("name", SEPARATORS)
@pytest.mark.parametrize("ending", ["csv", "tsv", "txt"])
def test_every_separator_is_guessed_and_can_be_given(tmp_path, name, ending):
    expected = read_log(table(tmp_path / "expected.csv", ROWS))
    path = separated(tmp_path / f"a.{ending}", SEPARATORS[name])
    for separator in ("auto", name, SEPARATORS[name]):
        log = read_log(path, format="csv", separator=separator)
        assert (log.fingerprint(), log.item_ids.tolist()) == (expected.fingerprint(), expected.item_ids.tolist())


def test_the_header_with_the_columns_is_chosen_not_the_longest(tmp_path):
    header = ["user_id", "item_id", "timestamp", "a,b,c,d,e,f"]
    rows = [(*row[:3], "1,2,3,4,5,6") for row in ROWS]
    assert read_log(separated(tmp_path / "a.csv", ";", rows, header)).n_events == len(ROWS)
    named = separated(tmp_path / "b.csv", "|", ROWS, ["who", "what", "when", "a,b,c,d,e"])
    assert read_log(named, columns={"user": "who", "item": "what", "time": "when"}).n_events == len(ROWS)
    with pytest.raises(InputError, match=r"b\.csv has no column 'user_id' among"):
        read_log(named)


def test_quotes_are_those_of_the_separator(tmp_path):
    rows = [(1, '"a;b"', 1, "x"), (1, '"c\nd"', 2, "x"), (1, "e", 3, "x")]
    assert read_log(separated(tmp_path / "a.csv", ";", rows)).item_ids.tolist() == ["", "a;b", "c\nd", "e"]
    with pytest.raises(InputError, match="line 3: a quote opens a value that no quote closes"):
        read_log(separated(tmp_path / "a.csv", ";", [ROWS[0], (1, '"a', 1, "x")]))
    rows = [(1, '"a', 1, "x"), (1, "b", 2, "x"), (1, "c", 3, "x")]
    assert read_log(separated(tmp_path / "a.csv", "\t", rows)).item_ids.tolist() == ["", '"a', "b", "c"]


def test_a_wrong_separator_names_the_setting(tmp_path):
    path = separated(tmp_path / "a.csv", ";")
    with pytest.raises(InputError, match=r"one column between the separators ',', but its header has separators ';'") as caught:
        read_log(path, separator="comma")
    assert caught.value.setting == "data.separator=auto"


@pytest.mark.parametrize("separator", ["::", "\t"])
def test_files_of_movielens_have_no_header(tmp_path, separator):
    rows = [(user, item, 3, time) for user, item, time in [(1, 5, 30), (1, 7, 10), (1, 5, 20), (2, 7, 1), (2, 5, 2), (2, 9, 3)]]
    path = written(tmp_path / "ratings.dat", "".join(separator.join(map(str, row)) + "\n" for row in rows))
    logs = [read_log(path, format="movielens")]
    if separator == "::":
        logs.append(read_log(path))
    for log in logs:
        assert [log.item_ids[log.history(user)].tolist() for user in range(2)] == [[7, 5, 5], [7, 5, 9]]
        assert events(log)["1", "7", "10"] == 1
    assert read_log(path, format="movielens", columns={"time": None}).item_ids.tolist() == [0, 5, 7, 9]
    with pytest.raises(InputError, match="has no column 'movie' among user_id, item_id, rating, timestamp"):
        read_log(path, format="movielens", columns={"item": "movie"})
    written(path, path.read_text() + separator.join("123") + "\n")
    with pytest.raises(InputError, match="line 7: the line must have 4 MovieLens fields, but it has 3"):
        read_log(path, format="movielens")
