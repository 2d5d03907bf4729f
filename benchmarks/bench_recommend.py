"""Time recommendation by cosine with a stored normalised item table, against a table that is normalised for each batch.

The baselines work like the package before it stored the table. The baseline of ``Recommender.recommend`` normalises the table
twice: once in each call, and once for each batch of queries. docs/performance.md has the results.
"""

import pytest
import torch

import lares_fast
from lares_fast import LARESConfig, Recommender, ops
from lares_fast.catalog import Catalog
from lares_fast.gpu_bench import cases

N, B, L, K = 200_000, 256, 50, 10
SHAPE = f"N {N}, B {B}, D 64, cosine"
CHECK = "scores and ids equal the baseline's in every bit"
CONFIG = LARESConfig(n_items=N + 1, max_len=L, similarity="cos", tau=0.07)


class WithoutStoredTable(lares_fast.LARES):
    """A model that normalises its item table for each batch of queries, and for each catalog."""

    def queries(self, hidden):
        self.item_table()
        return super().queries(hidden)

    def catalog(self):
        return Catalog(self.item_table().detach())


def models():
    """Return (the model, the baseline) with equal weights. The item vectors differ in direction, as after training."""
    torch.manual_seed(0)
    model, baseline = (kind(CONFIG).eval() for kind in (lares_fast.LARES, WithoutStoredTable))
    torch.nn.init.normal_(model.item_embedding.weight)
    baseline.load_state_dict(model.state_dict())
    return model, baseline


@pytest.mark.large
def test_recommend_by_cosine(compare):
    model, _ = models()
    batch = cases.sequences("mean 8.75", B, L)

    @torch.no_grad()
    def normalise_each_batch():
        queries = model.queries(model.encode(*batch))
        scores, rows = ops.topk(queries, model.item_table()[1:], K)
        return scores, rows + 1

    candidates = {
        "normalised for each batch": normalise_each_batch,
        "LARES.recommend": lambda: model.recommend(*batch, k=K),
    }
    (expected_scores, expected_ids), (scores, ids) = (run() for run in candidates.values())
    assert torch.equal(expected_scores, scores)
    assert torch.equal(expected_ids, ids)
    compare("recommend", SHAPE, candidates, CHECK)


@pytest.mark.large
def test_recommender_by_cosine(compare):
    """Time one batch of raw histories, whose items are excluded."""
    ours, baseline = (Recommender(model, range(N + 1)) for model in models())
    item_seq, lengths = cases.sequences("mean 8.75", B, L)
    histories = [items[:length].tolist() for items, length in zip(item_seq, lengths, strict=True)]
    candidates = {
        "normalised for each batch": lambda: baseline.recommend(histories, K),
        "Recommender.recommend": lambda: ours.recommend(histories, K),
    }
    expected, found = (run() for run in candidates.values())
    assert torch.equal(expected.scores, found.scores)
    assert expected.ids == found.ids
    compare("recommend", f"{SHAPE}, raw histories", candidates, CHECK)
