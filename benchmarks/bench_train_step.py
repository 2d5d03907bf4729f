"""Time one training step of each phase, with its optimizer: lares_fast.LARES against the official way and packed PyTorch.

Every candidate runs in its own process, because the settings of the allocator and the peak memory belong to a process. The two
candidates of a comparison take turns.
"""

from dataclasses import replace
from statistics import median

import pytest

from benchmarks import harness
from benchmarks.train_step import CANDIDATES, CASES, OURS, Step, Worker

WARM_UP = 3
CHECK = "without dropout: loss 1e-5, every gradient 1e-3, rewards equal"


def check(name, rival):
    """Check that both candidates agree on 32 rows, with the same h0 and without dropout."""
    case = replace(CASES[name], B=32, dropout=0.0)
    steps = {}
    for candidate in (rival, OURS):
        step = Step(case, candidate, fixed=True)
        loss, rewards = step.loss()
        loss.backward()
        steps[candidate] = loss, rewards, {name: p.grad for name, p in step.model.named_parameters()}
    (loss, rewards, gradients), (our_loss, our_rewards, our_gradients) = steps.values()
    assert abs(loss - our_loss) <= 1e-5 * max(1, abs(loss))
    assert rewards is None or (rewards == our_rewards).all()
    total = sum(g.norm() ** 2 for g in gradients.values()) ** 0.5
    for name, gradient in gradients.items():
        assert (gradient - our_gradients[name]).norm() <= 1e-3 * gradient.norm() + 1e-6 * total, name


@pytest.mark.large
@pytest.mark.parametrize("rival", [name for name in CANDIDATES if name != OURS])
@pytest.mark.parametrize("case", CASES)
def test_step(record, case, rival, rounds=3):
    check(case, rival)
    workers = {name: Worker(case, name) for name in (rival, OURS)}
    times = {name: [] for name in workers}
    for turn in range(WARM_UP + rounds):
        for name, worker in workers.items():
            seconds = worker.step()
            if turn >= WARM_UP:
                times[name].append(seconds)
    group, shape = f"{CASES[case].phase} step", CASES[case].shape
    facts = []
    for name, worker in workers.items():
        values = {"user s": median(user for user, _ in times[name]), "system s": median(system for _, system in times[name])}
        values["peak MiB over the idle process"] = worker.close()
        facts += [harness.Fact(group, f"{name}, {shape}", what, value) for what, value in values.items()]
    record(harness.rows(group, shape, {name: [sum(t) for t in ts] for name, ts in times.items()}, CHECK), facts)
