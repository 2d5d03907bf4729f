"""Validation, the choice of the best model, and the test of a run."""

from __future__ import annotations

from torch import Tensor

from lares_fast.data import Rows
from lares_fast.train.checkpoint import weights_of
from lares_fast.train.evaluate import MASKED, NOT_MASKED, model_ranks
from lares_fast.train.finite import NotFiniteError
from lares_fast.train.keys import evaluation_key
from lares_fast.train.ranking import metrics
from lares_fast.train.results import BASELINES, result_rows
from lares_fast.train.run import Run

# The metric that early stopping watches.
WATCHED = "ndcg@10"


def validate(run: Run, epoch: int, means: dict[str, float]) -> None:
    """Rank the validation rows after ``epoch`` epochs, and store the model if it is the best of its phase so far.

    ``means`` join the results in metrics.csv. Raises :class:`NotFiniteError` if scores are not finite.
    """
    state, progress = run.state, run.state.progress
    try:
        ranks = _evaluate(run, run.split.valid, "valid", epoch, run.model.config.steps, means)
    except NotFiniteError:
        raise run.diverged("the scores in validation are not finite") from None
    settings = run.config.evaluation
    watched = metrics(ranks[MASKED if settings.watch_masked else NOT_MASKED], settings.ks)
    value = watched[WATCHED]
    # As in RecBole, a tie counts as an improvement.
    better = value >= progress.best_value
    if better:
        progress.best_value, progress.best_epoch, progress.bad_epochs = value, epoch, 0
        progress.best = weights_of(run.model)
        _drop_tests(run)
        run.export_best()
    else:
        progress.bad_epochs += 1
    run.events.record("valid", phase=state.phase, epoch=epoch, metrics=watched, means=means, best=better)


def rank_test_rows(run: Run) -> None:
    """Rank the test rows by the best model of the current phase, at every depth of ``evaluation.depth_ratios``."""
    state = run.state
    _drop_tests(run)
    last = weights_of(run.model)
    run.model.load_state_dict(run.best)
    try:
        for depth in run.config.evaluation.depths(run.model.config.mean_depth):
            _evaluate(run, run.split.test, "test", state.progress.best_epoch, depth, {})
    finally:
        run.model.load_state_dict(last)
    run.events.record("test", phase=state.phase, rows=[row for row in state.history if row["split"] == "test"])
    run.save()


def rank_baselines(run: Run) -> None:
    """Rank the test rows by each baseline that has no results yet."""
    for name, baseline in BASELINES.items():
        # A run may have been stopped between two baselines.
        if all(row["phase"] != name for row in run.state.history):
            ranks = baseline(run.log, run.split, run.split.test, run.events.progress(name))
            run.state.history += result_rows(ranks, run.config.evaluation.ks, phase=name, split="test")


def _drop_tests(run: Run) -> None:
    """Remove the test results of the current phase, because they belong to an older model."""
    phase = run.state.phase
    run.state.history = [row for row in run.state.history if (row["phase"], row["split"]) != (phase, "test")]


def _evaluate(run: Run, rows: Rows, split: str, epoch: int, depth: int, means: dict[str, float]) -> dict[str, Tensor]:
    """Rank ``rows`` at ``depth`` steps, add the results to the history, and return the ranks."""
    settings = run.config.evaluation
    ranks = model_ranks(
        run.model,
        run.log,
        rows,
        key=evaluation_key(settings.noise_seed),
        num_steps=depth,
        batch_size=settings.batch_size,
        progress=run.events.progress(f"{split} T={depth}"),
    )
    labels = {"phase": run.state.phase, "split": split, "epoch": epoch, "test_T": depth, **means}
    run.state.history += result_rows(ranks, settings.ks, **labels)
    return ranks
