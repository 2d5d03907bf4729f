"""Evaluation, the data filter and ``Recommender`` on a device other than the CPU: where they wait, and what they answer.

The ops compute on the CPU and claim to be on the device, so all Python around them is checked, and the answers are real.
"""

import pytest
import torch
from torch.utils import _pytree as pytree

from lares_fast import LARES, LARESConfig, _finite, reference
from lares_fast._errors import InputError
from lares_fast._random import fold, root_key
from lares_fast.catalog import Catalog
from lares_fast.ops import _cuda_launch
from lares_fast.serve import Recommender
from lares_fast.train import evaluate
from tests.support import train_run
from tests.support.fake_device import DEVICE, FakeDevice, to_fake_device

KEY = root_key(5)
N = train_run.log().n_items
# The only two functions that may wait.
READ, CHECK = "_transfer.to_host", "_finite.largest"


def fake_device():
    return FakeDevice({READ, CHECK}, compute=True)


def places(device):
    """Return the functions that have waited since the last question."""
    found = [wait.place for wait in device.waits]
    device.waits.clear()
    return found


def models(**config):
    """Return one model on the CPU and an equal one on the fake device."""
    torch.manual_seed(3)
    here = LARES(LARESConfig(n_items=N, **{**train_run.MODEL, **config})).eval()
    torch.nn.init.normal_(here.item_embedding.weight)
    there = LARES(here.config).eval()
    there.load_state_dict(here.state_dict())
    with FakeDevice(True):
        return here, there.to(DEVICE)


@pytest.mark.parametrize("similarity", ["dot", "cos"])
def test_evaluation_ranks_on_the_device_and_waits_once(similarity):
    here, there = models(similarity=similarity)
    log, rows, done = train_run.log(), train_run.split().test, []
    expected = evaluate.model_ranks(here, log, rows, key=KEY, num_steps=3, batch_size=7)
    with fake_device() as device:
        found = evaluate.model_ranks(
            there, log, rows, key=KEY, num_steps=3, batch_size=7, progress=lambda *at: done.append((*at, len(device.waits)))
        )
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # The weights are checked before the first batch, the scores and the ranks are read after the last one.
    assert places(device) == [CHECK, CHECK, CHECK, READ]
    assert [at for at, _, _ in done] == [*range(7, len(rows), 7), len(rows)]
    assert {waits for *_, waits in done} == {1}


def test_the_filter_waits_once_in_each_pass():
    here, there = models()
    log, rows = train_run.log(), train_run.split().test
    how = {"key_of_pass": lambda number: fold(KEY, number), "passes": 3, "top": 12, "batch_size": 9}
    expected = evaluate.keep_rankable(here, log, rows, **how)
    with fake_device() as device:
        found = evaluate.keep_rankable(there, log, rows, **how)
    assert 0 < len(expected) < len(rows)
    assert found.users.tolist() == expected.users.tolist() and found.ends.tolist() == expected.ends.tolist()
    assert places(device) == [CHECK, CHECK, CHECK, READ] * 3


def test_an_evaluation_of_no_rows():
    here, there = models()
    rows = train_run.split().test
    none = type(rows)(rows.users[:0], rows.ends[:0])
    for model in (here, there):
        with fake_device():
            assert [len(rank) for rank in evaluate.model_ranks(model, train_run.log(), none, key=KEY).values()] == [0, 0]
            assert len(evaluate.keep_rankable(model, train_run.log(), none, key_of_pass=lambda _: KEY, passes=2, top=3)) == 0


