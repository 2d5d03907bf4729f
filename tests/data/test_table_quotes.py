"""Quotes in event logs: no row of a CSV file is lost to a stray quote."""

import csv
import io
import random
from collections import Counter

import pytest

from lares_fast._errors import InputError
from lares_fast.data import _text, read_log
from tests.support.event_tables import HEADER, events, table, written


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
    """Rows with random quotes, separators and line ends. An accepted file gives every row that the csv module finds."""
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
