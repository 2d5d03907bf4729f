"""Call the ops with random arguments, valid and not valid, and compare the outcome with the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded

from tests.reliability.counts import Counts
from tests.reliability.fuzzing import model_examples, outcomes
from tests.reliability.fuzzing.children import count
from tests.reliability.fuzzing.op_examples import DAMAGED, OPS, calls
from tests.reliability.fuzzing.values import Example

# The number of examples of each kind in the long form.
LONG = {
    "topk": 50_000,
    "target_rank": 40_000,
    "softmax": 40_000,
    "attention": 20_000,
    "embedding": 20_000,
    "initial_state": 20_000,
    "recurrence": 6_000,
    "pack": 9_000,
    "CatalogIndex": 5_000,
    "model": 6_000,
    "recommender": 8_000,
    "batches": 4_000,
    "configuration": 10_000,
}
# The examples of one child process. Hypothesis remembers all examples of a run, so a run must end at some time.
BATCH = 5000
# The examples of each kind in the quick form.
QUICK = 50


def examples(what: str, seed: int, number: int, watch: Callable[[Any], None]) -> None:
    """Call ``watch`` with at least ``number`` random examples of ``what``. Equal arguments give equal examples."""

    @seeded(seed)
    @settings(
        max_examples=-(-number // (DAMAGED + 1)),
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(calls({**OPS, **model_examples.MODELS}[what]))
    def each(found: list[Example]) -> None:
        for example in found:
            watch(example)

    each()


fault = outcomes.fault


def measure(counts: Counts) -> None:
    """Count the examples of every op."""
    count(counts, __name__, LONG, BATCH, [(what, QUICK) for what in LONG])
