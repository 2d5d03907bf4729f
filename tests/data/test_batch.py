"""Batches compared with a loop over rows, their speed, and the order of an epoch."""

import time

import numpy as np
import pytest
import torch

from lares_fast._random import root_key
from lares_fast.data import epoch_order, leave_one_out, log_from_sequences, make_batch, synthetic_log


@pytest.fixture(scope="module")
def log():
    return synthetic_log(n_users=300, n_items=60)


@pytest.mark.parametrize("max_len", [1, 3, 20, 200, 2**64 - 1])
@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_batch_equals_a_loop_over_rows(log, part, max_len):
    rows = getattr(leave_one_out(log), part)
    index = epoch_order(len(rows), root_key(1))[:100]
    batch = make_batch(log, rows, index, max_len)
    for b, row in enumerate(index.tolist()):
        start, end = log.offsets[rows.users[row]], rows.ends[row]
        expected = log.items[start:end].tolist()[-max_len:]
        assert batch.items[batch.offsets[b] : batch.offsets[b + 1]].tolist() == expected
        assert (batch.target[b], batch.rows[b], batch.users[b]) == (log.items[end], row, rows.users[row])
    assert {tensor.dtype for tensor in vars(batch).values()} == {torch.int64}


def test_arrays_and_tensors_choose_the_same_rows_and_are_not_shared(log):
    rows = leave_one_out(log).train
    index = np.array([5, 0, 5])
    batch, other = make_batch(log, rows, index, 10), make_batch(log, rows, torch.tensor([5, 0, 5]), 10)
    index[:] = 1
    assert batch.rows.tolist() == [5, 0, 5]
    assert all(torch.equal(one, two) for one, two in zip(vars(batch).values(), vars(other).values(), strict=True))
    assert torch.equal(batch.to("cpu").items, batch.items)


def test_the_last_row_of_the_log_stays_inside_it():
    log = log_from_sequences({2: [1, 2, 3, 1], 1: [1, 2, 3]})
    batch = make_batch(log, leave_one_out(log).test, np.array([1]), 50)
    assert batch.items.tolist() == [1, 2]


def test_an_empty_batch_is_empty(log):
    assert len(make_batch(log, leave_one_out(log).train, np.empty(0, np.int64), 10)) == 0


def test_a_batch_of_1024_rows_takes_under_5_ms(log):
    rows = leave_one_out(log).train
    index = epoch_order(len(rows), root_key(2))[:1024]
    # The least processor time of many runs, so that other work on the machine does not fail this test.
    took = []
    for _ in range(30):
        begin = time.process_time()
        make_batch(log, rows, index, 50)
        took.append(time.process_time() - begin)
    assert min(took) < 5e-3


def test_epoch_order_is_a_permutation_addressed_by_its_key():
    one = epoch_order(1000, root_key(1))
    assert one.sort().values.tolist() == list(range(1000))
    assert torch.equal(one, epoch_order(1000, root_key(1)))
    assert not torch.equal(one, epoch_order(1000, root_key(2)))
