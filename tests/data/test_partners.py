"""The distribution of same-target partners."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lares_fast.data import InteractionLog, SameTargetIndex, leave_one_out, log_from_sequences

# By degrees of freedom. A correct draw exceeds its value once in a million tests.
CHI_SQUARE_1E6 = {1: 23.93, 2: 27.63, 3: 30.66, 4: 33.38, 5: 35.89}


def with_targets(targets):
    """Return a log with one training row for each of the targets."""
    return log_from_sequences({user: [1, target, 1, 1] for user, target in enumerate(targets, start=1)})


def index_of(log: InteractionLog):
    return SameTargetIndex(log, leave_one_out(log).train)


def draws(log, rows, n, seed=0):
    """Return partners [n, len(rows)]."""
    index = index_of(log)
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([index.sample(rows, generator) for _ in range(n)])


def test_partners_are_uniform_among_the_others():
    targets = [2, 3, 2, 4, 2, 3, 2, 2, 2]
    counts = {row: draws(with_targets(targets), torch.full((30_000,), row), 1)[0].bincount(minlength=9) for row in range(9)}
    for row, count in counts.items():
        others = [other for other, target in enumerate(targets) if target == targets[row] and other != row]
        if not others:
            assert count[row] == 30_000
            continue
        assert count[others].sum() == 30_000
        expected = 30_000 / len(others)
        if len(others) > 1:
            assert ((count[others] - expected) ** 2 / expected).sum() < CHI_SQUARE_1E6[len(others) - 1]


def test_rows_of_a_batch_draw_independently():
    pairs = draws(with_targets([2, 2, 2]), torch.tensor([0, 0]), 20_000)
    both = ((pairs[:, 0] - 1) * 2 + pairs[:, 1] - 1).bincount(minlength=4)
    assert ((both - 5_000) ** 2 / 5_000).sum() < CHI_SQUARE_1E6[3]


@settings(deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=30), st.integers(0, 2**32))
def test_a_partner_has_the_same_target_and_is_another_row_if_there_is_one(targets, seed):
    log = with_targets(targets)
    rows = leave_one_out(log).train
    target = rows.targets(log)
    partner = draws(log, torch.arange(len(rows)), 1, seed)[0].numpy()
    assert (target[partner] == target).all()
    alone = np.bincount(target)[target] == 1
    assert ((partner == np.arange(len(rows))) == alone).all()


def test_the_generator_decides_alone():
    log = with_targets([2] * 20)
    assert torch.equal(draws(log, np.arange(20), 3, seed=1), draws(log, torch.arange(20), 3, seed=1))
    assert not torch.equal(draws(log, np.arange(20), 3, seed=1), draws(log, np.arange(20), 3, seed=2))
