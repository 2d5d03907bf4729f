"""The baselines equal dense tables of scores, need little memory and report progress."""

import time
import tracemalloc

import numpy as np
import pytest
import torch

from lares_fast.data import InteractionLog, Rows, leave_one_out, temporal_split
from lares_fast.train import Interrupted, Trainer, baselines
from lares_fast.train.baselines import markov_ranks, popularity_ranks
from lares_fast.train.evaluate import MASKED, NOT_MASKED
from tests.support import train_run


def random_log(rng, n_users, n_items, lengths):
    length = rng.integers(*lengths, n_users)
    items = 1 + rng.zipf(1.4, length.sum()) % (n_items - 1)
    offsets = np.concatenate(([0], np.cumsum(length)))
    times = np.concatenate([np.sort(rng.integers(0, 50, n)) for n in length])
    return InteractionLog(
        items=items.astype(np.int32), offsets=offsets, times=times, user_ids=np.arange(n_users), item_ids=np.arange(n_items)
    )


def dense_ranks(log, split, rows, markov):
    """Rank by definition: sort a table of the scores of all items by score, then by id."""
    popularity = np.zeros(log.n_items)
    follows = np.zeros((log.n_items, log.n_items))
    for user in range(log.n_users):
        seen = log.items[log.offsets[user] : split.train_end[user]]
        np.add.at(popularity, seen, 1)
        np.add.at(follows, (seen[:-1], seen[1:]), 1)
    ranks = {NOT_MASKED: [], MASKED: []}
    for user, end in zip(rows.users, rows.ends, strict=True):
        history, target = log.items[log.offsets[user] : end], log.items[end]
        first = follows[history[-1]] if markov else np.zeros(log.n_items)
        order = np.lexsort((np.arange(log.n_items), -popularity, -first))
        before = order[: order.tolist().index(target)]
        before = before[before > 0]
        ranks[NOT_MASKED].append(len(before))
        ranks[MASKED].append(len(np.setdiff1d(before, history)))
    return ranks


@pytest.mark.parametrize("seed", range(12))
def test_baselines_equal_a_dense_table_with_its_ties(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    log = random_log(rng, n_users=int(rng.integers(1, 50)), n_items=int(rng.integers(3, 40)), lengths=(4, 25))
    splits = [leave_one_out(log)]
    if log.n_users > 20:
        splits.append(temporal_split(log, 30, 40))
    for split in splits:
        for rows in (split.train, split.valid, split.test, Rows(split.test.users[:0], split.test.ends[:0])):
            for batch in (1, 1 << 18):
                monkeypatch.setattr(baselines, "_BATCH_EVENTS", batch)
                for ranks, markov in ((popularity_ranks, False), (markov_ranks, True)):
                    found, expected = ranks(log, split, rows), dense_ranks(log, split, rows, markov)
                    assert {name: rank.tolist() for name, rank in found.items()} == expected
                    assert {rank.dtype for rank in found.values()} == {torch.int64}


def test_a_million_items_take_little_memory_and_time():
    log = random_log(np.random.default_rng(0), n_users=4000, n_items=1_000_000, lengths=(5, 30))
    split = leave_one_out(log)
    tracemalloc.start()
    began = time.process_time()
    for ranks in (popularity_ranks, markov_ranks):
        ranks(log, split, split.test)
    assert time.process_time() - began < 10
    # One row of a dense table of scores would take 8 MB.
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


@pytest.mark.parametrize("ranks", [popularity_ranks, markov_ranks])
def test_progress_rises_to_the_number_of_rows_and_may_stop_the_work(ranks, monkeypatch):
    monkeypatch.setattr(baselines, "_BATCH_EVENTS", 200)
    log = random_log(np.random.default_rng(0), n_users=200, n_items=30, lengths=(4, 25))
    split, calls = leave_one_out(log), []
    ranks(log, split, split.test, lambda done, total: calls.append((done, total)))
    assert len(calls) > 5
    assert calls == sorted(set(calls))
    assert calls[-1] == (200, 200)

    def stop(done, total):
        calls.append(done)
        raise KeyboardInterrupt

    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        ranks(log, split, split.test, stop)
    assert len(calls) == 1


@pytest.mark.parametrize("what", ["popularity", "markov"])
def test_a_stop_during_the_baselines_is_obeyed_and_a_resumed_run_has_both(tmp_path, what):
    def trainer(stop):
        def emit(event):
            if event["event"] == "progress" and event["what"] == stop:
                run.request_stop()

        run = Trainer(train_run.config(spt_epochs=1), train_run.log(), train_run.split(), tmp_path, emit)
        return run

    def baselines_of(run):
        return [row["phase"] for row in run.state.history if row["phase"] in ("popularity", "markov")]

    stopped = trainer(what)
    with pytest.raises(Interrupted):
        stopped.run(("spt",))
    assert baselines_of(stopped) == {"popularity": [], "markov": ["popularity"] * 2}[what]
    resumed = trainer(None)
    resumed.run(("spt",))
    # The validation rows, and then the test rows, each with the history masked and not masked.
    assert baselines_of(resumed) == (["popularity"] * 2 + ["markov"] * 2) * 2
