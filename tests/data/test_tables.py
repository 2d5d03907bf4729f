"""Event logs as tables: ids, columns, rows, and files whose name does not fit their content."""

import gzip
import io
import os
import zipfile

import pytest

from lares_fast._errors import InputError
from lares_fast.data import read_log
from tests.support.event_tables import HEADER, MOST, arrow, order, parquet, table, written


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
    with pytest.raises(
        InputError, match=r"cannot be the \w+ column and the \w+ column too: name another \w+ column in columns"
    ):
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
    """A reader that is abandoned early must not go on reading from the next file."""
    rows = [(1 + at % 50, at % 700, at, '"quoted"') for at in range(150_000)]
    good, bad = tmp_path / "good.csv", tmp_path / "bad.csv"
    expected = read_log(table(good, rows)).fingerprint()
    table(bad, [*rows[:100], (1, 2), *rows])
    for _ in range(12):
        with pytest.raises(InputError, match="Expected 4 columns"):
            read_log(bad)
        assert read_log(good).fingerprint() == expected
