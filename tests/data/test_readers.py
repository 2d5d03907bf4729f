"""Every format gives an equal log. Every broken file raises one sentence with the file and the place."""

import json
import sys
from subprocess import run

import numpy as np
import pytest

from lares_fast._errors import InputError
from lares_fast.data import _text, log_from_sequences, read_log

HISTORIES = {3: [7, 5, 9, 5], 1: [5, 9, 7], 2: [12, 7, 5]}
INTER_HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
CSV_HEADER = "user_id,item_id,timestamp\n"


def events(histories=HISTORIES):
    """Return (user, item, time) out of order: only a sort by time restores the order."""
    found = [(user, item, 100 + 10 * at) for user, items in histories.items() for at, item in enumerate(items)]
    return sorted(found, key=lambda event: (-event[2], event[0]))


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def contents(log):
    return {log.user_ids[u]: [log.item_ids[item] for item in log.history(u)] for u in range(log.n_users)}


def write_format(folder, kind, histories=HISTORIES):
    rows = events(histories)
    if kind == "sequences":
        return written(folder / "log.txt", "".join(f"{u} {' '.join(map(str, items))}\n" for u, items in histories.items()))
    if kind == "pairs":
        return written(folder / "pairs.txt", "".join(f"{u} {item}\n" for u, items in histories.items() for item in items))
    if kind == "json":
        return written(folder / "log.json", json.dumps(histories))
    if kind == "inter":
        return written(folder / "log.inter", INTER_HEADER + "".join(f"{u}\t{i}\t5.0\t{t}\n" for u, i, t in rows))
    if kind == "csv":
        return written(folder / "log.csv", CSV_HEADER + "".join(f"{u},{i},{t}\n" for u, i, t in rows))
    if kind == "tsv":
        return written(folder / "log.tsv", (CSV_HEADER + "".join(f"{u},{i},{t}\n" for u, i, t in rows)).replace(",", "\t"))
    arrow = pytest.importorskip("pyarrow")
    users, items, times = (list(column) for column in zip(*rows, strict=True))
    return parquet(
        folder / "log.parquet", {"user_id": users, "item_id": items, "timestamp": arrow.array(times, "timestamp[s]")}
    )


def parquet(path, columns):
    arrow, arrow_parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    arrow_parquet.write_table(arrow.table(columns), path)
    return path


FORMATS = ("sequences", "pairs", "json", "inter", "csv", "tsv", "parquet")


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_detected_and_gives_the_histories(tmp_path, kind):
    log = read_log(write_format(tmp_path, kind))
    assert contents(log) == HISTORIES
    assert log.item_ids.tolist() == [0, 5, 7, 9, 12]
    assert (log.items.dtype, log.offsets.dtype, log.user_ids.dtype) == (np.int32, np.int64, np.int64)
    assert (log.times is None) == (kind in ("sequences", "pairs", "json"))
    assert log.dropped == {}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_keeps_string_ids(tmp_path, kind):
    named = {f"ü{user}": [f"B{item:03d}" for item in items] for user, items in HISTORIES.items()}
    log = read_log(write_format(tmp_path, kind, named))
    assert contents(log) == named
    assert log.lookup_items(["B012", "nothing", "B005"]).tolist() == [
        log.item_ids.tolist().index("B012"),
        0,
        log.item_ids.tolist().index("B005"),
    ]
    assert log.lookup_users(["ü2", "nobody"]).tolist() == [log.user_ids.tolist().index("ü2"), -1]


@pytest.mark.parametrize("kind", FORMATS)
def test_blocks_smaller_than_the_file_change_nothing(tmp_path, kind, monkeypatch):
    path = write_format(tmp_path, kind)
    monkeypatch.setattr(_text, "BLOCK_BYTES", 7)
    monkeypatch.setattr("lares_fast.data._tables.BATCH_ROWS", 3)
    assert contents(read_log(path)) == HISTORIES


