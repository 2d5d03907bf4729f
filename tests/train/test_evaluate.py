"""Metrics and ranks agree with an independent library, with top-k, for every batch size, and with a dense ranking."""

import copy
import itertools
import math

import ir_measures
import pytest
import torch

import lares_fast
from lares_fast import LARESConfig, _dispatch, ops
from lares_fast._random import root_key
from lares_fast.catalog import Catalog
from lares_fast.data import leave_one_out
from lares_fast.train import metrics, model_ranks
from lares_fast.train.baselines import markov_ranks, popularity_ranks
from lares_fast.train.evaluate import MASKED, NOT_MASKED, _queries, history_of, keep_rankable
from tests.support import train_run
from tests.support.catalog_cases import BACKENDS, needs_native

KEY = root_key(5)
KS = (1, 5, 10, 50)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    return lares_fast.LARES(LARESConfig(n_items=train_run.log().n_items, **train_run.MODEL))


def test_metrics_by_hand():
    result = metrics(torch.tensor([0, 3, 70]), (1, 5))
    assert result["recall@1"] == pytest.approx(1 / 3)
    assert result["recall@5"] == pytest.approx(2 / 3)
    assert result["ndcg@5"] == pytest.approx((1 + 1 / math.log2(5)) / 3)
    assert result["mrr@5"] == pytest.approx((1 + 1 / 4) / 3)


def test_metrics_equal_ir_measures():
    ranks, n = torch.randint(0, 60, (40,)), 60
    qrels = [ir_measures.Qrel(str(q), "target", 1) for q in range(40)]
    run = []
    for q, rank in enumerate(ranks.tolist()):
        documents = [f"d{i}" for i in range(n)]
        documents.insert(rank, "target")
        run += [ir_measures.ScoredDoc(str(q), d, float(-i)) for i, d in enumerate(documents)]
    measures = {"recall": ir_measures.R, "ndcg": ir_measures.nDCG, "mrr": ir_measures.RR}
    theirs = ir_measures.calc_aggregate([m @ k for m in measures.values() for k in KS], qrels, run)
    ours = metrics(ranks, KS)
    for name, measure in measures.items():
        for k in KS:
            assert ours[f"{name}@{k}"] == pytest.approx(theirs[measure @ k], abs=1e-9)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_the_batch_size_does_not_change_the_metrics(batch_size, model):
    rows = train_run.split().test
    whole = model_ranks(model, train_run.log(), rows, key=KEY, batch_size=256)
    parts = model_ranks(model, train_run.log(), rows, key=KEY, batch_size=batch_size)
    for history in (MASKED, NOT_MASKED):
        a, b = metrics(whole[history], KS), metrics(parts[history], KS)
        assert all(abs(a[name] - b[name]) <= 1e-5 for name in a)


def history_without_target(log, rows, batch):
    """Return the history without the target: a user may have bought it before, and evaluation ranks it even then."""
    offsets, ids = history_of(log, rows, batch.rows)
    owner = torch.repeat_interleave(torch.arange(len(batch)), offsets.diff())
    kept = ids != batch.target[owner]
    return torch.nn.functional.pad(torch.bincount(owner[kept], minlength=len(batch)).cumsum(0), (1, 0)), ids[kept]


def places_in_topk(model, history, backend):
    """Return the place of each test row's target in ``topk`` over the whole catalog, for the queries of evaluation."""
    log, rows = train_run.log(), train_run.split().test
    places = torch.empty(len(rows), dtype=torch.int64)
    for batch, query, items in _queries(model, log, rows, KEY, None, 17, None):
        exclude = history_without_target(log, rows, batch) if history == MASKED else None
        _, ids = Catalog(items).topk(query, len(items) - 1, exclude=exclude, backend=backend)
        places[batch.rows] = (ids == batch.target[:, None]).int().argmax(dim=1)
    return places


