"""A run says when its model has collapsed, is below a baseline, or has not improved."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from lares_fast.train import Trainer, validation
from lares_fast.train.advice import about_baselines, about_results, about_start, about_states
from lares_fast.train.alike import Cosines
from tests.support import train_run


def test_the_cosines_are_those_of_all_pairs():
    vectors = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) + 0.3
    rows = F.normalize(vectors.double(), dim=-1)
    pairs = (rows @ rows.T)[~torch.eye(50, dtype=torch.bool)]
    for sizes in ([50], [1, 20, 29]):
        alike = Cosines()
        for part in vectors.split(sizes):
            alike.add(part)
        assert alike.values() == pytest.approx((float(pairs.mean()), float(pairs.square().mean().sqrt())), rel=1e-12)


def test_the_cosines_of_few_equal_opposite_or_zero_vectors():
    alike = Cosines()
    assert alike.values() is None
    alike.add(torch.tensor([[3.0, 4.0]]))
    assert alike.values() is None
    alike.add(torch.tensor([[6.0, 8.0], [0.3, 0.4]]))
    assert alike.values() == pytest.approx((1.0, 1.0))
    # All vectors lie on one line, but their mean cosine does not show it.
    alike.add(torch.tensor([[-3.0, -4.0]] * 3))
    assert alike.values() == pytest.approx((-0.2, 1.0))
    alike.add(torch.zeros(1, 2))
    assert alike.values() == pytest.approx((-6 / 42, (30 / 42) ** 0.5))


def test_a_collapse_is_told_once():
    text = about_states("spt", 2, 0.9997, 0.31)
    assert text and "collapsed in epoch 2 of phase spt" in text and "0.9997" in text and "spt.warmup_steps" in text
    assert about_states("spt", 3, 0.9999, 0.9997) is None
    assert about_states("spt", 2, 0.89, 0.31) is None
    # The states of a new model say nothing.
    assert about_states("spt", 0, 0.9997, None) is None
    assert about_states("spt", 1, None, None) is None


def row(phase, value, split="test", history="masked"):
    return {"phase": phase, "split": split, "history": history, "ndcg@10": value}


def test_a_model_below_a_baseline():
    rows = [row("popularity", 0.022), row("markov", 0.054), row("spt", 0.016), row("spt", 0.9, "valid"), row("rpt", 0.06)]
    text = about_baselines("spt", rows, "masked")
    assert text and "ndcg@10 0.0160" in text and "popularity (0.0220) and markov (0.0540)" in text
    assert about_baselines("rpt", rows, "masked") is None
    assert about_baselines("spt", rows, "not masked") is None
    # The best number of steps counts.
    assert about_baselines("spt", [*rows, row("spt", 0.055)], "masked") is None
    text = about_baselines("spt", [*rows, row("spt", 0.03)], "masked")
    assert text and "baseline markov (0.0540)" in text and "popularity" not in text


def test_a_phase_that_kept_its_start():
    assert "still that of phase spt" in (about_start("rpt", 0, 0.0123) or "")
    assert "still that of the earlier run" in (about_start("spt", 0, 0.0123) or "")
    assert about_start("rpt", 1, 0.0123) is None
    assert about_start("spt", 0, -1.0) is None


def run(out, monkeypatch, lr):
    events = []
    config = train_run.config(spt_epochs=2, rpt_epochs=1)
    config = replace(config, spt=replace(config.spt, lr=lr), rpt=replace(config.rpt, lr=1e-12))
    trainer = Trainer(config, train_run.log(), train_run.split(), out, events.append)
    trainer.run(train_run.BOTH)
    return trainer, [event["text"] for event in events if event["event"] == "notice"]


def test_a_run_tells_all_of_it(tmp_path, monkeypatch):
    """The model of this run is hardly trained, and its second phase changes nothing but makes its value no better."""
    better = validation.metrics

    def falling(rank, ks, calls=[]):  # noqa: B006
        calls.append(1)
        return {name: value - 1e-6 * len(calls) for name, value in better(rank, ks).items()}

    monkeypatch.setattr(validation, "metrics", falling)
    monkeypatch.setattr("lares_fast.train.advice.COLLAPSED", -1.0)
    trainer, notices = run(tmp_path, monkeypatch, lr=1e-9)
    assert sum("has collapsed in epoch 1 of phase spt" in text for text in notices) == 1
    assert sum("simple baseline" in text for text in notices) == 2
    assert sum("phase rpt has not improved" in text for text in notices) == 1
    cosines = [row["state_cosine"] for row in trainer.state.history if "epoch" in row and row["split"] == "valid"]
    assert cosines and all(math.isfinite(value) and -1 <= value <= 1 for value in cosines)
    assert "state_cosine" in (tmp_path / "metrics.csv").read_text().splitlines()[0]


def test_the_sentences_about_a_whole_run():
    rows = [row("popularity", 0.5), row("spt", 0.1), {**row("spt", 0.1, "valid"), "epoch": 3, "state_cosine_rms": 0.995}]
    texts = about_results(rows, "masked")
    assert len(texts) == 2 and "simple baseline" in texts[0] and "epoch 3 of phase spt" in texts[1]
    assert about_results([], "masked") == []