@pytest.mark.parametrize("kind", FORMATS)
def test_progress_ends_at_the_size_of_the_file(tmp_path, kind):
    path, calls = write_format(tmp_path, kind), []
    read_log(path, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (path.stat().st_size,) * 2
    assert calls == sorted(calls)


def test_short_users_are_dropped_and_counted_with_their_items(tmp_path):
    log = read_log(written(tmp_path / "a.txt", "1 5 6\n2 9 7 9\n3\n4 6\n"))
    assert contents(log) == {2: [9, 7, 9]}
    assert log.item_ids.tolist() == [0, 7, 9]
    assert log.dropped == {"users with fewer than 3 events": 3, "events of those users": 3}
    assert "users with fewer than 3 events (3)" in log.summary()
    assert read_log(tmp_path / "a.txt", min_events=2).n_users == 2


def test_integer_ids_without_gaps_keep_their_numbers(tmp_path):
    log = read_log(written(tmp_path / "a.txt", "1 3 2 1\n2 4 1 3\n"))
    assert log.items.tolist() == [3, 2, 1, 4, 1, 3]


def test_events_at_one_time_keep_the_order_of_the_file(tmp_path):
    rows = "".join(f"1,{item},5\n" for item in (9, 3, 7, 1))
    assert contents(read_log(written(tmp_path / "a.csv", CSV_HEADER + rows))) == {1: [9, 3, 7, 1]}


def test_columns_can_be_named_and_time_left_out(tmp_path):
    path = written(tmp_path / "a.csv", "who,what,when\n1,5,3\n1,6,2\n1,7,1\n")
    assert contents(read_log(path, columns={"user": "who", "item": "what", "time": "when"})) == {1: [7, 6, 5]}
    log = read_log(path, columns={"user": "who", "item": "what", "time": None})
    assert contents(log) == {1: [5, 6, 7]}
    assert log.times is None


def test_ids_that_become_text_late_are_text_from_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(_text, "BLOCK_BYTES", 20)
    path = written(tmp_path / "a.inter", INTER_HEADER + "7\t10\t1\t1\n7\t11\t1\t2\n7\t011\t1\t3\n7\t10\t1\t4\n")
    assert contents(read_log(path)) == {7: ["10", "11", "011", "10"]}


def test_windows_line_ends_byte_order_mark_and_missing_last_newline_are_read(tmp_path):
    assert contents(read_log(written(tmp_path / "a.txt", "\ufeff1 5 6 7\r\n\r\n2 7 6 5"))) == {1: [5, 6, 7], 2: [7, 6, 5]}


def test_categorical_and_date_columns_of_parquet_are_read(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    columns = {
        "user_id": arrow.array(["a"] * 3).dictionary_encode(),
        "item_id": arrow.array([0, -4, 0], "int16"),
        "timestamp": arrow.array([3, 2, 1], "date32"),
    }
    assert contents(read_log(parquet(tmp_path / "a.parquet", columns))) == {"a": [0, -4, 0]}


def test_mapping_in_memory_is_read_like_json():
    assert contents(log_from_sequences({"u": ["x", "y", "x"], "v": np.array(["y", "y", "x"])})) == {
        "u": ["x", "y", "x"],
        "v": ["y", "y", "x"],
    }
    assert contents(log_from_sequences({1: [4, 5, 4]})) == {1: [4, 5, 4]}


TEXT_ERRORS = {
    "text-word": ("a.txt", "1 5 6 7\n\n2 5 six 7\n", r"a\.txt, line 3: item id 'six' is not an integer"),
    "text-zero": ("a.txt", "1 5 6 7\n2 0 5 9\n", r"a\.txt, line 2: item id '0' is not greater than 0"),
    "text-negative": ("a.txt", "1 5 6 7\n2 5 -3 9\n", r"a\.txt, line 2: item id '-3' is not greater than 0"),
    "text-negative-user": ("a.txt", "1 5 6 7\n-2 5 3 9\n", r"a\.txt, line 2: user id '-2' is not greater than 0"),
    "text-user-twice": ("a.txt", "1 5 6 7\n2 5 6 7\n1 8 9 7\n", r"a\.txt, line 3: user 1 has a line already"),
    "text-binary": ("a.txt", b"1 5 6 7\n2 5 \x00 9\n", r"a\.txt, line 2: this is not UTF-8 text"),
    "text-encoding": ("a.txt", "1 5 6 7\n2 é 5 9\n".encode("latin-1"), r"a\.txt, line 2: this is not UTF-8 text"),
    "text-blank": ("a.txt", "\n \n", r"a\.txt: no user has 3 events or more"),
    "text-empty": ("a.txt", "", r"a\.txt is empty"),
    "text-returns": ("a.txt", "1 5 6 7\r2 5 6 7\r", r"a\.txt, line 1: a carriage return is inside the line"),
    "text-control": ("a.txt", "1 5 6\x017 8\n", r"a\.txt, line 1: item id '6\\x017' is not an integer"),
    "text-huge": ("a.txt", "1 5 9223372036854775808 7\n", r"item id '9223372036854775808' is not an integer of 64 bits"),
    "pairs-zero": ("a.txt", "1 5\n1 6\n1 0\n", r"a\.txt, line 3: item id '0' is not greater than 0"),
    "pairs-all-short": ("a.txt", "1 5\n2 6\n", r"a\.txt: no user has 3 events or more"),
    "json-truncated": ("a.json", '{"1": [5, 6],\n"2": [7,', r"a\.json, line 2: this is not valid JSON"),
    "json-list": ("a.json", "[1, 2]", r"a\.json must hold one JSON object .* but holds a list"),
    "json-no-list": ("a.json", '{"7": 5}', r"a\.json, user '7': the items must be a list, but are a number"),
    "json-nested": ("a.json", '{"7": {"1": 2}}', r"a\.json, user '7': the items must be a list, but are an object"),
    "json-deep": ("a.json", "[" * 100_000, r"a\.json is not a JSON object"),
    "json-mixed": ("a.json", '{"1": [5, 6], "2": [5, "x"]}', r"a\.json, user '2': item 'x' must be an integer"),
    "json-zero": ("a.json", '{"1": [5, 0, 6]}', r"a\.json, user '1': item '0' must be an integer greater than 0"),
    "json-truth": ("a.json", '{"1": [5, true, 6]}', r"a\.json, user '1': item 'True' must be an integer"),
    "json-float": ("a.json", '{"1": [5, 6.5]}', r"a\.json, user '1': item '6.5' must be an integer"),
    "json-user-zero": ("a.json", '{"0": [5, 6, 7]}', r"a\.json, user 0: the user id is not greater than 0"),
    "json-encoding": ("a.json", '{"é": [5, 6, 7]}'.encode("latin-1"), r"a\.json, line 1: this is not UTF-8 text"),
    "json-surrogate": (
        "a.json",
        '{"1": ["x", "\\ud800", "y"]}',
        r"a\.json, user '1': item '\\ud800': an id must not be empty or",
    ),
    "json-user-surrogate": ("a.json", '{"\\udfff": ["x"]}', r"a\.json, user '\\udfff': an id must not be empty or"),
    "json-empty-id": ("a.json", '{"1": ["x", ""]}', r"a\.json, user '1': item '': an id must not be empty"),
    "json-empty-user": ("a.json", '{"": ["x"]}', r"a\.json, user '': an id must not be empty"),
    "json-huge": ("a.json", '{"1": [5, 9223372036854775808]}', r"item '9223372036854775808' must be an integer greater than 0"),
    "json-digits": ("a.json", '{"1": [' + "1" * 5000 + "]}", r"a\.json holds a number that is too long"),
    "json-user-twice": ("a.json", '{"1": [5], "1": [6]}', r"a\.json, user '1': the user occurs 2 times"),
    "inter-width": (
        "a.inter",
        INTER_HEADER + "1\t5\t1\t1\n1\t5\t1\n",
        r"a\.inter, line 3: the line must have 4 tab-separated fields, but it has 3",
    ),
    "inter-empty-id": ("a.inter", INTER_HEADER + "1\t\t1\t1\n", r"a\.inter, line 2: item_id is empty"),
    "inter-nan": ("a.inter", INTER_HEADER + "1\t5\t1\tnan\n", r"a\.inter, line 2: timestamp 'nan' is not a finite number"),
    "inter-word": ("a.inter", INTER_HEADER + "1\t5\t1\tnoon\n", r"a\.inter, line 2: timestamp 'noon' is not a finite number"),
    "inter-no-time": (
        "a.inter",
        "user_id:token\titem_id:token\n1\t2\n",
        r"a\.inter has no column 'timestamp' among user_id, item_id",
    ),
    "inter-benchmark": (
        "a.inter",
        "user_id:token\titem_id_list:token_seq\titem_id:token\n",
        r"a\.inter is a RecBole benchmark file",
    ),
}


@pytest.mark.parametrize("name, content, sentence", TEXT_ERRORS.values(), ids=TEXT_ERRORS)
def test_broken_text_is_one_sentence(tmp_path, name, content, sentence):
    with pytest.raises(InputError, match=sentence) as caught:
        read_log(written(tmp_path / name, content))
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_pairs_with_a_third_field_name_the_line(tmp_path):
    with pytest.raises(InputError, match=r"a\.txt, line 2: the line must have 2 user and item fields, but it has 3"):
        read_log(written(tmp_path / "a.txt", "1 5\n1 6 7\n"), format="pairs")


CSV_ERRORS = {
    "width": (CSV_HEADER + "1,5,3\n1,6\n", r"a\.csv cannot be read as a table: .*Row #3: Expected 3 columns, got 2"),
    "empty-id": (CSV_HEADER + "1,5,3\n1,,3\n", r"a\.csv, row 2: column 'item_id' has no value"),
    "empty-time": (CSV_HEADER + "1,5,3\n1,6,\n", r"a\.csv, row 2: column 'timestamp' has no value"),
    "word-time": (CSV_HEADER + "1,5,3\n1,6,noon\n", r"a\.csv: column 'timestamp' holds string"),
    "column": ("user;item\n1;2\n", r"a\.csv has no column 'user_id' among user, item"),
    "two-columns": ("user_id,user_id,item_id,timestamp\n1,1,2,3\n", r"a\.csv has 2 columns 'user_id'"),
    "binary": (b"user_id,item_id,timestamp\n1,\xff,3\n", r"a\.csv cannot be read as a table: .*invalid UTF8"),
    "binary-header": (b"user_\xff,item_id,timestamp\n1,2,3\n", r"a\.csv (cannot be read as a table|has no column)"),
    "no-line": (b"x" * 10_000_000, r"a\.csv (cannot be read as a table|has no column)"),
    "no-rows": (CSV_HEADER, r"a\.csv: no user has 3 events or more"),
}


@pytest.mark.parametrize("content, sentence", CSV_ERRORS.values(), ids=CSV_ERRORS)
def test_broken_csv_is_one_sentence(tmp_path, content, sentence):
    pytest.importorskip("pyarrow")
    with pytest.raises(InputError, match=sentence):
        read_log(written(tmp_path / "a.csv", content))


PARQUET_ERRORS = {
    "missing-id": ({"user_id": [1, None], "item_id": [1, 2], "timestamp": [1, 2]}, r"row 2: column 'user_id' has no value"),
    "empty-id": ({"user_id": [1, 1], "item_id": ["", "x"], "timestamp": [1, 2]}, r"row 1: column 'item_id' has no value"),
    "float-id": ({"user_id": [1.0, 2.0], "item_id": [1, 2], "timestamp": [1, 2]}, r"column 'user_id' holds double"),
    "nan-time": (
        {"user_id": [1, 1], "item_id": [1, 2], "timestamp": [1.0, float("nan")]},
        r"row 2: column 'timestamp' is not a finite",
    ),
    "text-time": ({"user_id": [1, 1], "item_id": [1, 2], "timestamp": ["1", "2"]}, r"column 'timestamp' holds string"),
    "column": ({"user": [1], "item_id": [1], "timestamp": [1]}, r"has no column 'user_id' among user, item_id, timestamp"),
    "huge-time": (
        {"user_id": [1], "item_id": [1], "timestamp": np.array([2**63], np.uint64)},
        r"cannot be read as a table: Integer value",
    ),
}


@pytest.mark.parametrize("columns, sentence", PARQUET_ERRORS.values(), ids=PARQUET_ERRORS)
def test_broken_parquet_is_one_sentence(tmp_path, columns, sentence):
    with pytest.raises(InputError, match=r"a\.parquet.*" + sentence):
        read_log(parquet(tmp_path / "a.parquet", columns))


def test_junk_named_parquet_is_one_sentence(tmp_path):
    pytest.importorskip("pyarrow")
    with pytest.raises(InputError, match=r"a\.parquet cannot be read as a table: Parquet magic bytes"):
        read_log(written(tmp_path / "a.parquet", b"junk" * 10))


def test_missing_file_and_folder_are_one_sentence(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.txt cannot be read: No such file"):
        read_log(tmp_path / "nowhere.txt")
    with pytest.raises(InputError, match=r"cannot be read: Is a directory"):
        read_log(tmp_path)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"format": "xml"}, "format must be one of auto, .* but got 'xml'"),
        ({"columns": {"user": "u"}}, "columns name the columns of inter, csv and parquet files"),
        ({"format": "csv", "columns": {"title": "t"}}, "columns must name user, item, time, rating, but got 'title'"),
        ({"format": "csv", "columns": {"rating": "r"}}, "columns name a rating column, which only min_rating uses"),
        ({"format": "csv", "columns": {"rating": None}, "min_rating": 4}, "columns must name the rating column"),
        ({"min_rating": 4}, "min_rating compares ratings, but .* is read as sequences, which has none"),
        ({"min_rating": "4"}, "min_rating must be a number"),
        ({"min_item_events": 0}, "min_item_events must be at least 1"),
        ({"duplicates": "drop"}, "duplicates must be one of keep, same-time, first, last, but got 'drop'"),
        ({"duplicates": "same-time"}, "a.txt is read without times, which duplicates=same-time compares"),
        ({"separator": "tab"}, "separator is for csv, but .*a.txt is read as sequences"),
        ({"separator": "space", "format": "csv"}, "separator must be one of auto, comma, tab, semicolon, pipe"),
        ({"format": "csv", "columns": {"item": None}}, "columns must name the item column"),
        ({"min_events": 0}, "min_events must be at least 1"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        read_log(written(tmp_path / "a.txt", "1 5 6 7\n"), **arguments)


@pytest.mark.parametrize(
    "sequences, sentence",
    [
        ({1: [10**5000] * 3}, "user '1': item with thousands of digits must be an integer greater than 0 and of 64 bits"),
        ({10**5000: [1, 2, 3]}, "user with thousands of digits: write ids beyond 64 bits as strings"),
        ({1: [2**63, 1, 1]}, "item '9223372036854775808' must be an integer"),
        ({1: b"abc"}, "user '1': the items must be a list, but are of type bytes"),
        ({1: {5, 6, 7}}, "the items must be a list, but are of type set"),
        ({1: [[5], 6, 7]}, "item of type list must be an integer"),
        ({1.0: [5, 6, 7]}, "user '1.0': a user id must be an integer or a string"),
        ({None: [5, 6, 7]}, "user 'None': a user id must be an integer or a string"),
        ({b"u": [5, 6, 7]}, "user of type bytes: a user id must be an integer or a string"),
        ({"\ud800": [5, 6, 7]}, r"user '\\ud800': an id must not be empty or hold a lone surrogate"),
        ({"u": ["x", "y", "\udc00"]}, r"item '\\udc00': an id must not be empty or hold a lone surrogate"),
    ],
)
def test_wrong_mappings_are_one_sentence(sequences, sentence):
    with pytest.raises(InputError, match=sentence):
        log_from_sequences(sequences)


@pytest.mark.parametrize("kind", ["sequences", "pairs"])
def test_text_keeps_ids_of_64_bits_as_integers_and_longer_ones_as_strings(tmp_path, kind):
    most = 2**63 - 1
    log = read_log(write_format(tmp_path, kind, {most: [most, 1, most - 1], 3: [1, 1, most]}))
    assert contents(log) == {most: [most, 1, most - 1], 3: [1, 1, most]}
    assert log.lookup_items([most, 2**63, -(2**63), 2**64, str(most), str(2**63)]).tolist() == [3, 0, 0, 0, 3, 0]
    longer = {2**63: [2**63, 1, 10**30]}
    assert contents(read_log(write_format(tmp_path, kind, longer))) == {str(2**63): [str(2**63), "1", str(10**30)]}


def test_lookups_find_integers_as_numbers_and_as_text(tmp_path):
    log = read_log(write_format(tmp_path, "sequences"))
    assert log.lookup_items([12, 5, 6, 0]).tolist() == [4, 1, 0, 0]
    assert log.lookup_items(["12", "5"]).tolist() == [4, 1]
    assert log.lookup_users(np.array([2, 3, 99])).tolist() == [2, 0, -1]
    assert log.lookup_items([]).tolist() == []
    for masked in (np.ma.array([5, 12], mask=[0, 1]), [5, np.ma.masked], [np.ma.array(5, mask=True)]):
        with pytest.raises(InputError, match="item ids of"):
            log.lookup_items(masked)
    assert log.lookup_items(np.array([12, 2**63 + 5], np.uint64)).tolist() == [4, 0]
    for wrong in (["x"], [1.5], [None], ["1_2"], ["٥"], [True], [b"5"], np.array([5.0]), [""]):
        with pytest.raises(InputError, match=r"item ids of log\.txt are integers"):
            log.lookup_items(wrong)
    named = log_from_sequences({"u": ["x", "5", "y"]})
    assert named.lookup_items(["x", 5, np.int64(5), "z"]).tolist() == [1, 2, 2, 0]
    for wrong in ([5.0], [None], [b"x"], [True], np.array([5.0])):
        with pytest.raises(InputError, match=r"item ids of memory are integers or strings"):
            named.lookup_items(wrong)
    with pytest.raises(InputError, match=r"user must be an index in 0\.\.2, but got 3"):
        log.history(3)


def test_statistics_are_those_of_the_log(tmp_path):
    log = read_log(write_format(tmp_path, "json"))
    stats = log.statistics()
    assert (stats["users"], stats["items"], stats["interactions"], stats["min_length"], stats["max_length"]) == (3, 4, 10, 3, 4)
    assert (stats["mean_length"], stats["median_length"], stats["density"]) == (10 / 3, 3, 10 / 12)
    assert log.summary().startswith("log.json: 3 users, 4 items, 10 interactions; length mean 3.33, median 3, 3 to 4;")


def test_fingerprint_depends_on_the_events_only(tmp_path):
    one = read_log(write_format(tmp_path, "sequences"))
    assert one.fingerprint() == read_log(write_format(tmp_path, "json")).fingerprint()
    assert one.fingerprint() != read_log(write_format(tmp_path, "json", {1: [5, 7, 9], 2: [5, 9, 7]})).fingerprint()


def test_importing_the_data_package_leaves_pyarrow_alone():
    check = "import sys, lares_fast.data; sys.exit('pyarrow' in sys.modules)"
    assert run([sys.executable, "-P", "-c", check], check=False).returncode == 0
