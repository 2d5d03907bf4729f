"""The filters of a log: what they leave out, in which order, and how it is counted."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lares_fast._errors import InputError
from lares_fast.data import Filters, log_from_sequences, read_log
from tests.support.event_tables import parquet, table, written

HEADER = ["user_id", "item_id", "timestamp", "rating"]
EVENT = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(0, 4), st.sampled_from([1, 2.5, 4, 5]))


def plain_filters(rows, filters):
    """Apply the filters with plain lists. Return user -> items in order, and the number of events of every reason."""
    rows = sorted(rows, key=lambda row: (row[0], row[2]))
    counts = Counter()
    kept = [row for row in rows if filters.min_rating is None or row[3] >= filters.min_rating]
    counts["rating"] = len(rows) - len(kept)
    rows, seen = [], set()
    turned = kept[::-1] if filters.duplicates == "last" else kept
    for row in turned:
        key = row[:3] if filters.duplicates == "same-time" else row[:2]
        if filters.duplicates == "keep" or key not in seen:
            rows.append(row)
        seen.add(key)
    rows = rows[::-1] if filters.duplicates == "last" else rows
    counts["duplicates"] = len(kept) - len(rows)
    while True:
        before = len(rows)
        users = Counter(row[0] for row in rows)
        rows = [row for row in rows if users[row[0]] >= filters.min_events]
        counts["users"] += before - len(rows)
        middle = len(rows)
        items = Counter(row[1] for row in rows)
        rows = [row for row in rows if items[row[1]] >= filters.min_item_events]
        counts["items"] += middle - len(rows)
        if len(rows) == before:
            break
    found = {}
    for user, item, *_ in rows:
        found.setdefault(user, []).append(item)
    return found, +counts


REASONS = {"rating": "events with a rating", "users": "events of those users", "items": "events of those items"}


def counted(dropped):
    """Return the numbers of events in ``dropped`` by short reason."""
    counts = Counter()
    for reason, number in dropped.items():
        short = next((short for short, words in REASONS.items() if reason.startswith(words)), None)
        if "same item" in reason or "repeated events" in reason:
            short = "duplicates"
        if short:
            counts[short] += number
    return counts


@settings(max_examples=150, deadline=None)
@given(
    st.lists(EVENT, min_size=1, max_size=60),
    st.builds(
        Filters,
        min_rating=st.sampled_from([None, 2.5, 4]),
        duplicates=st.sampled_from(["keep", "same-time", "first", "last"]),
        min_events=st.integers(1, 4),
        min_item_events=st.integers(1, 4),
    ),
)
def test_a_log_has_the_events_that_plain_lists_keep(tmp_path_factory, rows, filters):
    expected, counts = plain_filters(rows, filters)
    path = table(tmp_path_factory.mktemp("log") / "a.csv", rows, HEADER)
    if not expected:
        with pytest.raises(InputError, match=r"no user has|leave out every event"):
            read_log(path, **vars(filters))
        return
    log = read_log(path, **vars(filters))
    found = {int(user): log.item_ids[log.history(at)].tolist() for at, user in enumerate(log.user_ids)}
    assert found == expected and counted(log.dropped) == counts
    assert log.n_items - 1 == len({item for items in expected.values() for item in items})


ROWS = [("u", "a", 1, 5), ("u", "b", 2, 3), ("u", "a", 1, 5), ("u", "a", 3, 4), ("v", "b", 1, 3.5), ("v", "a", 2, 4)]


@pytest.mark.parametrize("kind", ["csv", "tsv", "inter", "movielens", "parquet"])
def test_every_table_has_ratings(tmp_path, kind):
    path = tmp_path / f"a.{'dat' if kind == 'movielens' else kind}"
    if kind == "parquet":
        parquet(path, **{name: [row[at] for row in ROWS] for at, name in enumerate(HEADER)})
    elif kind == "movielens":
        written(path, "".join(f"{user}::{item}::{rating}::{time}\n" for user, item, time, rating in ROWS))
    else:
        table(path, ROWS, HEADER)
    log = read_log(path, min_events=1, min_rating=3.5)
    assert log.summary().endswith("left out: events with a rating under 3.5 (1)")
    assert (log.n_events, log.user_ids.tolist()) == (5, ["u", "v"])
    log = read_log(path, min_events=2, min_item_events=2, min_rating=4, duplicates="same-time")
    assert log.dropped == {
        "events with a rating under 4": 2,
        "repeated events of one user, item and time": 1,
        "users with fewer than 2 events": 1,
        "events of those users": 1,
    }
    assert log.item_ids[log.history(0)].tolist() == ["a", "a"]


def test_without_ratings_nothing_is_asked_of_their_column(tmp_path):
    rows = [(1, item, item, "not a number") for item in range(3)]
    assert read_log(table(tmp_path / "a.csv", rows, HEADER)).n_events == 3


@pytest.mark.parametrize("kind", ["csv", "inter"])
@pytest.mark.parametrize("text", ["NA", "nan", "inf", "", "x", "4,5", "0x4"])
def test_what_is_no_rating_is_refused(tmp_path, kind, text):
    rows = [(1, item, item, 4.5) for item in range(3)]
    path = table(tmp_path / f"a.{kind}", [*rows, (1, 3, 3, text)], HEADER)
    with pytest.raises(InputError, match=rf"a\.{kind}.*(rating.*is not a finite number|4 columns)"):
        read_log(path, min_rating=4)


def test_a_missing_rating_column_is_named(tmp_path):
    path = table(tmp_path / "a.csv", [(1, item, item, 5) for item in range(3)], ["user_id", "item_id", "timestamp", "stars"])
    with pytest.raises(InputError, match=r"has no column 'rating' among .*stars; name the rating column in columns") as caught:
        read_log(path, min_rating=4)
    assert caught.value.setting == "data.rating=NAME"
    assert read_log(path, min_rating=4, columns={"rating": "stars"}).n_events == 3


def test_a_mapping_has_the_filters_without_columns():
    sequences = {"u": ["a", "b", "a", "c"], "v": ["a", "c", "c", "b"], "w": ["d", "a", "b"]}
    log = log_from_sequences(sequences, duplicates="last", min_item_events=2)
    assert [log.item_ids[log.history(user)].tolist() for user in range(log.n_users)] == [["b", "a", "c"], ["a", "c", "b"]]
    assert log.dropped == {
        "earlier events of a user with the same item": 2,
        "users with fewer than 3 events": 1,
        "events of those users": 2,
        "items with fewer than 2 events": 1,
        "events of those items": 1,
    }


def test_a_core_may_take_many_turns():
    """Every turn leaves out one user and one item of a chain."""
    chain = {f"u{n}": [f"i{n}", f"i{n + 1}"] for n in range(30)}
    core = {f"v{n}": ["x", "y"] for n in range(2)}
    log = log_from_sequences({**chain, **core}, min_events=2, min_item_events=2)
    assert log.user_ids.tolist() == ["v0", "v1"] and log.n_events == 4
    assert log.dropped["users with fewer than 2 events"] == 30
    with pytest.raises(InputError, match=r"memory: the filters leave out every event: users with fewer than 2 events \(30\)"):
        log_from_sequences(chain, min_events=2, min_item_events=2)


def test_the_first_events_stay_in_the_order_of_the_log():
    draw = np.random.default_rng(0)
    items = draw.integers(1, 50, 400).tolist()
    log = log_from_sequences({1: items}, duplicates="first")
    assert log.item_ids[log.history(0)].tolist() == list(dict.fromkeys(items))
