"""String ids of tables: numbered by first appearance in the whole file, however the file is cut into pieces."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lares_fast._errors import InputError
from lares_fast.data import _dictionaries, _tables, read_log
from lares_fast.data._order import stable_order
from tests.support.event_tables import arrow, parquet, table


def numbered(values):
    """Return the codes and the ids of ``values`` by the rules of :func:`read_log`, in plain Python."""
    integer = all(str(int(value)) == value if value.lstrip("-").isdigit() and value.isascii() else False for value in values)
    ids = sorted({int(value) for value in values}) if integer else list(dict.fromkeys(values))
    place = {str(value): at for at, value in enumerate(ids)}
    return [place[value] for value in values], ids


@pytest.mark.parametrize("text_bytes", [0, 60, 1 << 20])
@pytest.mark.parametrize("waiting", [0, 5, 1 << 16])
@pytest.mark.parametrize("kind", ["strings", "integers", "an integer of text at the end", "all different"])
def test_codes_are_those_of_a_plain_dictionary(monkeypatch, text_bytes, waiting, kind):
    monkeypatch.setattr(_dictionaries, "TEXT_BYTES", text_bytes)
    monkeypatch.setattr(_dictionaries, "MOST_WAITING", waiting)
    draw = np.random.default_rng(0)
    values = [str(value) for value in draw.integers(-20, 60, 400)]
    if kind == "strings":
        values = [f"é{value}" for value in values]
    if kind == "an integer of text at the end":
        values.append("007")
    if kind == "all different":
        values = [f"{value}/{at}" for at, value in enumerate(values)]
    column = _dictionaries.TextIds()
    cuts = np.sort(draw.integers(0, len(values), 9))
    for piece in np.split(np.array(values, dtype=object), cuts):
        assert column.add(arrow.array(piece.tolist(), "large_string")) is None
    assert column.code(values[3]) == list(dict.fromkeys(values)).index(values[3])
    assert column.code("absent") is None
    codes, ids = column.finish()
    assert (codes.tolist(), ids.tolist()) == numbered(values)
    assert codes.dtype == np.int32


def test_an_empty_id_is_found_in_a_slice():
    column = _dictionaries.TextIds()
    assert column.add(arrow.array(["", "a", "b"], "large_string")[1:]) is None
    assert column.add(arrow.array(["a", "a", "b", ""], "large_string")[1:]) == 2


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_parquet_text_of_every_type_is_numbered_alike(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(_tables, "BATCH_ROWS", 7)
    monkeypatch.setattr(_dictionaries, "TEXT_BYTES", 20)
    values = [f"i{at * 7 % 31}" for at in range(100)]
    ids = arrow.array(values).dictionary_encode() if kind == "dictionary" else arrow.array(values, kind)
    log = read_log(parquet(tmp_path / "a.parquet", user_id=["u"] * 100, item_id=ids, timestamp=list(range(100))))
    assert log.item_ids[1:].tolist() == list(dict.fromkeys(values))
    assert log.item_ids[log.history(0)].tolist() == values


def test_a_row_longer_than_the_look_at_the_header_is_read(tmp_path):
    rows = [(1, item, item, "x" * 100_000) for item in range(3)]
    header = ["user_id", "item_id", "timestamp", "y" * 100_000]
    assert read_log(table(tmp_path / "a.csv", rows, header)).n_events == 3


def test_an_empty_id_names_its_row_in_a_later_block(tmp_path, small_blocks):
    rows = [(f"u{at}", "i", at, "x") for at in range(500)]
    rows[400] = ("", "i", 400, "x")
    with pytest.raises(InputError, match="row 401: column 'user_id' has no value"):
        read_log(table(tmp_path / "a.csv", rows))


INTEGERS = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(0, 3), st.integers(2**62, 2**62 + 2))
FLOATS = st.one_of(st.floats(allow_nan=False), st.sampled_from([0.0, -0.0, 1.5, -1.5]))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_the_order_is_that_of_lexsort(data):
    size = data.draw(st.integers(0, 40))
    keys = [
        np.array(data.draw(st.lists(kind, min_size=size, max_size=size)), dtype=dtype)
        for kind, dtype in data.draw(
            st.lists(
                st.sampled_from([(INTEGERS, np.int64), (FLOATS, np.float64), (st.integers(0, 5), np.int32)]),
                min_size=1,
                max_size=3,
            )
        )
    ]
    assert stable_order(*keys).tolist() == np.lexsort(keys).tolist()


@pytest.mark.parametrize("bits", range(50, 63))
def test_the_order_holds_where_a_key_fills_an_integer(bits):
    """A key whose bits end where an array of bits ends is followed by a key that is in order already."""
    draw = np.random.default_rng(bits)
    times = draw.integers(0, 2**bits, 40)
    times[:2] = 0, 2**bits - 1
    users = np.sort(draw.integers(0, 5, 40)).astype(np.int32)
    for keys in ((times, users), (users, times)):
        assert stable_order(*keys).tolist() == np.lexsort(keys).tolist()
