"""The rows of both splits. No held-out event reaches training."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lares_fast._errors import InputError
from lares_fast._random import root_key
from lares_fast.data import (
    InteractionLog,
    Rows,
    SameTargetIndex,
    best_possible,
    cutoffs,
    epoch_order,
    leave_one_out,
    read_log,
    synthetic_log,
    temporal_split,
)

DATA = Path(os.environ.get("LARES_FAST_DATA_DIR", Path(__file__).parents[3] / "shared" / "data"))


def make_log(lengths, times=None):
    """Return a log in which every event has its own item, so that equal items are equal events."""
    n = sum(lengths)
    return InteractionLog(
        items=np.arange(1, n + 1, dtype=np.int32),
        offsets=np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
        times=times,
        user_ids=np.arange(1, len(lengths) + 1),
        item_ids=np.arange(n + 1),
    )


@st.composite
def timed_logs(draw):
    lengths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=8))
    times = [sorted(draw(st.lists(st.integers(0, 20), min_size=n, max_size=n))) for n in lengths]
    return make_log(lengths, np.concatenate(times).astype(np.int64))


def inputs(log, rows):
    """Return the positions of the input events of each row."""
    return [range(log.offsets[user], end) for user, end in zip(rows.users, rows.ends, strict=True)]


def assert_rows_are_sound(log, rows):
    assert (rows.users.dtype, rows.ends.dtype) == (np.int32, np.int64)
    assert len(rows.users) == len(rows.ends) == len(rows)
    assert len(set(rows.ends.tolist())) == len(rows)
    for user, end, events in zip(rows.users, rows.ends, inputs(log, rows), strict=True):
        assert log.offsets[user] < end < log.offsets[user + 1]
        assert len(events) >= 1
        assert end not in events


def test_leave_one_out_on_a_user_of_five_events():
    split = leave_one_out(make_log([5]))
    assert split.train.ends.tolist() == [1, 2]
    assert (split.valid.ends.tolist(), split.test.ends.tolist(), split.train_end.tolist()) == ([3], [4], [3])


@settings(deadline=None)
@given(st.lists(st.integers(3, 9), min_size=1, max_size=12).filter(lambda lengths: max(lengths) > 3))
def test_leave_one_out_trains_on_every_prefix_and_never_on_the_last_two(lengths):
    log = make_log(lengths)
    split = leave_one_out(log)
    for rows in (split.train, split.valid, split.test):
        assert_rows_are_sound(log, rows)
    assert len(split.train) == log.n_events - 3 * log.n_users
    expected = [(u, log.offsets[u] + j) for u, n in enumerate(lengths) for j in range(1, n - 2)]
    assert list(zip(split.train.users, split.train.ends, strict=True)) == expected
    assert (split.valid.ends == log.offsets[1:] - 2).all()
    assert (split.test.ends == log.offsets[1:] - 1).all()
    assert (split.train.ends < split.train_end[split.train.users]).all()
    held_out = set(split.valid.ends.tolist()) | set(split.test.ends.tolist())
    used = set(split.train.ends.tolist()).union(*inputs(log, split.train))
    assert not used & held_out


def test_leave_one_out_wants_three_events():
    with pytest.raises(InputError, match="needs 3 events a user, but 1 have fewer"):
        leave_one_out(make_log([3, 2]))


@pytest.mark.parametrize("lengths", [[3], [3] * 100])
def test_leave_one_out_wants_something_to_train_on(lengths):
    with pytest.raises(InputError, match="leaves no row to train on, since no user has more than 3 events"):
        leave_one_out(make_log(lengths))
    assert len(leave_one_out(make_log([*lengths, 4])).train) == 1


def test_an_empty_training_part_is_named_wherever_it_arrives():
    log = make_log([4])
    empty = Rows(np.empty(0, np.int32), np.empty(0, np.int64))
    with pytest.raises(InputError, match="rows must hold a training row"):
        SameTargetIndex(log, empty)
    with pytest.raises(InputError, match="there is no row to train on"):
        epoch_order(0, root_key(1))
    shop = synthetic_log(n_users=5, n_items=40)
    with pytest.raises(InputError, match="rows must hold a row to rank"):
        best_possible(shop, empty)


def test_temporal_split_cuts_64_bit_times_exactly():
    times = 1_700_000_000_000_000_000 + np.array([1, 2, 3, 4, 5, 6])
    split = temporal_split(make_log([6], times), int(times[2]), int(times[4]))
    assert (split.train.ends.tolist(), split.valid.ends.tolist(), split.test.ends.tolist()) == ([1], [2], [4])
    # A float between two integers cuts between them, too.
    large = 2**60 + 256 * np.arange(6)
    for shift in (-1, 0, 1):
        split = temporal_split(make_log([6], large + shift), float(large[2]), float(large[4]))
        assert split.valid.ends.tolist() == [2 + (shift < 0)]


@pytest.mark.parametrize("fractions", [(float("nan"), 0.1), (0.1, float("nan")), (0.0, 0.1), (1.0, 0.1)])
def test_cutoffs_want_fractions(fractions):
    with pytest.raises(InputError, match="must be positive and sum below 1"):
        cutoffs(make_log([4, 4], np.arange(8)), *fractions)
    assert cutoffs(make_log([4, 4], np.arange(8)), 0.5, 1e-30) == (4, 7)


@settings(max_examples=300, deadline=None)
@given(timed_logs(), st.integers(0, 20), st.integers(1, 10))
def test_temporal_split_never_looks_past_its_moments(log, valid_from, width):
    test_from = valid_from + width
    try:
        split = temporal_split(log, valid_from, test_from)
    except InputError:
        return
    for rows in (split.train, split.valid, split.test):
        assert_rows_are_sound(log, rows)
    used = set(split.train.ends.tolist()).union(*inputs(log, split.train))
    assert all(log.times[event] < valid_from for event in used)
    assert (split.train.ends < split.train_end[split.train.users]).all()
    for rows, begin, end in ((split.valid, valid_from, test_from), (split.test, test_from, np.inf)):
        assert len(set(rows.users.tolist())) == len(rows)
        for user, target, events in zip(rows.users, rows.ends, inputs(log, rows), strict=True):
            assert begin <= log.times[target] < end
            assert all(log.times[event] <= log.times[target] for event in events)
            # It is the first event of the user in the window, except for the first event of all.
            assert all(log.times[event] < begin for event in events if event != log.offsets[user])
    for user in range(log.n_users):
        own = log.times[log.offsets[user] : log.offsets[user + 1]]
        assert split.train_end[user] == log.offsets[user] + (own < valid_from).sum()
        assert (user in split.test.users) == bool((own[1:] >= test_from).any())
    before = [(log.times[log.offsets[u] : log.offsets[u + 1]] < valid_from).sum() for u in range(log.n_users)]
    assert len(split.train) == sum(max(n - 1, 0) for n in before)


@settings(deadline=None)
@given(timed_logs(), st.data())
def test_later_events_change_no_training_row(log, data):
    """If every event from valid_from on is changed, the data that training reads stay equal."""
    valid_from = data.draw(st.integers(1, 20))
    try:
        split = temporal_split(log, valid_from, valid_from + 1)
    except InputError:
        return
    other = InteractionLog(
        items=np.where(log.times >= valid_from, 1, log.items).astype(np.int32),
        offsets=log.offsets,
        times=log.times,
        user_ids=log.user_ids,
        item_ids=log.item_ids,
    )
    again = temporal_split(other, valid_from, valid_from + 1)
    assert (split.train.ends == again.train.ends).all()
    for one, two in zip(inputs(log, split.train), inputs(other, again.train), strict=True):
        assert (log.items[list(one)] == other.items[list(two)]).all()
    assert (split.train.targets(log) == again.train.targets(other)).all()


def test_cutoffs_leave_about_the_asked_fractions():
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 40, 300)
    log = make_log(lengths.tolist(), np.concatenate([np.sort(rng.integers(0, 10**6, n)) for n in lengths]))
    valid_from, test_from = cutoffs(log, 0.2, 0.1)
    assert (log.times < valid_from).mean() == pytest.approx(0.7, abs=0.01)
    assert (log.times >= test_from).mean() == pytest.approx(0.1, abs=0.01)
    assert len(temporal_split(log, valid_from, test_from).test) > 0


def test_temporal_split_names_what_is_wrong():
    log = make_log([4, 4], np.array([1, 2, 3, 4, 2, 3, 4, 5]))
    with pytest.raises(InputError, match="valid_from must be before test_from, but got 3 and 3"):
        temporal_split(log, 3, 3)
    with pytest.raises(InputError, match=r"no test rows with valid_from 3 and test_from 9; the log's times go from 1 to 5"):
        temporal_split(log, 3, 9)
    with pytest.raises(InputError, match="no train rows"):
        temporal_split(log, 0, 3)
    with pytest.raises(InputError, match="needs the time of each event, and this log has none"):
        temporal_split(make_log([4]), 1, 2)
    with pytest.raises(InputError, match="must be positive and sum below 1"):
        cutoffs(log, 0.5, 0.5)


@pytest.mark.parametrize(
    "name, users, items, events, rows",
    [
        ("LastFM.txt", 1_090, 3_646, 52_551, 49_281),
        ("Beauty.txt", 22_363, 12_101, 198_502, 131_413),
        ("Instruments.inter.json", 57_439, 24_587, 511_836, 339_519),
    ],
)
def test_published_logs_have_their_published_counts(name, users, items, events, rows):
    if not (DATA / name).exists():
        pytest.skip(f"{name} is not in LARES_FAST_DATA_DIR, the folder of real logs")
    log = read_log(DATA / name)
    assert (log.n_users, log.n_items - 1, log.n_events) == (users, items, events)
    assert (log.item_ids == np.arange(items + 1)).all()
    assert len(leave_one_out(log).train) == rows
