"""Rows of whole runs of the trainer: rows a second in phase 1, a small run of both phases, and a run on the user's log."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from lares_fast import LARESConfig, reference
from lares_fast._random import root_key
from lares_fast.data import InteractionLog, Rows, Split, epoch_order, leave_one_out, read_log, synthetic_log
from lares_fast.data.batch import Inputs
from lares_fast.gpu_bench.candidates import OURS, Candidates, Result, finished, near
from lares_fast.gpu_bench.machine import TURNS, Machine
from lares_fast.gpu_bench.official_step import OfficialStep, inputs_of
from lares_fast.gpu_bench.our_step import log_of, run_config
from lares_fast.gpu_bench.step_rows import step_work
from lares_fast.train import SPT, EvalConfig, Interrupted, RPTConfig, RunConfig, SPTConfig, Trainer
from lares_fast.train.config import PHASES
from lares_fast.train.keys import epoch_key, initial_weights_seed, order_key, phase_key, step_key
from lares_fast.train.spt import SPTBatch

Event = dict[str, Any]
Listener = Callable[[Event], None]

# Steps of a turn of the official way, and first steps whose losses are checked.
_STEPS, _CHECKED = 32, 3
# Validation rows of a run in which only training is timed.
_FEW = 256
# A run on the user's log is stopped after this time.
CUT_SECONDS = 240.0
# The setting that early stopping watches.
_WATCHED = "ndcg@10"


def rows_per_second(machine: Machine) -> Result:
    """Time epochs of phase 1 by the trainer, and steps of the official way between them, on a log with the size of Instruments.

    Depths are drawn as in training. The batches of the official way are ready on the device. The losses of the first steps
    of each candidate are checked without dropout.
    """
    log, B = log_of(machine), machine.batch(1024)
    whole = leave_one_out(log)
    train = _first(whole.train, 5 * B) if machine.rehearse else whole.train
    split = replace(whole, train=train, valid=_first(whole.valid, _FEW), test=_first(whole.test, _FEW))
    settings, config = SPTConfig(batch_size=B), LARESConfig(n_items=log.n_items, dropout=0.0)
    exact = _initial_model(config)
    weights = {name: value.clone() for name, value in exact.state_dict().items()}
    batches = _first_batches(SPT(exact, log, split.train, settings), _CHECKED if machine.rehearse else _STEPS)
    fixed, drawn = ([inputs_of(batch, exact, machine.device, fixed=each) for batch in batches] for each in (True, False))
    truth = _mean_loss_in_fp64(machine, SPT(exact.double().to(machine.device).train(), log, split.train, settings), batches)
    row, published = Candidates(machine), config.replace(dropout=LARESConfig.preview().dropout)
    for name, dead_work, bf16 in (("official way", True, False), ("official way, autocast bf16", False, True)):
        checked, timed = (
            OfficialStep(machine, how, settings, (weights, weights), inputs, bf16=bf16, dead_work=dead_work)
            for how, inputs in ((config, fixed[:_CHECKED]), (published, drawn))
        )
        row.add(name, timed, near([truth], 2e-2 if bf16 else 1e-3), partial(_mean_loss_of_steps, checked))
    first = run_config(machine, model={"dropout": 0.0}, spt=replace(settings, epochs=1, max_steps=_CHECKED))
    bound = 1e-3 if machine.rehearse else 2e-2
    row.add(OURS, lambda: None, near([truth], bound), lambda: torch.tensor(_mean_loss_of_a_run(first, log, split)))
    turns: dict[str, list[float]] = {name: [] for name in row.calls}
    if OURS in turns:
        machine.stage(f"{OURS}, epochs")

        def listen(event: Event) -> None:
            if event["event"] == "notice":
                row.left_out[f"{OURS}, CUDA graphs"] = event["text"]
            # The first epoch compiles and captures, so it is not counted.
            if event["event"] == "valid" and event["epoch"] > 1:
                for name, call in row.calls.items():
                    seconds = event["means"]["seconds"]
                    ours = 1e3 * seconds * B / len(split.train)
                    turns[name].append(ours if name == OURS else machine.once(call, len(batches)))

        epochs = 1 + (1 if machine.rehearse else TURNS)
        spt = replace(settings, epochs=epochs, patience=epochs)
        _run(run_config(machine, spt=spt, evaluation=EvalConfig(test=False)), log, split, ("spt",), listen)
    work = step_work(config, drawn, bf16=not machine.rehearse)
    return finished(row.faults, turns_ms=turns, work=work, left_out=row.left_out, rows=B)


def synthetic_run(machine: Machine) -> Result:
    """Run both phases on a synthetic log, and report the wall time. The model must be better than a ranking by popularity."""
    if machine.rehearse:
        log: InteractionLog = synthetic_log(n_users=60, n_items=40, n_brands=4)
        epochs, filter_top = (1, 1), 40
    else:
        log, epochs, filter_top = synthetic_log(), (10, 2), 100
    spt = SPTConfig(batch_size=256, lr=2e-3, epochs=epochs[0], alpha=0.02, gamma=0.1)
    rpt = RPTConfig(batch_size=256, lr=3e-4, epochs=epochs[1], filter_top=filter_top, filter_passes=1)
    evaluation = EvalConfig(ks=(5, 10, 20), depth_ratios=(1.0,))
    config = run_config(machine, model={"dropout": 0.1}, spt=spt, rpt=rpt, evaluation=evaluation)
    facts, history = _timed_run(config, log, None)
    popularity = next(each[_WATCHED] for each in history if each["phase"] == "popularity" and each["split"] == "test")
    facts["NDCG@10 of popularity"] = popularity
    worse = not machine.rehearse and not facts.get("NDCG@10", 0.0) > popularity
    return finished(["the model ranks no better than popularity"] if worse else [], facts=facts)


def log_run(machine: Machine, path: Path) -> Result:
    """Run both phases with the published settings on the user's log, and stop after a time limit."""
    facts, _ = _timed_run(run_config(machine), read_log(path), 5.0 if machine.rehearse else CUT_SECONDS)
    return finished([], facts={"log": path.name, **facts})


