"""The part ``numerics``: very large, very small and non-finite numbers in every op, on every backend that a CPU can run."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from lares_fast.verify.tolerance import judge
from tests.reliability import numerics_softmax
from tests.reliability.counts import ROOT, Counts
from tests.support.recurrence_case import Case
from tests.support.special_numbers import CHECKS

# (text, whether a finite number is wrong)
Fault = tuple[str, bool]
UPSTREAMS = 8


def measure(counts: Counts) -> None:
    """Count the calls whose result is not the documented one. A finite number outside of the tolerance is counted as lost."""
    torch.set_num_threads(1)
    sizes = {True: (105, 3, 2, 7, 0), False: (7000, 2000, 300, 1400, 40)}[counts.quick]
    softmax, gates, specials, interpreted, interpreted_specials = sizes
    for backend in ("native", "reference"):
        _count(counts, f"cross entropy, {backend}", _softmax(backend, softmax), softmax)
    _count_gates(counts, gates)
    for name, (_, backends) in CHECKS.items():
        for backend in backends:
            if backend != "triton":
                planted = 3000 if name == "recurrence" and backend == "native" and not counts.quick else specials
                _count(counts, f"special numbers, {name}", _special(name, backend, planted), planted)
    # Triton reads once whether it interprets, so its cases have a process of their own.
    _interpreted(counts, interpreted, interpreted_specials)


def triton_rows(softmax: int, specials: int) -> Iterator[tuple[str, int, list[Fault]]]:
    """Yield (row of the table, tries, faults) of the interpreted Triton kernels."""
    for first in range(0, softmax, 50):
        faults = [fault for found in _softmax("triton", min(50, softmax - first), first) for fault in found]
        yield "cross entropy, triton interpreted", min(50, softmax - first), faults
    for name, (_, backends) in CHECKS.items():
        if specials and "triton" in backends:
            faults = [fault for found in _special(name, "triton", specials) for fault in found]
            yield f"special numbers, {name}", specials, faults


def _count(counts: Counts, what: str, results: Iterable[list[Fault]], goal: int) -> None:
    for faults in results:
        counts.tried(what, goal=goal)
        for text, wrong in faults[:1]:
            counts.failed(what, text, lost=any(lost for _, lost in faults) or wrong)


def _softmax(backend: str, number: int, first: int = 0) -> Iterator[list[Fault]]:
    return (numerics_softmax.check(seed, backend) for seed in range(first, first + number))


def _special(name: str, backend: str, number: int) -> Iterator[list[Fault]]:
    for seed in range(number):
        try:
            CHECKS[name][0](seed, backend)
        except AssertionError as error:
            yield [(f"{backend}, seed {seed}: {str(error).strip()[:300]}", True)]
        else:
            yield []


def _count_gates(counts: Counts, number: int) -> None:
    what, errors = "gate of the linear adapter, native", torch.zeros(2)
    for seed in range(number):
        found = gate_gradients(seed)
        _count(counts, what, [gate_faults(*found)], number)
        ours, twin, truth = (x["adapter.gate"].double() for x in found)
        errors += torch.stack([(x - truth).square().mean() / truth.square().mean() for x in (ours, twin)]).float()
    ours, twin = (errors / number).sqrt().tolist()
    counts.note(what, f"root of the mean squared error: {ours:.1e} of the gradient's, and {twin:.1e} for the reference in fp32")


def gate_gradients(seed: int) -> list[dict[str, Tensor]]:
    """Return the gate's gradients of one random call for several upstream gradients: native, reference in fp32 and in fp64.

    A single number is a poor measure, because the error of the reference in it may be 0 by chance. So several are compared.
    """
    draw = random.Random(seed)
    lengths = [draw.randint(1, 16) for _ in range(draw.randint(1, 4))]
    width = draw.choice((16, 32, 48, 64))
    options = {"depth": draw.randint(1, 3), "output": draw.choice(("last", "steps", "tokens")), "p": draw.choice((0, 0.1, 0.5))}
    sizes = {"D": width, "H": draw.choice([h for h in (1, 2, 4) if width % h == 0]), "inner": 16 * draw.randint(1, 8)}
    case = Case(lengths=lengths, adapter="linear", layers=draw.randint(1, 2), std=draw.choice((0.02, 0.15)), **sizes, **options)
    torch.manual_seed(seed)
    case.tensors = {name: x + 0.1 * torch.randn_like(x) for name, x in case.tensors.items()}
    case.upstreams = UPSTREAMS
    runs = (("native", torch.float32), ("reference", torch.float32), ("reference", torch.float64))
    return [case.run(backend, dtype)[1] for backend, dtype in runs]


def gate_faults(found: dict[str, Tensor], twin: dict[str, Tensor], truth: dict[str, Tensor]) -> list[Fault]:
    """Return the verdict of the tolerances on the gate's gradients."""
    gate = {name: x for name, x in found.items() if name.endswith("gate")}
    return [(verdict.fault, True) for verdict in judge("gradient", gate, twin, truth) if verdict.fault]


def _interpreted(counts: Counts, softmax: int, specials: int) -> None:
    command = [sys.executable, "-m", "tests.reliability.numerics_triton", str(softmax), str(specials)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            what, number, faults = json.loads(line)
            counts.tried(what, number)
            for text, lost in faults:
                counts.failed(what, text, lost=lost)
    if process.returncode:
        counts.failed("cross entropy, triton interpreted", f"the process ended with {process.returncode}")
