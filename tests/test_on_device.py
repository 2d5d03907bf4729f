"""Evaluation, the data filter and ``Recommender`` on a device other than the CPU: where they wait, and what they answer.

The ops compute on the CPU and claim to be on the device, so all Python around them is checked, and the answers are real.
"""

from dataclasses import fields, replace

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from lares_fast import LARES, LARESConfig, _dispatch, reference, serve
from lares_fast._errors import InputError
from lares_fast._random import fold, root_key
from lares_fast.ops import _cuda_launch
from lares_fast.serve import Recommender
from lares_fast.train import evaluate, finite
from tests.support import train_run
from tests.support.fake_device import DEVICE, DeviceTensor, FakeDevice, to_fake_device

KEY = root_key(5)
N = train_run.log().n_items


@pytest.fixture
def device(monkeypatch):
    """Return an active fake device with a list ``waits``: the names of the functions that waited for it."""
    fake = FakeDevice()
    fake.waits, choose = [], _dispatch.choose

    def chosen(op, argument, *args):
        if not any(isinstance(value, DeviceTensor) for value in pytree.tree_leaves(args[0].arguments())):
            return choose(op, argument, *args)
        # The backends copy depths and rows themselves.
        parts = [getattr(args[0], f.name) for f in fields(args[0]) if f.name not in ("depth", "rows")]
        tensors = [value for value in pytree.tree_leaves(parts) if isinstance(value, torch.Tensor)]
        assert all(isinstance(value, DeviceTensor) for value in tensors), f"{op} has tensors on two devices"

        def run(call):
            inner = {f.name: pytree.tree_map_only(DeviceTensor, lambda x: x.inner, getattr(call, f.name)) for f in fields(call)}
            with _disable_current_modes():
                if (lists := inner.get("exclude")) is not None:
                    # On a GPU, ids may follow the last list. The checks on the CPU do not accept them.
                    inner["exclude"] = lists._replace(ids=lists.ids[: int(lists.offsets[-1])])
                found = choose(op, argument, on_cpu := replace(call, **inner)).run(on_cpu)
            return pytree.tree_map_only(torch.Tensor, DeviceTensor, found)

        return _dispatch.Backend("fake", run)

    def waiting(function):
        def call(*args):
            fake.waits.append(function.__name__)
            fake.allowed = True
            try:
                return function(*args)
            finally:
                fake.allowed = False

        return call

    monkeypatch.setattr(_dispatch, "choose", chosen)
    for module, name in [
        (evaluate, "to_host"),
        (serve, "to_host"),
        (evaluate, "largest"),
        (serve, "largest"),
        (finite, "largest"),
    ]:
        monkeypatch.setattr(module, name, waiting(getattr(module, name)))
    return fake


def models(**config):
    """Return one model on the CPU and an equal one on the fake device."""
    torch.manual_seed(3)
    here = LARES(LARESConfig(n_items=N, **{**train_run.MODEL, **config})).eval()
    torch.nn.init.normal_(here.item_embedding.weight)
    there = LARES(here.config).eval()
    there.load_state_dict(here.state_dict())
    for module in there.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = to_fake_device(parameter)
    return here, there


@pytest.mark.parametrize("similarity", ["dot", "cos"])
def test_evaluation_ranks_on_the_device_and_waits_once(device, similarity):
    here, there = models(similarity=similarity)
    log, rows, done = train_run.log(), train_run.split().test, []
    expected = evaluate.model_ranks(here, log, rows, key=KEY, num_steps=3, batch_size=7)
    device.waits.clear()
    with device:
        found = evaluate.model_ranks(
            there, log, rows, key=KEY, num_steps=3, batch_size=7, progress=lambda *at: done.append((*at, len(device.waits)))
        )
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # The weights are checked before the first batch, the scores and the ranks are read after the last one.
    assert device.waits == ["largest", "largest", "largest", "to_host"]
    assert [at for at, _, _ in done] == [*range(7, len(rows), 7), len(rows)]
    assert {waits for *_, waits in done} == {1}


