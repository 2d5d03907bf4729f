"""Validation, the choice of the best model, and the test of a run."""

from __future__ import annotations

import time

from torch import Tensor

from lares_fast._finite import NotFiniteError
from lares_fast._weights import weights_of
from lares_fast.data import Rows
from lares_fast.train.advice import about_baselines, about_start, about_states
from lares_fast.train.alike import Cosines
from lares_fast.train.evaluate import MASKED, NOT_MASKED, model_ranks
from lares_fast.train.keys import evaluation_key
from lares_fast.train.ranking import metrics
from lares_fast.train.results import BASELINES, COSINE, COSINE_RMS, MILLISECONDS, WATCHED, result_rows
from lares_fast.train.run import Run


def validate(run: Run, epoch: int, means: dict[str, float]) -> None:
    """Rank the validation rows after ``epoch`` epochs, and store the model if it is the best of its phase so far.

    ``means`` join the results in metrics.csv. Raises :class:`NotFiniteError` if scores are not finite.
    """
    state, progress = run.state, run.state.progress
    alike = Cosines()
    try:
        ranks = _ranks(run, run.split.valid, "valid", run.model.config.steps, alike)
    except NotFiniteError:
        raise run.diverged("the scores in validation are not finite") from None
    found, before = alike.values(), _last_cosine(run)
    labels = dict(zip((COSINE, COSINE_RMS), found, strict=True)) if found else {}
    _add_results(run, ranks, "valid", epoch, run.model.config.steps, {**means, **labels})
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
    run.events.record("valid", phase=state.phase, epoch=epoch, metrics=watched, means=means, best=better, **labels)
    if text := about_states(state.phase, epoch, labels.get(COSINE_RMS), before):
        run.events.record("notice", text=text)


def rank_test_rows(run: Run) -> None:
    """Rank the test rows by the best model of the current phase, at every depth of ``evaluation.depth_ratios``."""
    state = run.state
    _drop_tests(run)
    last = weights_of(run.model)
    run.model.load_state_dict(run.best)
    try:
        for depth in run.config.evaluation.depths(run.model.config.mean_depth):
            began = time.perf_counter()
            ranks = _ranks(run, run.split.test, "test", depth)
            cost = 1000 * (time.perf_counter() - began) / max(1, len(run.split.test))
            _add_results(run, ranks, "test", state.progress.best_epoch, depth, {MILLISECONDS: cost})
    finally:
        run.model.load_state_dict(last)
    run.events.record("test", phase=state.phase, rows=[row for row in state.history if row["split"] == "test"])
    history = MASKED if run.config.evaluation.watch_masked else NOT_MASKED
    if text := about_baselines(state.phase, state.history, history):
        run.events.record("notice", text=text)
    run.save()


def tell_of_start(run: Run) -> None:
    """Tell if the phase that is over has not improved the model that it started from."""
    progress = run.state.progress
    if text := about_start(run.state.phase, progress.best_epoch, progress.best_value):
        run.events.record("notice", text=text)


def rank_baselines(run: Run) -> None:
    """Rank the validation and test rows by each baseline that has no results yet."""
    for split in ("valid", "test"):
        for name, baseline in BASELINES.items():
            # A run may have been stopped between two baselines. An earlier version ranked the test rows only.
            if all((row["phase"], row["split"]) != (name, split) for row in run.state.history):
                ranks = baseline(run.log, run.split, getattr(run.split, split), run.events.progress(name))
                run.state.history += result_rows(ranks, run.config.evaluation.ks, phase=name, split=split)


def _drop_tests(run: Run) -> None:
    """Remove the test results of the current phase, because they belong to an older model."""
    phase = run.state.phase
    run.state.history = [row for row in run.state.history if (row["phase"], row["split"]) != (phase, "test")]


def _last_cosine(run: Run) -> float | None:
    """Return the root mean square cosine that the last validation of the current phase found, if it is known."""
    rows = [row for row in run.state.history if (row["phase"], row["split"]) == (run.state.phase, "valid")]
    return rows[-1].get(COSINE_RMS) if rows else None


def _ranks(run: Run, rows: Rows, split: str, depth: int, alike: Cosines | None = None) -> dict[str, Tensor]:
    """Rank ``rows`` at ``depth`` steps. ``alike`` takes the queries."""
    settings = run.config.evaluation
    return model_ranks(
        run.model,
        run.log,
        rows,
        key=evaluation_key(settings.noise_seed),
        num_steps=depth,
        batch_size=settings.batch_size,
        progress=run.events.progress(f"{split} T={depth}"),
        observe=None if alike is None else alike.add,
    )


def _add_results(run: Run, ranks: dict[str, Tensor], split: str, epoch: int, depth: int, means: dict[str, float]) -> None:
    """Add the metrics of ``ranks`` to the history of the run."""
    labels = {"phase": run.state.phase, "split": split, "epoch": epoch, "test_T": depth, **means}
    run.state.history += result_rows(ranks, run.config.evaluation.ks, **labels)
