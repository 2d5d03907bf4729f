"""Rows of a training step of each phase, with Adam, against the official way."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from lares_fast import LARESConfig, reference
from lares_fast.data import InteractionLog
from lares_fast.gpu_bench.candidates import OURS, Candidates, Result, near
from lares_fast.gpu_bench.machine import Machine
from lares_fast.gpu_bench.model_rows import encode_flops
from lares_fast.gpu_bench.official_step import MODES, Inputs, OfficialStep, inputs_of, loss_and_gradients
from lares_fast.gpu_bench.our_step import Case, OurStep, log_of
from lares_fast.train import RPT, SPT, RPTConfig, SPTConfig
from lares_fast.train.phases import Phase

SPT_CASE = Case("spt", 1024, (5, 5, 5))
RPT_CASE = Case("rpt", 400, (3, 8, 5, 4))
# Bounds of the loss and of every gradient, relative to the largest number of each.
_BOUNDS = {False: 1e-3, True: 1e-1}


def training_step(machine: Machine, case: Case, *, bf16: bool, compiled: bool = False) -> Result:
    """Time forward, backward and optimizer. The loss and the gradients of each candidate are checked without dropout.

    The batch of the official way is ready on the device. With ``compiled`` it is compiled in every mode, which takes minutes.
    lares_fast makes the steps of the trainer, with a batch that is ready, and with the work of the CPU that prepares it.
    """
    case = replace(case, B=machine.batch(case.B))
    log = log_of(machine)
    config, published = (LARESConfig(n_items=log.n_items, **case.model(dropout=dropout)) for dropout in (False, True))
    settings = case.settings(log.n_items, dropout=False), case.settings(log.n_items, dropout=True)
    # The frozen model has other weights, because equal models would leave only rounding errors of the KL term.
    torch.manual_seed(0)
    exact, frozen = (reference.LARES(config) for _ in range(2))
    weights = copy.deepcopy(exact.state_dict()), copy.deepcopy(frozen.state_dict())
    phase = _phase(case, exact, frozen, log)
    prepared = phase.batch(*case.choice(phase))
    fixed, drawn = ([inputs_of(prepared, exact, machine.device, fixed=each)] for each in (True, False))
    phase = _phase(case, exact.double().to(machine.device), frozen.double().to(machine.device), log)
    truth = loss_and_gradients(exact, phase.train()(prepared.to(machine.device)))
    del exact, frozen, phase
    row = Candidates(machine)

    def rival(name: str, *, mode: str = "", rounded: bool = False, dead_work: bool = False) -> None:
        how: dict[str, Any] = {"mode": mode, "bf16": rounded, "dead_work": dead_work}
        checked, timed = (
            OfficialStep(machine, *each, weights, inputs, **how)
            for each, inputs in (((config, settings[0]), fixed), ((published, settings[1]), drawn))
        )
        row.add(name, timed, near(truth, _BOUNDS[rounded]), checked.gradients)

    rival("official way", dead_work=True)
    if compiled:
        for mode in () if machine.rehearse else MODES:
            rival(f"official way, compiled ({mode})" + (", bf16" if bf16 else ""), mode=mode, rounded=bf16)
    else:
        rival("official way, without dead work")
        if bf16:
            rival("official way, autocast bf16", rounded=True)
    check, notices = near(truth, _BOUNDS[bf16]), list[str]()
    for name, prepare in ((f"{OURS}, batch ready", False), (f"{OURS}, with its batch", True)):
        checked, timed = (OurStep(machine, case, weights, dropout=p, bf16=bf16, prepare=prepare) for p in (False, True))
        row.add(name, timed, check, checked.gradients)
        notices += checked.notices
    if notices:
        row.left_out[f"{OURS}, CUDA graphs"] = notices[0]
    return row.result(step_work(config, fixed, bf16=bf16), rows=case.B)


def _phase(case: Case, model: reference.LARES, start: reference.LARES, log: InteractionLog) -> Phase:
    """Return the phase of ``case`` without dropout."""
    rows, settings = case.split(log).train, case.settings(log.n_items, dropout=False)
    if isinstance(settings, RPTConfig):
        return RPT(model, start, log, rows, settings)
    assert isinstance(settings, SPTConfig)
    return SPT(model, log, rows, settings)


def step_work(config: LARESConfig, batches: Sequence[Inputs], *, bf16: bool) -> dict[str, float]:
    """Return the mean of the least work of steps on ``batches``. Adam reads four numbers of each parameter and writes three."""
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in reference.LARES(config).parameters())
    flops = sum(_flops(config, inputs) for inputs in batches) / len(batches)
    return {"bf16" if bf16 else "fp32": flops, "bytes": 28 * parameters}


def _flops(config: LARESConfig, inputs: Inputs) -> int:
    """Return the operations of a step that keeps no scores. A backward counts as two forwards.

    Scores are then computed again, so log p with gradients costs five products with the item table.
    """
    own, scoring = int(inputs.sequences[1].sum()), 2 * len(inputs.target) * config.n_items * config.hidden_size
    if inputs.partners is not None:
        tokens = (own, own, int(inputs.partners[1].sum()))
        depths = [config.n_pre_layers + T * config.n_core_layers for T in inputs.depths]
        layers = [encode_flops(config, P, n) for P, n in zip(tokens, depths, strict=True)]
        return 3 * sum(layers) + 5 * scoring
    # The frozen model has no dropout, so its pre-block runs once. It has no backward.
    steps, core = sum(inputs.depths), encode_flops(config, own, config.n_core_layers)
    pre = encode_flops(config, own, config.n_pre_layers)
    return 3 * (len(inputs.depths) * pre + steps * core) + pre + steps * core + 6 * steps * scoring
