"""The random keys of a run: one for each purpose, and each a function of a seed.

A key and an address give the same random numbers in every process, so a checkpoint needs no state of a generator.
"""

from __future__ import annotations

from lares_fast._random import Key, fold, root_key

# These numbers are part of every result: another number gives other random numbers.
_INITIAL_WEIGHTS, _SPT, _RPT, _FILTER, _EVALUATION, _RESTARTED = range(6)
_PHASES = {"spt": _SPT, "rpt": _RPT}
_ORDER, _STEP = range(2)


def initial_weights_seed(run: Key) -> int:
    """Return the seed for torch under which a new model is initialised; ``run`` is the root key of the run's seed."""
    return fold(run, _INITIAL_WEIGHTS)[0]


def phase_key(run: Key, phase: str, restarts: int) -> Key:
    """Return the key of ``phase`` in a run that has started from another run's model ``restarts`` times."""
    if phase == "spt" and restarts:
        # A model that is trained further must not get the orders and masks of its first epochs again: it has learned them.
        return fold(run, _RESTARTED, restarts)
    return fold(run, _PHASES[phase])


def epoch_key(phase: Key, epoch: int) -> Key:
    """Return the key of an epoch, counted from 0, under the key of its phase."""
    return fold(phase, epoch)


def order_key(epoch: Key) -> Key:
    """Return the key for the order of the training rows in an epoch, under the key of the epoch."""
    return fold(epoch, _ORDER)


def step_key(epoch: Key, step: int) -> Key:
    """Return the key of a step, counted from 0, under the key of its epoch."""
    return fold(epoch, _STEP, step)


def filter_key(run: Key, number: int) -> Key:
    """Return the key for the initial states of pass ``number`` of the row filter of phase ``rpt``."""
    return fold(run, _FILTER, number)


def evaluation_key(noise_seed: int) -> Key:
    """Return the key for the initial states in every validation and test, under ``evaluation.noise_seed``."""
    return fold(root_key(noise_seed), _EVALUATION)
