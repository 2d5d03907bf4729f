"""Packed sequences: conversions both ways, and the one check of sequences from callers."""

import pickle

import pytest
import torch

from lares_fast._errors import InputError
from lares_fast.data import make_batch
from lares_fast.reference import Sequences
from lares_fast.sequences import pad, row_positions, unpad
from tests.support import train_run

PADDED = torch.tensor([[3, 5, 0, 0], [7, 0, 0, 0], [9, 8, 7, 6]]), torch.tensor([2, 1, 4])
ITEMS, OFFSETS = torch.tensor([3, 5, 7, 9, 8, 7, 6]), torch.tensor([0, 2, 3, 7])


def given(first, second):
    return Sequences.from_input(first, second, n_items=10, max_len=6)


@pytest.mark.parametrize("pair", [PADDED, (ITEMS, OFFSETS), Sequences(ITEMS, OFFSETS)], ids=["padded", "packed", "Sequences"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_every_form_becomes_the_packed_one(pair, dtype):
    sequences = given(*(part.to(dtype) for part in pair))
    items, offsets = sequences
    assert torch.equal(items, ITEMS) and torch.equal(offsets, OFFSETS)
    assert items.dtype == offsets.dtype == torch.int64
    assert sequences.batch == 3 and sequences.lengths.tolist() == [2, 1, 4]


def test_padding_is_the_inverse_of_packing():
    item_seq, lengths = Sequences(ITEMS, OFFSETS).padded(4)
    assert torch.equal(item_seq, PADDED[0]) and torch.equal(lengths, PADDED[1])
    rows = torch.randn(7, 2, 3)
    wide = pad(rows, OFFSETS, 5, fill=torch.tensor([1.0, -1.0, 1.0]))
    assert wide.shape == (3, 5, 2, 3)
    assert torch.equal(unpad(wide, OFFSETS), rows)
    assert wide[1, 1:].unique(dim=0).tolist() == [[[1, -1, 1]] * 2]
    assert not pad(rows, OFFSETS, 5)[0, 2:].any()


def test_rows_know_their_sequence_and_position():
    sequence, position = row_positions(OFFSETS)
    assert sequence.tolist() == [0, 0, 1, 2, 2, 2, 2]
    assert position.tolist() == [0, 1, 0, 0, 1, 2, 3]


def test_repeated_sequences_come_pass_by_pass():
    twice = Sequences(ITEMS, OFFSETS).repeat(2)
    assert torch.equal(twice.items, torch.cat((ITEMS, ITEMS)))
    assert twice.offsets.tolist() == [0, 2, 3, 7, 9, 10, 14]


def test_items_behind_a_sequence_do_not_get_in():
    behind = torch.where(PADDED[0] == 0, 4, PADDED[0])
    assert torch.equal(given(behind, PADDED[1]).items, ITEMS)


def test_an_empty_batch_stays_empty():
    for pair in ((torch.zeros(0, 4, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)), (ITEMS[:0], OFFSETS[:1])):
        sequences = given(*pair)
        assert sequences.batch == 0 and len(sequences.items) == 0
        assert sequences.padded(4)[0].shape == (0, 4)


def test_a_batch_gives_its_sequences():
    batch = make_batch(train_run.log(), train_run.split().train, torch.arange(5), 4)
    assert isinstance(batch.sequences, Sequences)
    assert batch.sequences.items is batch.items and batch.sequences.offsets is batch.offsets
    again = pickle.loads(pickle.dumps(batch.sequences))
    assert type(again) is Sequences and torch.equal(again.items, batch.items)


@pytest.mark.parametrize(("items", "offsets", "message"), [
    (ITEMS, [0, 2, 3, 6], "item_seq_len must be the offsets \\[B \\+ 1\\] from 0 to 7, the number of packed items"),
    (ITEMS, [1, 2, 3, 7], "item_seq_len must be the offsets"),
    (ITEMS, [[0, 7]], "item_seq_len must be the offsets"),
    (ITEMS, [], "item_seq_len must be a tensor of integers, but got torch.float32"),
    (ITEMS, [0, 7], r"item_seq_len must give every sequence 1\.\.6 items, but gives 7\.\.7"),
    (ITEMS, [0, 2, 2, 7], r"item_seq_len must give every sequence 1\.\.6 items, but gives 0\.\.5"),
    (ITEMS, [0, 3, 2, 7], r"item_seq_len must give every sequence 1\.\.6 items, but gives -1\.\.5"),
    (ITEMS + 1, [0, 2, 3, 7], r"item_seq must hold ids in 0\.\.9, but it spans 4\.\.10"),
    (ITEMS - 4, [0, 2, 3, 7], r"item_seq must hold ids in 0\.\.9, but it spans -1\.\.5"),
    (ITEMS - 3, [0, 2, 3, 7], r"item_seq holds PAD \(0\) inside a sequence, at position 0 of sequence 0: padding must follow"),
    (torch.ones(2, 3, 4).long(), [1, 1], r"item_seq must be \[B, L\] with L <= 6"),
    (torch.tensor(3), [1], r"item_seq must be \[B, L\] with L <= 6, but got \[\]"),
])  # fmt: skip
def test_what_is_no_batch_of_sequences_is_named(items, offsets, message):
    with pytest.raises(InputError, match=message):
        given(items, torch.tensor(offsets))
