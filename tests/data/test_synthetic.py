"""The synthetic log follows its probabilities, and the ranking by these probabilities is the best."""

from itertools import pairwise

import numpy as np
import pytest

from lares_fast._errors import InputError
from lares_fast.data import Rows, best_possible, leave_one_out, synthetic_log, temporal_split
from lares_fast.data.synthetic import MIN_LENGTH


@pytest.fixture(scope="module")
def log():
    return synthetic_log()


@pytest.fixture(scope="module")
def split(log):
    return leave_one_out(log)


def ndcg10(scores, target):
    """Return the NDCG@10 of ``scores`` [R, N], without PAD and with ties by id."""
    own = scores[np.arange(len(target)), target][:, None]
    before = (scores > own) | ((scores == own) & (np.arange(scores.shape[1]) < target[:, None]))
    rank = before[:, 1:].sum(1)
    return np.where(rank < 10, 1 / np.log2(rank + 2), 0).mean()


def test_log_is_the_same_for_the_same_seed_only(log):
    assert log.fingerprint() == synthetic_log(seed=0).fingerprint()
    assert log.fingerprint() != synthetic_log(seed=1).fingerprint()


def test_log_has_the_asked_size_and_says_that_it_is_synthetic(log):
    assert (log.n_users, log.n_items) == (3000, 601)
    assert log.lengths.mean() == pytest.approx(12, abs=0.4)
    assert log.lengths.min() == MIN_LENGTH
    assert log.items.min() >= 1
    assert log.items.max() <= 600
    assert log.synthetic
    assert log.statistics()["synthetic"]
    assert "synthetic" in log.summary().splitlines()[0]
    assert "no real people" in log.summary()
    assert log.lookup_items(["brand00-type00", "brand19-type29"]).tolist() == [1, 600]
    within = np.ones(log.n_events - 1, bool)
    within[log.offsets[1:-1] - 1] = False
    assert (np.diff(log.times)[within] >= 0).all()
    assert len(temporal_split(log, *np.quantile(log.times, [0.8, 0.9])).test) > 100


def test_law_is_that_of_a_direct_bayes_computation():
    log = synthetic_log(n_users=40, n_items=12, n_brands=3, mean_length=8, loyalty=0.5)
    shop, rows = log.shop, leave_one_out(log).test

    def law_given(brand, last):
        law = (1 - shop.loyalty) * shop.stray
        law[1 + brand * shop.n_types + shop.successor[(last - 1) % shop.n_types]] += shop.loyalty
        return law

    computed = shop.next_item(log, rows)
    for r, (user, end) in enumerate(zip(rows.users, rows.ends, strict=True)):
        history = log.items[log.offsets[user] : end].tolist()
        weight = np.ones(3)
        for last, item in pairwise(history):
            weight *= [law_given(brand, last)[item] for brand in range(3)]
        weight /= weight.sum()
        expected = sum(w * law_given(brand, history[-1]) for brand, w in enumerate(weight))
        np.testing.assert_allclose(computed[r], expected, rtol=1e-9)
    np.testing.assert_allclose(computed.sum(1), 1)


def test_targets_occur_as_often_as_the_law_says(log, split):
    """Over the training rows, events with probability p occur with frequency p."""
    pick = np.arange(0, len(split.train), 9)
    rows = Rows(split.train.users[pick], split.train.ends[pick])
    law, target = log.shop.next_item(log, rows), rows.targets(log)
    ordered = np.sort(law, axis=1)[:, ::-1]
    own = law[np.arange(len(target)), target][:, None]
    rank = (law > own).sum(1)
    for k in (1, 5, 50):
        expected = ordered[:, :k].sum(1)
        error = 5 * np.sqrt((expected * (1 - expected)).sum()) / len(rows)
        assert (rank < k).mean() == pytest.approx(expected.mean(), abs=error)


def test_best_possible_beats_markov_beats_popularity(log, split):
    target, last = split.test.targets(log), log.items[split.test.ends - 1]
    popularity = np.bincount(split.train.targets(log), minlength=log.n_items).astype(float)
    follows = np.zeros((log.n_items, log.n_items))
    np.add.at(follows, (log.items[split.train.ends - 1], split.train.targets(log)), 1)
    popular = ndcg10(np.tile(popularity, (len(target), 1)), target)
    markov = ndcg10(follows[last] + popularity / popularity.sum(), target)
    best = best_possible(log, split.test)
    assert best["ndcg@10"] == pytest.approx(ndcg10(log.shop.next_item(log, split.test), target))
    assert popular < 0.2
    assert popular + 0.2 < markov < best["ndcg@10"] - 0.15


def test_best_possible_knows_every_k_and_any_number_of_rows(log, split):
    best = best_possible(log, split.test, ks=(1, 600))
    assert list(best) == ["recall@1", "recall@600", "ndcg@1", "ndcg@600"]
    assert best["recall@600"] == 1
    assert best["recall@1"] == best["ndcg@1"]
    chosen = slice(1020, 1030)
    rows = Rows(split.test.users[chosen], split.test.ends[chosen])
    alone = [best_possible(log, Rows(rows.users[r : r + 1], rows.ends[r : r + 1]), (10,))["ndcg@10"] for r in range(10)]
    assert best_possible(log, rows, (10,))["ndcg@10"] == pytest.approx(np.mean(alone))


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"n_users": 0}, "n_users must be at least 1, but got 0"),
        ({"n_items": 50}, "n_items must be a multiple of n_brands, which is 20, and at least twice it, but got 50"),
        ({"mean_length": 5}, "mean_length must be greater than 5"),
        ({"loyalty": 1.0}, "loyalty must be between 0 and 1"),
        ({"seed": -1}, "seed must be in"),
    ],
)
def test_wrong_arguments_are_named(arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        synthetic_log(**arguments)
