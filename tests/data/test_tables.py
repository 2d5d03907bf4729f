"""Event logs as tables: no row is lost to a quote, and no value's meaning depends on where in the file it stands."""

import csv
import gzip
import io
import os
import random
import zipfile
from collections import Counter
from decimal import Decimal

import numpy as np
import pytest

from lares_fast._errors import InputError
from lares_fast.data import _tables, _text, read_log

arrow = pytest.importorskip("pyarrow")
arrow_parquet = pytest.importorskip("pyarrow.parquet")

HEADER = ["user_id", "item_id", "timestamp", "title"]
MOST = 2**63 - 1


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def table(path, rows, header=HEADER):
    """A file of ``rows`` exactly as given: no field is quoted or escaped."""
    separator = "," if path.suffix == ".csv" else "\t"
    return written(path, "".join(separator.join(map(str, row[: len(header)])) + "\n" for row in [header, *rows]))


def parquet(path, **columns):
    arrow_parquet.write_table(arrow.table(columns), path)
    return path


def events(log):
    """The events as text, without their order."""
    users = np.repeat(log.user_ids, log.lengths)
    return Counter(zip(map(str, users), map(str, log.item_ids[log.items]), map(str, log.times), strict=True))


def order(log):
    """The only user's raw items."""
    assert log.n_users == 1
    return log.item_ids[log.history(0)].tolist()


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few hundred rows, so that a short file has several."""
    monkeypatch.setattr(_text, "BLOCK_BYTES", 1 << 11)
    monkeypatch.setattr(_tables, "CSV_BLOCK_BYTES", 1 << 11)


def timed(path, times):
    """A log of one user whose item k happened at ``times[k]``."""
    if path.suffix == ".inter":
        return table(path, [(1, item, time) for item, time in enumerate(times)], HEADER[:3])
    return table(path, [(1, item, time, "x") for item, time in enumerate(times)])


# Quotes


def titled(titles):
    return [(1 + at % 7, 1 + at % 11, at, title) for at, title in enumerate(titles)]


@pytest.mark.parametrize("title", ['"Hit', 'Hit"', '7" single', '"', '""', '"a" b', '"all"', "it's", '\\"x'])
@pytest.mark.parametrize("every", [1, 30])
def test_a_tsv_has_no_quotes(tmp_path, title, every):
    rows = titled([title if at % every == 0 else "x" for at in range(1000)])
    log = read_log(table(tmp_path / "a.tsv", rows))
    assert events(log) == Counter((str(u), str(i), str(t)) for u, i, t, _ in rows)


STRAY_QUOTES = {
    "never closed": ["x", '"Hit', "x", "x"],
    "closed by the next stray quote": ["x", '"Hit', "x", '"Hit', "x"],
    "closed at the end of a field": ["x", '"Hit', "x", 'Hit"', "x"],
    "closed in the next row": ["x", '"Hit', 'Hit"', "x"],
    "before a quoted value": ["x", '"Hit', "x", '"whole"', "x"],
    "before an empty value": ["x", '"Hit', '""', "x"],
    "escaped by a backslash": ["x", '"say \\"hi\\""', "x", "x"],
    "escaped twice": ["x", '"a\\""', '"b\\""', "x"],
    "text behind": ["x", '"a"b', "x", "x"],
    "space behind": ["x", '"a" ', "x", "x"],
    "alone": ["x", '"', "x"],
    "at the end": ["x", '"Hit'],
}


@pytest.mark.parametrize("titles", STRAY_QUOTES.values(), ids=STRAY_QUOTES)
@pytest.mark.parametrize("block", [7, 1 << 20])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_stray_quote_in_a_csv_is_refused_though_its_column_is_not_read(tmp_path, monkeypatch, titles, block, end):
    monkeypatch.setattr(_text, "BLOCK_BYTES", block)
    path = table(tmp_path / "a.csv", titled(titles))
    written(path, path.read_text().replace("\n", end))
    with pytest.raises(InputError, match=r"a\.csv, .*\bline 3\b.*double each quote that is part of a value"):
        read_log(path, min_events=1)


def test_a_stray_quote_far_into_a_large_csv_is_refused(tmp_path):
    for last in ('"Hit', 'Hit"', "x"):
        titles = ["x"] * 100_000
        titles[60_000], titles[90_000] = '"Hit', last
        with pytest.raises(InputError, match=r"\bline 60002\b"):
            read_log(table(tmp_path / "a.csv", titled(titles)))


def test_quotes_inside_an_unquoted_value_are_plain(tmp_path):
    rows = titled(['12" vinyl', 'a "great" one', 'x""', "5'10\"", 'x"'] * 20)
    assert events(read_log(table(tmp_path / "a.csv", rows))) == Counter((str(u), str(i), str(t)) for u, i, t, _ in rows)


@pytest.mark.parametrize("n", [1_000, 200_000])
def test_line_ends_inside_quotes_are_read_in_files_of_any_size(tmp_path, n):
    log = read_log(table(tmp_path / "a.csv", titled(['"two\nlines, ""quoted"""'] * n)))
    assert (log.n_events, log.dropped) == (n, {})
    assert log.times.sum() == n * (n - 1) // 2