def _timed_run(config: RunConfig, log: InteractionLog, limit: float | None) -> tuple[dict[str, Any], list[Event]]:
    """Run both phases. Return what was measured, and the rows of metrics.csv, which are empty if the run was cut."""
    began, seconds = time.monotonic(), {phase: list[float]() for phase in PHASES}

    def listen(event: Event) -> bool:
        if event["event"] == "valid" and event["means"]:
            seconds[event["phase"]].append(event["means"]["seconds"])
        return limit is not None and time.monotonic() - began > limit

    history = _run(config, log, leave_one_out(log), PHASES, listen)
    facts: dict[str, Any] = {"wall s": round(time.monotonic() - began, 1)}
    for phase, each in seconds.items():
        facts[f"{phase.upper()} epochs"] = len(each)
        if each:
            facts[f"s of training in an {phase.upper()} epoch"] = statistics.median(each)
    tested = [row for row in history if (row["phase"], row["split"], row["history"]) == ("rpt", "test", "not masked")]
    depth = LARESConfig.preview(**config.model).steps
    for row in tested:
        if row["test_T"] == depth:
            facts["NDCG@10"] = row[_WATCHED]
    return facts if history else {**facts, "cut after s": limit}, history


def _run(
    config: RunConfig, log: InteractionLog, split: Split, phases: Sequence[str], listen: Callable[[Event], Any]
) -> list[dict[str, Any]]:
    """Run ``phases`` in a temporary folder and return the rows of metrics.csv. A true answer of ``listen`` stops the run."""
    with TemporaryDirectory() as folder:

        def emit(event: Event) -> None:
            if listen(event):
                trainer.request_stop()

        trainer = Trainer(config, log, split, Path(folder) / "run", emit)
        try:
            return trainer.run(phases)
        except Interrupted:
            return []


def _mean_loss_of_steps(step: OfficialStep) -> Tensor:
    return _mean([step() for _ in range(_CHECKED)])


def _mean_loss_of_a_run(config: RunConfig, log: InteractionLog, split: Split) -> float:
    """Return the mean loss of the first epoch of a run of phase 1."""
    losses: list[float] = []

    def listen(event: Event) -> None:
        if event["event"] == "valid":
            losses.append(event["means"]["loss"])

    _run(config, log, split, ("spt",), listen)
    return losses[0]


def _initial_model(config: LARESConfig) -> reference.LARES:
    """Return the model that a run with the default seed begins with."""
    with torch.random.fork_rng():
        torch.manual_seed(initial_weights_seed(root_key(RunConfig().seed)))
        return reference.LARES(config)


def _first_batches(phase: SPT, count: int) -> list[SPTBatch[Inputs]]:
    """Return the first batches of a run with the default seed, on the CPU."""
    key = epoch_key(phase_key(root_key(RunConfig().seed), phase.name, 0), 0)
    order = epoch_order(len(phase.rows), order_key(key)).split(phase.settings.batch_size)
    return [phase.batch(index, step_key(key, step)) for step, index in enumerate(order[:count])]


def _mean_loss_in_fp64(machine: Machine, phase: SPT, batches: Sequence[SPTBatch[Inputs]]) -> Tensor:
    """Return the mean loss of the first steps of ``phase``."""
    optimizer, losses = torch.optim.Adam(phase.model.parameters(), lr=phase.settings.lr), []
    for batch in batches[:_CHECKED]:
        loss = phase(batch.to(machine.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return _mean(losses)


def _mean(losses: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(losses)).double().mean().cpu()


def _first(rows: Rows, count: int) -> Rows:
    return Rows(rows.users[:count], rows.ends[:count])