def test_the_filter_waits_once_in_each_pass(device):
    here, there = models()
    log, rows = train_run.log(), train_run.split().test
    how = {"key_of_pass": lambda number: fold(KEY, number), "passes": 3, "top": 12, "batch_size": 9}
    expected = evaluate.keep_rankable(here, log, rows, **how)
    device.waits.clear()
    with device:
        found = evaluate.keep_rankable(there, log, rows, **how)
    assert 0 < len(expected) < len(rows)
    assert found.users.tolist() == expected.users.tolist() and found.ends.tolist() == expected.ends.tolist()
    assert device.waits.count("to_host") == 3 and len(device.waits) == 3 * 4


def test_an_evaluation_of_no_rows(device):
    here, there = models()
    rows = train_run.split().test
    none = type(rows)(rows.users[:0], rows.ends[:0])
    for model in (here, there):
        with device:
            assert [len(rank) for rank in evaluate.model_ranks(model, train_run.log(), none, key=KEY).values()] == [0, 0]
            assert len(evaluate.keep_rankable(model, train_run.log(), none, key_of_pass=lambda _: KEY, passes=2, top=3)) == 0


@pytest.mark.parametrize("similarity", ["dot", "cos"])
def test_recommendations_wait_once_for_all_batches(device, similarity):
    here, there = models(similarity=similarity, tau=0.5)
    histories = [[3], [1, 2, 3], list(range(1, 16)), ["x"], [9, 9, 4], list(range(20, 31)), [7, 30]]
    expected = Recommender(here, range(N))
    device.waits.clear()
    with device:
        served = Recommender(there, range(N))
        assert device.waits == ["largest", "largest"]
        for size in (2, 256):
            for how in ({"exclude_seen": True}, {"exclude_seen": False, "num_steps": 2}):
                device.waits.clear()
                found = served.recommend(histories, 5, batch_size=size, **how)
                assert device.waits == ["largest", "to_host", "to_host"]
                there_is = expected.recommend(histories, 5, batch_size=size, **how)
                assert found.ids == there_is.ids and found.unknown == 1 and found.empty == [3]
                torch.testing.assert_close(found.scores, there_is.scores, rtol=0, atol=0)
        device.waits.clear()
        queries = served.encode([[3], [1, 2]], batch_size=1)
        assert device.waits == ["largest", "to_host"]
        vectors = served.item_vectors()
        assert served.recommend([["x"]]).ids == [[]] and served.recommend([]).ids == []
    torch.testing.assert_close(queries, expected.encode([[3], [1, 2]], batch_size=1), rtol=0, atol=0)
    assert torch.equal(vectors, expected.item_vectors())


def test_exclusion_lists_may_be_on_either_device(device):
    here, there = models()
    items, lengths = torch.tensor([[4, 8, 15], [16, 23, 0]]), torch.tensor([3, 2])
    # A padded history as a list holds PAD.
    exclude = torch.tensor([0, 3, 6]), items.flatten()
    _, expected = here.recommend(items, lengths, 9, exclude=exclude)
    with device:
        for lists in (exclude, tuple(map(to_fake_device, exclude))):
            _, found = there.recommend(to_fake_device(items), lengths, 9, exclude=lists)
            assert found.device == DEVICE and torch.equal(found.inner, expected)
        with pytest.raises(InputError, match="exclude ids must be in 0"):
            there.recommend(to_fake_device(items), lengths, 9, exclude=(exclude[0], exclude[1] + N))
        with pytest.raises(InputError, match="exclude offsets must be 1-D"):
            there.recommend(to_fake_device(items), lengths, 9, exclude=(exclude[0], to_fake_device(exclude[1])))
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


def test_scores_that_are_not_finite_are_noticed_at_the_end(device):
    log, rows = train_run.log(), train_run.split().test
    with device:
        _, there = models()
        served = Recommender(there, range(N))
        there.recurrence.core.layers[0].feed_forward.norm.weight.inner.fill_(torch.nan)
        with pytest.raises(finite.NotFiniteError, match="the weights of the model"):
            evaluate.model_ranks(there, log, rows, key=KEY)
        for call in (served.recommend, served.encode):
            with pytest.raises(finite.NotFiniteError, match="the scores of the model"):
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