def test_csv_agrees_with_another_parser_or_is_refused(tmp_path, monkeypatch):
    """Rows with random quotes, separators and line ends; what is accepted has every row that the csv module finds."""
    draw, read, refused = random.Random(5), 0, 0
    titles = [
        "x",
        '"x"',
        '"a,b"',
        '"a""b"',
        '"a\nb"',
        'a"b',
        '"',
        '""',
        '"a',
        'a"',
        '""""',
        '"1,2,3,4"',
        '"\n1,2,3,a"',
        "",
        '"a\r\nb"',
    ]
    for _ in range(800):
        body = "".join(
            ",".join(map(draw.choice, (["1", "u", '"1"', '"u,v"'], ["5", "6", '"q"""'], ["1", "2", '"4"'], titles)))
            + draw.choice(["\n", "\r\n"])
            for _ in range(draw.randint(3, 6))
        )
        for _ in range(draw.choice([0, 0, 1])):
            at = draw.randrange(len(body))
            body = body[:at] + draw.choice(['"', ",", "\n", '""', "\r", "1"]) + body[at + draw.choice([0, 1]) :]
        text = ",".join(HEADER) + "\n" + body
        monkeypatch.setattr(_text, "BLOCK_BYTES", draw.choice([5, 40, 1 << 20]))
        try:
            log = read_log(written(tmp_path / "a.csv", text), min_events=1)
        except InputError:
            refused += 1
            continue
        read += 1
        expected = [row[:3] for row in csv.reader(io.StringIO(text, newline="")) if row][1:]
        assert events(log) == Counter((user, item, str(int(time))) for user, item, time in expected), text
    assert min(read, refused) > 100


# Times


@pytest.mark.parametrize("kind", ["csv", "tsv", "inter"])
@pytest.mark.parametrize(
    "times",
    [
        [1_700_000_000_000_000_030, 1_700_000_000_000_000_020, 1_700_000_000_000_000_010],
        [MOST, 0, MOST - 1, -MOST, -MOST - 1],
        [999_999_999_999_999_999, 1_000_000_000_000_000_000, 999_999_999_999_999_998],
    ],
)
def test_times_of_64_bits_keep_their_order_and_value(tmp_path, kind, times):
    log = read_log(timed(tmp_path / f"a.{kind}", times))
    assert log.times.dtype == np.int64
    assert log.times.tolist() == sorted(times)
    assert order(log) == np.argsort(times).tolist()


FLOAT_LOSES = {
    "integer beside a fraction": [2**53 + 1, 1.5, 2],
    "19 digits beside a fraction": [1_700_000_000_000_000_030, 1_700_000_000_000_000_020, 0.5],
    "negative beside a fraction": [-MOST - 1, 1.5, 2],
    "beyond 64 bits": [2**63, 1, 2],
    "below 64 bits": [-(2**63) - 1, 1, 2],
    "fractions of nanoseconds": ["1700000000.000000030", "1700000000.000000020", "1700000000.000000010"],
    "integers with a point": ["1700000000000000030.0", "1700000000000000020.0", "1.0"],
    "exponents": ["1.7e18", "1", "2"],
    "infinite": ["1e400", "1", "2"],
}