def test_the_kernels_of_an_evaluation_are_launched_without_waiting(monkeypatch):
    """The ops run as on a GPU, so the ranks are arbitrary, and so are the scores."""
    monkeypatch.setattr(evaluate, "require_finite_scores", lambda *_: None)
    _, there = models(hidden_size=64, inner_size=64)
    rows = train_run.split().test
    with FakeDevice({READ, CHECK}) as device:
        ranks = evaluate.model_ranks(there, train_run.log(), rows, key=KEY, batch_size=7)
    batches = -(-len(rows) // 7)
    assert [len(rank) for rank in ranks.values()] == [len(rows)] * 2
    assert device.launches["recurrence_forward"] == 2 * batches and device.launches["target_rank"] == batches
    assert places(device) == [CHECK, CHECK, CHECK, READ]


@pytest.mark.parametrize("similarity", ["dot", "cos"])
def test_recommendations_wait_once_for_all_batches(similarity):
    here, there = models(similarity=similarity, tau=0.5)
    histories = [[3], [1, 2, 3], list(range(1, 16)), ["x"], [9, 9, 4], list(range(20, 31)), [7, 30]]
    expected = Recommender(here, range(N))
    with fake_device() as device:
        served = Recommender(there, range(N))
        assert places(device) == [CHECK, CHECK]
        for size in (2, 256):
            for how in ({"exclude_seen": True}, {"exclude_seen": False, "num_steps": 2}):
                found = served.recommend(histories, 5, batch_size=size, **how)
                assert places(device) == [CHECK, READ, READ]
                right = expected.recommend(histories, 5, batch_size=size, **how)
                assert found.ids == right.ids and found.unknown == 1 and found.empty == [3]
                torch.testing.assert_close(found.scores, right.scores, rtol=0, atol=0)
        queries = served.encode([[3], [1, 2]], batch_size=1)
        assert places(device) == [CHECK, READ]
        vectors = served.item_vectors()
        assert served.recommend([["x"]]).ids == [[]] and served.recommend([]).ids == []
        assert served.encode([]).shape == (0, here.config.hidden_size)
        assert places(device) == [READ]
    torch.testing.assert_close(queries, expected.encode([[3], [1, 2]], batch_size=1), rtol=0, atol=0)
    assert torch.equal(vectors, expected.item_vectors())


def test_exclusion_lists_may_be_on_either_device():
    here, there = models()
    items, lengths = torch.tensor([[4, 8, 15], [16, 23, 0]]), torch.tensor([3, 2])
    # A padded history as a list holds PAD.
    exclude = torch.tensor([0, 3, 6]), items.flatten()
    _, expected = here.recommend(items, lengths, 9, exclude=exclude)
    with FakeDevice(compute=True):
        _, found = there.recommend(to_fake_device(items), lengths, 9, exclude=exclude)
        assert found.device == DEVICE and torch.equal(found.inner, expected)
        lists, catalog = tuple(map(to_fake_device, exclude)), Catalog(to_fake_device(torch.zeros(N, 4)))
        for given in (exclude, lists):
            offsets, rows = catalog._excluded_rows(given, to_fake_device(torch.zeros(2, 4)))
            assert offsets.inner.tolist() == [0, 3, 5] and rows.inner[:5].tolist() == [3, 7, 14, 15, 22]
        with pytest.raises(InputError, match="exclude ids must be in 0"):
            there.recommend(to_fake_device(items), lengths, 9, exclude=(exclude[0], exclude[1] + N))
        with pytest.raises(InputError, match="exclude offsets must be 1-D"):
            there.recommend(to_fake_device(items), lengths, 9, exclude=(exclude[0], lists[1]))
    for wrong in (exclude[0], (exclude[0], [4, 8]), exclude[:1]):
        with pytest.raises(InputError, match="exclude"):
            here.recommend(items, lengths, 9, exclude=wrong)


def test_ids_behind_the_last_list_exclude_nothing():
    """The catalog moves PADs there, without a wait for their number."""
    query, items, target = torch.randn(2, 8), torch.randn(20, 8), torch.tensor([3, 4])
    offsets, ids = torch.tensor([0, 2, 3]), torch.tensor([9, 4, 7])
    behind = torch.cat((ids, torch.tensor([-1, -1])))
    for function, rest in ((reference.topk, 20), (reference.target_rank, target)):
        expected, found = (function(query, items, rest, exclude=(offsets, lists)) for lists in (ids, behind))
        pytree.tree_map(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0), found, expected)
    sorted_offsets, sorted_ids = _cuda_launch.sorted_lists(offsets, behind, len(items))
    assert sorted_offsets.tolist() == [0, 2, 3] and sorted_ids[:3].tolist() == [4, 9, 7]


def test_scores_that_are_not_finite_are_noticed_at_the_end():
    log, rows = train_run.log(), train_run.split().test
    _, there = models()
    with fake_device():
        served = Recommender(there, range(N))
        there.recurrence.core.layers[0].feed_forward.norm.weight.inner.fill_(torch.nan)
        with pytest.raises(_finite.NotFiniteError, match="the weights of the model"):
            evaluate.model_ranks(there, log, rows, key=KEY)
        for call in (served.recommend, served.encode):
            with pytest.raises(_finite.NotFiniteError, match="the scores of the model"):
                call([[1, 2]])


@pytest.mark.parametrize(
    "error", [torch.cuda.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA error: out of memory")]
)
def test_too_little_memory_is_one_sentence_with_a_batch_size_to_try(monkeypatch, error):
    model, _ = models()
    served, log, rows = Recommender(model, range(N)), train_run.log(), train_run.split().test

    def full(*_, **__):
        raise error

    monkeypatch.setattr(LARES, "encode", full)
    calls = {
        "evaluation.batch_size=32": lambda: evaluate.model_ranks(model, log, rows, key=KEY, batch_size=64),
        "evaluation.batch_size=10": lambda: evaluate.keep_rankable(
            model, log, rows, key_of_pass=lambda _: KEY, passes=1, top=3, batch_size=20
        ),
        "batch_size=100": lambda: served.recommend([[1]], 2, batch_size=200),
        "batch_size=128": lambda: served.encode([[1]]),
    }
    for setting, call in calls.items():
        half = int(setting.partition("=")[2])
        with pytest.raises(InputError, match=f"not enough for batch_size {2 * half}: try batch_size {half}") as found:
            call()
        assert found.value.setting == setting
    assert model.training is False
