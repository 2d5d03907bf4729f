"""The reference and the public model equal the official code, in every number of every golden file.

``LARES_GOLDEN_DIR`` names another folder with files in this format. Then all files of that folder are checked.
"""

import os
from collections import Counter
from pathlib import Path

import pytest
import torch

import lares_fast
from lares_fast import _dispatch, _native, convert, reference
from tests.support import golden_file

GOLDEN_DIR = Path(os.environ.get("LARES_GOLDEN_DIR", Path(__file__).parent / "golden"))
FILES = sorted(GOLDEN_DIR.glob("*.npz"))


def test_directory_has_files():
    assert FILES, f"no .npz file in {GOLDEN_DIR}"


@pytest.fixture(params=FILES, ids=lambda path: path.stem, scope="module")
def file(request):
    return golden_file.Golden(request.param)


@pytest.fixture(params=["plain", "reference", "native"])
def golden(request, file, monkeypatch):
    """Yield a file, for ``reference.LARES`` and for ``lares_fast.LARES`` on each backend of this machine."""
    if request.param == "plain":
        monkeypatch.setattr(file, "model_class", reference.LARES)
        yield file
        return
    if request.param == "native" and not _native.available()[0]:
        pytest.skip(_native.available()[1])
    monkeypatch.setattr(file, "model_class", lares_fast.LARES)
    monkeypatch.setenv("LARES_FAST_BACKEND", request.param)
    before = Counter(_dispatch.calls)
    yield file
    ran = _dispatch.calls - before
    assert ran["recurrence", request.param]
    assert {backend for _, backend in ran} == {request.param}


def test_forward(golden):
    golden_file.check_forward(golden)


def test_per_step_logprobs(golden):
    golden_file.check_logprobs(golden)


def test_scores(golden):
    golden_file.check_scores(golden)


def test_spt_loss_and_gradients(golden):
    golden_file.check_spt(golden)


@pytest.mark.parametrize("reward", ["recall", "ndcg"])
def test_rpt_rewards_loss_and_gradients(golden, reward):
    golden_file.check_rpt(golden, reward)


def test_official_names_round_trip(file):
    official = file.group("policy.")
    back = convert.to_official(convert.from_official(official, file.config), file.config)
    assert back.keys() == official.keys()
    assert all(torch.equal(back[name], official[name]) for name in official)