@pytest.mark.parametrize("kind", ["csv", "inter"])
@pytest.mark.parametrize("times", FLOAT_LOSES.values(), ids=FLOAT_LOSES)
@pytest.mark.parametrize("apart", [0, 1000])
@pytest.mark.usefixtures("small_blocks")
def test_times_that_a_float_would_merge_are_refused_wherever_they_stand(tmp_path, kind, times, apart):
    for turned in (times, times[::-1]):
        with pytest.raises(InputError, match=r"a\.\w+.*timestamp.*(digits|finite)"):
            read_log(timed(tmp_path / f"a.{kind}", [turned[0], *[7] * apart, *turned[1:]]))


@pytest.mark.parametrize("kind", ["csv", "inter"])
def test_fractions_are_read_wherever_the_first_stands(tmp_path, kind):
    texts = ["3", "1e1", "2.25", "-1", "1700000000.1234567", "+4", " 5"]
    for shift in range(len(texts)):
        turned = texts[shift:] + texts[:shift]
        log = read_log(timed(tmp_path / f"a.{kind}", turned))
        assert log.times.tolist() == sorted(map(float, texts))
        assert order(log) == np.argsort(list(map(float, turned))).tolist()


@pytest.mark.parametrize(
    "text", ["NA", "null", "None", "nan", "-inf", "true", "0x10", "1_000", "10:30:00", "1-1", "١٢", "1 2", "1,2"]
)
@pytest.mark.parametrize("kind", ["csv", "inter"])
@pytest.mark.parametrize("at", [0, 20, 1000])
@pytest.mark.usefixtures("small_blocks")
def test_what_is_no_time_is_refused_wherever_it_stands(tmp_path, kind, text, at):
    with pytest.raises(InputError, match=rf"a\.{kind}.*(timestamp|columns|fields)"):
        read_log(timed(tmp_path / f"a.{kind}", [*range(at), text, 5, 6]))


def seconds(text):
    return int(np.datetime64(text.rstrip("Z"), "s").astype(np.int64))


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.usefixtures("small_blocks")
def test_dates_count_in_the_finest_unit_of_the_whole_file(tmp_path, far):
    """A date, a time of day and a fraction of a second mean the same in the first block and in a later one."""
    days = ["2020-01-03"] * (1000 if far else 2)
    path = tmp_path / "a.csv"
    assert read_log(timed(path, [*days, "2020-01-02"])).times[0] == seconds("2020-01-02") // 86_400
    for turn in (1, -1):
        log = read_log(timed(path, [*days, "2020-01-02 10:00"][::turn]))
        assert (log.times[0], log.times[-1]) == (seconds("2020-01-02T10:00"), seconds("2020-01-03"))
        log = read_log(timed(path, [*days, "2020-01-02 10:00:01", "2020-01-02 10:00:00.25"][::turn]))
        assert log.times[0] == seconds("2020-01-02T10:00") * 10**9 + 250_000_000
        assert log.times[-1] == seconds("2020-01-03") * 10**9
        log = read_log(timed(path, ["2020-01-02T10:00:00+02:00", *["2020-01-03T00:00:00Z"] * len(days)][::turn]))
        assert log.times[0] == seconds("2020-01-02T08:00")
        for other in ("5", "1.5", "2020-01-02T10:00:00Z"):
            with pytest.raises(InputError, match="mixes numbers, dates and dates with a time zone"):
                read_log(timed(path, [*days, other, other][::turn]))
    with pytest.raises(InputError, match=r"holds string '2020-02-30' in row 1"):
        read_log(timed(path, ["2020-02-30", *days]))
    with pytest.raises(InputError, match=r"(do not fit 64 bits in nanoseconds|mixes)"):
        read_log(timed(path, ["0001-01-01", *days, "2020-01-02 10:00:00.25"]))