@needs_native
@pytest.mark.parametrize("similarity", ["dot", "cos"])
@pytest.mark.parametrize("history", [MASKED, NOT_MASKED])
def test_metrics_are_those_of_topk(history, similarity):
    """The metrics are exactly equal even with near ties, because both ops give the same bits of every score."""
    torch.manual_seed(3)
    model = lares_fast.LARES(LARESConfig(n_items=train_run.log().n_items, similarity=similarity, **train_run.MODEL))
    with ops.backend("native"):
        ranks = model_ranks(model, train_run.log(), train_run.split().test, key=KEY, batch_size=17)[history]
    places = places_in_topk(model, history, "native")
    assert torch.equal(ranks, places)
    assert metrics(ranks, KS) == metrics(places, KS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("history", [MASKED, NOT_MASKED])
def test_every_backend_ranks_like_the_reference(history, backend, model):
    with ops.backend(backend):
        ranks = model_ranks(model, train_run.log(), train_run.split().test, key=KEY, batch_size=17)[history]
    agree = ranks == places_in_topk(model, history, "reference")
    assert agree.double().mean() > 0.95


@needs_native
def test_evaluation_and_filter_run_on_the_kernel(model):
    log, rows = train_run.log(), train_run.split().test
    before = _dispatch.calls["target_rank", "native"]
    model_ranks(model, log, rows, key=KEY, batch_size=20)
    assert _dispatch.calls["target_rank", "native"] == before + -(-len(rows) // 20), "one pass a batch gives both rankings"
    with ops.backend("native"):
        kept = keep_rankable(model, log, rows, key_of_pass=lambda _: KEY, passes=1, top=20)
    with ops.backend("reference"):
        theirs = keep_rankable(model, log, rows, key_of_pass=lambda _: KEY, passes=1, top=20)
    assert 0 < len(kept) < len(rows)
    assert abs(len(kept) - len(theirs)) <= 2


def test_pad_is_never_ranked(model):
    """No input and no ranking uses the row of PAD, so it may hold any numbers."""
    log, rows = train_run.log(), train_run.split().test
    before = model_ranks(model, log, rows, key=KEY)
    loud = copy.deepcopy(model)
    with torch.no_grad():
        loud.item_embedding.weight[0] *= 1000
    after = model_ranks(loud, log, rows, key=KEY)
    for history in (MASKED, NOT_MASKED):
        assert torch.equal(before[history], after[history])


def test_ranks_do_not_depend_on_the_mode_of_the_model(model):
    """Another part of the program may train the model. The mode of each of its modules stays."""
    log, split = train_run.log(), train_run.split()
    expected = model_ranks(model.eval(), log, split.valid, key=root_key(1))
    trained = copy.deepcopy(model).train()
    trained.pre_block.eval()
    before = [module.training for module in trained.modules()]
    seen = []

    def progress(done, total):
        seen.append([module.training for module in trained.modules()] == before)

    found = model_ranks(trained, log, split.valid, key=root_key(1), progress=progress)
    assert all(torch.equal(found[name], ranks) for name, ranks in expected.items())
    assert seen and all(seen)


def test_baselines_against_a_direct_count():
    log, split = train_run.log(), train_run.split()
    popularity = [0] * log.n_items
    follows = [[0] * log.n_items for _ in range(log.n_items)]
    for user in range(log.n_users):
        items = log.history(user)[:-2].tolist()
        for item in items:
            popularity[item] += 1
        for a, b in itertools.pairwise(items):
            follows[a][b] += 1
    for ranks, score in (
        (popularity_ranks(log, split, split.test), lambda last, item: popularity[item]),
        (markov_ranks(log, split, split.test), lambda last, item: (follows[last][item], popularity[item])),
    ):
        for user in range(log.n_users):
            *seen, target = log.history(user).tolist()
            order = sorted(range(1, log.n_items), key=lambda i: (score(seen[-1], i), -i), reverse=True)
            assert ranks[NOT_MASKED][user] == order.index(target)
            order = [i for i in order if i == target or i not in seen]
            assert ranks[MASKED][user] == order.index(target)


def test_a_collapsed_model_earns_no_credit(model):
    log = train_run.log()
    flat = lares_fast.LARES(model.config)
    with torch.no_grad():
        flat.item_embedding.weight[:] = flat.item_embedding.weight[1]
    split = leave_one_out(log)
    ranks = model_ranks(flat, log, split.test, key=KEY)[NOT_MASKED]
    assert torch.equal(ranks, torch.from_numpy(split.test.targets(log)).long() - 1)
