"""Sentences about results that a user should not overlook, with the remedy."""

from __future__ import annotations

from collections.abc import Sequence

from lares_fast.train.config import PHASES, needs_start
from lares_fast.train.results import BASELINES, COSINE_RMS, WATCHED, Row

# If the root mean square of the cosines between states is above this, they lie nearly on one line, and there are only two
# rankings of the items.
COLLAPSED = 0.9


def about_states(phase: str, epoch: int, cosine: float | None, before: float | None) -> str | None:
    """Return a sentence if the model has collapsed since the validation before.

    ``cosine`` and ``before`` are the root mean square cosines between the states now and then.
    """
    if epoch == 0 or cosine is None or cosine <= COLLAPSED or (before is not None and before > COLLAPSED):
        return None
    return (
        f"the model has collapsed in epoch {epoch} of phase {phase}: the states of all users lie nearly on one line (root mean "
        f"square cosine {cosine:.4f}), so users get nearly the same items; if the next epochs do not change this, begin a new "
        f"run with more {phase}.warmup_steps or another {phase}.lr."
    )


def about_baselines(phase: str, rows: Sequence[Row], history: str) -> str | None:
    """Return a sentence if the best model of ``phase`` is below a baseline on the test rows of the table ``rows``.

    ``history`` is the treatment of the history that early stopping watches.
    """
    tested = [row for row in rows if row["split"] == "test" and row["history"] == history]
    model = max((row[WATCHED] for row in tested if row["phase"] == phase), default=None)
    above = {row["phase"]: row[WATCHED] for row in tested if row["phase"] in BASELINES}
    above = {name: value for name, value in above.items() if model is not None and value > model}
    if model is None or not above:
        return None
    floors = " and ".join(f"{name} ({value:.4f})" for name, value in above.items())
    return (
        f"the best model of phase {phase} has {WATCHED} {model:.4f} on the test rows, history {history}. This is below the "
        f"simple baseline {floors}: train longer (spt.epochs), or try other settings."
    )


def about_results(rows: Sequence[Row], history: str) -> list[str]:
    """Return the sentences about the table ``rows`` of a whole run; ``history`` is as in :func:`about_baselines`."""
    texts = [about_baselines(phase, rows, history) for phase in PHASES]
    for phase in PHASES:
        validated = [row for row in rows if (row["phase"], row["split"]) == (phase, "valid")]
        if validated:
            texts.append(about_states(phase, validated[-1]["epoch"], validated[-1].get(COSINE_RMS), None))
    return [text for text in texts if text]


def about_start(phase: str, best_epoch: int, best: float) -> str | None:
    """Return a sentence if the training of ``phase`` has not improved the model that it started from."""
    if best_epoch > 0 or best < 0:
        return None
    source = "phase spt" if needs_start(phase) else "the earlier run"
    return (
        f"phase {phase} has not improved {WATCHED} on the validation rows ({best:.4f}), so the best model is still that of "
        f"{source}, and their test results are equal."
    )