def test_typed_times_of_parquet_are_exact_or_refused(tmp_path):
    path, ids = tmp_path / "a.parquet", {"user_id": [1, 1, 1], "item_id": [0, 1, 2]}
    large = [1_700_000_000_000_000_030, 1_700_000_000_000_000_020, 1_700_000_000_000_000_010]
    exact = (
        arrow.array(large),
        arrow.array(large, "uint64"),
        arrow.array(large, "timestamp[ns]"),
        arrow.array([Decimal(time) for time in large], arrow.decimal128(38, 0)),
    )
    for times in exact:
        log = read_log(parquet(path, **ids, timestamp=times))
        assert (log.times.tolist(), order(log)) == (large[::-1], [2, 1, 0])
    for times, sentence in (
        (arrow.array([float(time) for time in large]), r"row 1: column 'timestamp' has 1\.7.*loses its last digits"),
        (arrow.array([1.7e9, 1.0, 2.0], "float32"), r"from 2\*\*24 on"),
        (arrow.array([2**63, 1, 2], "uint64"), "Integer value 9223372036854775808 not in range"),
        (arrow.array([Decimal("1.5"), Decimal(1), Decimal(2)]), r"holds decimal128"),
        (arrow.array([1, 2, None]), "row 3: column 'timestamp' has no value"),
    ):
        with pytest.raises(InputError, match=sentence):
            read_log(parquet(path, **ids, timestamp=times))


# Ids


@pytest.mark.parametrize("kind", ["csv", "tsv", "inter"])
@pytest.mark.parametrize("far", [0, 1000])
@pytest.mark.usefixtures("small_blocks")
def test_ids_mean_the_same_wherever_they_stand(tmp_path, kind, far):
    plain = [(1, 7, 5, "x")] * far
    for ids, expected in (
        ([MOST, -MOST - 1, 5], [-MOST - 1, 5, MOST]),
        ([2**63, 5, 5], {str(2**63), "5"}),
        (["1" * 30, 5, 5], {"1" * 30, "5"}),
        (["007", 7, 7], {"007", "7"}),
        (["NA", "null", "None"], {"NA", "null", "None"}),
        (["nan", "1e3", "true"], {"nan", "1e3", "true"}),
        ([" 7", "+7", "-0"], {" 7", "+7", "-0"}),
    ):
        rows = plain + [(1, item, 5, "x") for item in ids]
        read = [read_log(table(tmp_path / f"a.{kind}", turned, HEADER)).item_ids[1:] for turned in (rows, rows[::-1])]
        for found in read:
            if isinstance(expected, list):
                assert found.tolist() == sorted({*expected, *([7] if far else [])})
            else:
                assert set(found.tolist()) == expected | ({"7"} if far else set())


def test_unsigned_ids_beyond_64_bits_become_strings(tmp_path):
    ids = [2**64 - 1, 2**63, 5] * 2
    path = parquet(tmp_path / "a.parquet", user_id=[1] * 6, item_id=arrow.array(ids, "uint64"), timestamp=list(range(6)))
    assert order(read_log(path)) == list(map(str, ids))


@pytest.mark.parametrize("kind", ["csv", "inter", "parquet"])
@pytest.mark.parametrize("roles", [{"user": "item_id"}, {"item": "user_id"}, {"item": "timestamp"}, {"time": "user_id"}])
def test_one_column_has_one_role(tmp_path, kind, roles):
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        parquet(path, user_id=[1] * 3, item_id=[1, 2, 3], timestamp=[1, 2, 3])
    else:
        table(path, [(1, item, item) for item in range(3)], HEADER[:3])
    with pytest.raises(InputError, match=r"cannot be the \w+ column and the \w+ column too: name the \w+ column in columns"):
        read_log(path, columns=roles)


