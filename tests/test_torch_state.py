"""A program may change PyTorch's defaults and modes: the answers stay equal, or one error names the remedy."""

from contextlib import contextmanager, nullcontext

import pytest
import torch

import lares_fast
from lares_fast import LARES, LARESConfig, Recommender
from lares_fast._errors import InputError
from lares_fast.train import Trainer
from tests.support import train_run

CONFIG = LARESConfig(n_items=61, **train_run.MODEL)
IDS = list(range(61))
HISTORIES = [[1, 2, 3], [4]]
OTHER = (torch.float64, torch.float16, torch.bfloat16)


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def trainer(out):
    return Trainer(train_run.config(spt_epochs=1, rpt_epochs=1), train_run.log(), train_run.split(), out)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the folder of a run, and the weights at its end."""
    out = tmp_path_factory.mktemp("run")
    here = trainer(out)
    here.run(("spt",))
    return out, here.model.state_dict()


def answers(recommender):
    histories = [recommender.item_ids[:3], recommender.item_ids[4:5]]
    answer = recommender.recommend(histories, 5)
    ids = torch.tensor([[recommender.item_ids.index(item) for item in line] for line in answer.ids])
    return answer.scores, ids, recommender.encode(histories), recommender.item_vectors()


def assert_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("dtype", OTHER)
@pytest.mark.parametrize("similarity", ["dot", "cos"])
def test_answers_do_not_depend_on_the_default_dtype(similarity, dtype):
    recommender = Recommender(LARES(CONFIG.replace(similarity=similarity)), IDS)
    expected = answers(recommender)
    with default_dtype(dtype):
        assert_equal(answers(recommender), expected)
        assert_equal(answers(Recommender(recommender.model, IDS)), expected)


@pytest.mark.parametrize("dtype", OTHER)
def test_a_loaded_model_has_float32_whatever_the_defaults_are(dtype, run):
    recommender = lares_fast.load(run[0], "cpu")
    with default_dtype(dtype):
        assert_equal(answers(lares_fast.load(run[0], "cpu")), answers(recommender))
    with torch.device("meta"):
        loaded = lares_fast.load(run[0], "cpu")
    assert_equal(answers(loaded), answers(recommender))


@pytest.mark.parametrize("dtype", OTHER)
def test_a_recommender_refuses_a_model_of_another_dtype(dtype):
    wanted = r"must have parameters of torch\.float32, but its position_embedding\.weight .* call model\.float\(\)"
    model = LARES(CONFIG)
    model.position_embedding.to(dtype)
    with pytest.raises(InputError, match=wanted):
        Recommender(model, IDS)
    assert Recommender(model.float(), IDS).recommend(HISTORIES, 5).ids


def test_a_recommender_refuses_a_model_without_numbers():
    with pytest.raises(InputError, match=r"item_embedding\.weight is on the device meta"):
        Recommender(LARES(CONFIG).to("meta"), IDS)


def test_a_recommender_refuses_another_default_device():
    recommender = Recommender(LARES(CONFIG), IDS)
    for ask in (recommender.recommend, recommender.encode):
        with torch.device("meta"), pytest.raises(InputError, match=r"default device .* torch\.set_default_device\(None\)"):
            ask(HISTORIES)


@pytest.mark.parametrize("dtype", OTHER)
def test_a_trainer_refuses_another_default_dtype(dtype, tmp_path):
    ready = trainer(tmp_path)
    for act in (lambda: trainer(tmp_path), lambda: ready.run(("spt",))):
        with default_dtype(dtype), pytest.raises(InputError, match=r"dtype .* torch\.set_default_dtype\(torch\.float32\)"):
            act()


def test_a_trainer_refuses_another_default_device(tmp_path):
    ready = trainer(tmp_path)
    for act in (lambda: trainer(tmp_path), lambda: ready.run(("spt",))):
        with torch.device("meta"), pytest.raises(InputError, match=r"device .* torch\.set_default_device\(None\)"):
            act()


@pytest.mark.parametrize(("built", "trained"), [
    (nullcontext, torch.inference_mode), (torch.inference_mode, nullcontext), (torch.inference_mode, torch.inference_mode),
    (torch.no_grad, torch.no_grad),
])  # fmt: skip
def test_a_program_without_gradients_trains_the_same_bits(built, trained, run, tmp_path):
    with built():
        here = trainer(tmp_path)
    with trained():
        here.run(("spt",))
    assert all(torch.equal(value, here.model.state_dict()[name]) for name, value in run[1].items())


def test_a_run_goes_on_in_inference_mode(tmp_path):
    whole = train_run.train(tmp_path / "whole", ("spt",)).model.state_dict()
    train_run.train(tmp_path / "cut", ("spt",), spt_epochs=1)
    with torch.inference_mode():
        found = train_run.train(tmp_path / "cut", ("spt",)).model.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in whole.items())