def test_a_header_that_stands_again_is_refused(tmp_path):
    rows = [(1, item, item, "x") for item in range(3)]
    for kind in ("csv", "tsv", "inter"):
        path = table(tmp_path / f"a.{kind}", [*rows, HEADER, *rows])
        with pytest.raises(InputError, match="row 4: the header is repeated there"):
            read_log(path, columns={"time": None})
        with pytest.raises(InputError, match="timestamp"):
            read_log(path)


@pytest.mark.parametrize("kind", ["csv", "tsv", "inter"])
@pytest.mark.parametrize(
    "line", ["1", "1{0}5", "1{0}5{0}3{0}x{0}", "   ", "# note", "{0}5{0}3{0}x", "1{0}{0}3{0}x", "1{0}5{0}{0}x"]
)
def test_a_row_of_another_width_or_without_a_value_is_refused(tmp_path, kind, line):
    separator = "," if kind == "csv" else "\t"
    rows = [(1, item, item, "x") for item in range(3)]
    path = table(tmp_path / f"a.{kind}", rows)
    written(path, path.read_text() + "\n\n" + line.format(separator) + "\n")
    with pytest.raises(InputError, match=rf"a\.{kind}"):
        read_log(path)


# Files


def test_packed_files_are_named_by_their_bytes_whatever_they_are_called(tmp_path):
    text = ",".join(HEADER) + "\n" + "1,5,3,x\n" * 3
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.csv", text)
    for content, reason in (
        (gzip.compress(text.encode()), "is compressed by gzip"),
        (archive.getvalue(), "is a zip archive"),
        (text.encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
        (text.encode("utf-16-le"), "(not UTF-8 text|no column)"),
    ):
        for name in ("a.csv", "a.tsv", "a.csv.gz", "a.inter", "a.inter.gz", "a.json", "a.parquet", "a"):
            for form in ("auto", "csv"):
                path = written(tmp_path / name, content)
                with pytest.raises(InputError, match=reason if "parquet" not in name else ".") as caught:
                    read_log(path, format=form)
                assert str(caught.value).isprintable()


def test_a_plain_file_called_gz_is_read_as_asked(tmp_path):
    path = table(tmp_path / "a.csv", [(1, item, item, "x") for item in range(3)])
    assert order(read_log(path.rename(tmp_path / "a.csv.gz"), format="csv")) == [0, 1, 2]


def test_pipes_devices_and_impossible_names_are_one_sentence(tmp_path):
    os.mkfifo(tmp_path / "a.csv")
    (tmp_path / "loop").symlink_to("loop")
    for path, reason in (
        (tmp_path / "a.csv", "is a pipe or a device"),
        ("/dev/null", "is a pipe or a device"),
        ("/dev/zero", "is a pipe or a device"),
        (tmp_path / "loop", "cannot be read: Too many levels"),
        ("a\0b", "cannot be read: embedded null"),
        (tmp_path / ("x" * 5000), "cannot be read: File name too long"),
    ):
        with pytest.raises(InputError, match=reason):
            read_log(path)


def test_a_file_name_need_not_be_utf8(tmp_path):
    for kind in ("csv", "parquet"):
        path = tmp_path / os.fsdecode(b"\xff." + kind.encode())
        if kind == "csv":
            table(path, [(1, item, item, "x") for item in range(3)])
        else:
            parquet(tmp_path / "a", user_id=[1] * 3, item_id=[0, 1, 2], timestamp=[1, 2, 3]).rename(path)
        assert order(read_log(path)) == [0, 1, 2]


def test_reading_again_and_again_reads_the_same(tmp_path):
    """A reader that is dropped early must not read on in the file that comes next."""
    rows = [(1 + at % 50, at % 700, at, '"quoted"') for at in range(150_000)]
    good, bad = tmp_path / "good.csv", tmp_path / "bad.csv"
    expected = read_log(table(good, rows)).fingerprint()
    table(bad, [*rows[:100], (1, 2), *rows])
    for _ in range(12):
        with pytest.raises(InputError, match="Expected 4 columns"):
            read_log(bad)
        assert read_log(good).fingerprint() == expected
