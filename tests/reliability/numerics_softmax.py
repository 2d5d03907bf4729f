"""Calls of the softmax over a catalog with scores of every size, their exact results, and a verdict on what a backend returns.

Rows and items are small whole numbers times powers of two, so every product is exact in fp32. The truth starts from these
products, is computed in fp64, and subtracts products before it scales them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lares_fast import ops, reference
from lares_fast.verify.tolerance import judge

KINDS = ("random", "one dominates", "ties", "all equal", "target far below", "offset", "overflow")
LARGEST = torch.finfo(torch.float32).max
# Factors below these numbers may count as 0, and fp32 has no number between 0 and the last one.
PROBABILITY, NORMAL, SMALLEST = 2.0**-125, 2.0**-126, 2.0**-149


@dataclass
class Truth:
    """The exact results of a call by name, in fp64.

    ``terms`` holds the sums of the absolute terms, and ``least`` the errors that come from numbers too small for fp32. A result
    need not be finite where ``free`` is true: there a product, a gradient or a log-probability is near the end of fp32. It is
    not compared where ``unknown`` is true: there a sum of several products leaves fp32 on the way, and what it becomes depends
    on the order of its terms.
    """

    values: dict[str, Tensor]
    terms: dict[str, Tensor]
    least: dict[str, Tensor]
    free: dict[str, Tensor]
    unknown: dict[str, Tensor]


class Case:
    """A call of ``target_logprob`` that ``seed`` determines, with an upstream gradient ``grad``."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        self.kind = KINDS[seed % len(KINDS)]
        sizes = (1, 2, 3, 6), (1, 2, 3, 7, 20, 49, 97, 1100 if seed % 5 == 0 else 30), (1, 2, 5)
        M, N, D = map(draw.choice, sizes)
        D = max(2, D) if self.kind == "offset" else D
        self.skip_pad = N > 1 and draw.random() < 0.3
        generator = torch.Generator().manual_seed(seed)

        def whole(*shape: int) -> Tensor:
            return torch.randint(-7, 8, shape, generator=generator).double()

        hidden, items = whole(M, D), whole(N, D)
        target = torch.randint(int(self.skip_pad), N, (M,), generator=generator)
        if self.kind == "offset":
            # Large scores with small differences.
            hidden[:, 0], items[:, 0] = 1, 2.0 ** draw.randint(4, 17)
        if self.kind == "all equal":
            items = items[:1].repeat(N, 1)
        if self.kind == "ties":
            items = items[torch.randint(0, min(N, 3), (N,), generator=generator)]
        products = (hidden @ items.T)[:, int(self.skip_pad) :]
        if self.kind == "target far below":
            target = products.argmin(1) + int(self.skip_pad)
        elif self.kind == "one dominates" or (self.kind == "ties" and draw.random() < 0.5):
            target = products.argmax(1) + int(self.skip_pad)
        if self.kind == "one dominates":
            items[target[0]] = hidden[0].sign() * 30
        # The exponents of both factors, and of their product.
        both = draw.randint(122, 130) if self.kind == "overflow" else draw.randint(-136, 100)
        self.exponents = (one := draw.randint(max(-136, both - 100), min(100, both + 136)), both - one)
        self.scale = draw.choice((1.0, 1 / 0.07, 2.0 ** draw.randint(-100, 100), 2.0**-both * draw.choice((0.01, 0.3, 1, 3))))
        self.scale = min(max(self.scale, 2.0**-100), 2.0**100)
        self.hidden, self.items = (
            x.ldexp(torch.tensor(e)).float() for x, e in zip((hidden, items), self.exponents, strict=True)
        )
        self.target = target
        self.grad = torch.randn(M, generator=generator) * 10 ** draw.choice((0, 0, draw.uniform(-30, 30)))
        self.products = self.hidden.double() @ self.items.double().T

    def __str__(self) -> str:
        M, N, D = len(self.hidden), *self.items.shape
        one, other = self.exponents
        return f"{self.kind}, M={M}, N={N}, D={D}, 2^{one} * 2^{other}, scale {self.scale:.3g}{', without PAD' * self.skip_pad}"

    def run(self, backend: str) -> dict[str, Tensor]:
        """Return the log-probability and the gradients that ``backend`` computes."""
        return self._differentiated(partial(ops.target_logprob, backend=backend), self.grad)

    def twins(self) -> list[dict[str, Tensor]]:
        """Return what the reference computes in fp32, with three upstream gradients, and divided by their factors again.

        In a few numbers the error of one run may be small by chance.
        """
        runs = []
        for factor in (1.0, 0.7, 1.3):
            values = self._differentiated(reference.target_logprob, self.grad * factor)
            runs.append({name: x.double() if name == "logprob" else x.double() / factor for name, x in values.items()})
        return runs

    def _differentiated(self, function: Callable[..., Tensor], grad: Tensor) -> dict[str, Tensor]:
        hidden, items = self.hidden.clone().requires_grad_(), self.items.clone().requires_grad_()
        value = function(hidden, items, self.target, scale=self.scale, skip_pad=self.skip_pad)
        value.backward(grad)
        return {"logprob": value.detach(), "hidden": hidden.grad, "items": items.grad}

    def truth(self) -> Truth:
        """Return the exact results."""
        first = int(self.skip_pad)
        own = torch.arange(first, len(self.items)) == self.target[:, None]
        products = self.products[:, first:]
        x = (products - products.amax(-1, keepdim=True)) * self.scale
        mine, others = x[own], x.masked_fill(own, -torch.inf).logsumexp(-1)
        log_sum = torch.logaddexp(mine, others)
        logprob = -torch.logaddexp(others - mine, torch.zeros_like(mine))
        upstream = (self.grad.double() * self.scale)[:, None]
        slopes = torch.zeros_like(self.products)
        slopes[:, first:] = -upstream * torch.where(own, logprob[:, None].expm1(), (x - log_sum[:, None]).exp())
        hidden, items = self.hidden.double(), self.items.double()
        values = {"logprob": logprob, "hidden": slopes @ items, "items": slopes.T @ hidden}
        terms = {"logprob": logprob.abs(), "hidden": slopes.abs() @ items.abs(), "items": slopes.abs().T @ hidden.abs()}
        # The errors of a probability and of a gradient of a product that may count as 0, and of the smallest numbers. The
        # gradient of a row is multiplied by its upstream gradient after it is summed.
        small = PROBABILITY * upstream.abs().expand_as(slopes) + NORMAL
        least = {
            "logprob": torch.tensor(PROBABILITY * len(items) + SMALLEST),
            "hidden": small @ items.abs() + SMALLEST * len(items) * (2 + upstream.abs()),
            "items": small.T @ hidden.abs() + SMALLEST * (2 + upstream.abs()).sum(),
        }
        # The rows with a product, or a sum on the way to it, that leaves fp32.
        leaves = ((hidden.abs() @ items.abs().T) > LARGEST).any(-1)
        large = upstream.abs() > LARGEST / 64
        near = (
            (large | (terms["hidden"] > LARGEST / 64)).any(-1),
            (large | (upstream.abs() * hidden.abs() > LARGEST / 64)).any(),
        )
        free = {
            "logprob": leaves | (logprob < -LARGEST),
            "hidden": (leaves | near[0])[:, None],
            "items": leaves.any() | near[1],
        }
        lost = leaves & (hidden.shape[1] > 1)
        return Truth(values, terms, least, free, {"logprob": lost, "hidden": lost[:, None], "items": lost.any()})


def faults(case: Case, found: dict[str, Tensor], twins: list[dict[str, Tensor]], truth: Truth) -> list[tuple[str, bool]]:
    """Return each fault of ``found`` as (text, whether a finite number is wrong)."""
    result = []
    for name, wanted in truth.values.items():
        value, kind = found[name], "forward" if name == "logprob" else "gradient"
        finite = value.isfinite()
        if bool((~finite & ~truth.free[name]).any()):
            result.append((f"{case}: {name} is not finite, and should be", False))
        compared = finite & ~truth.unknown[name]
        ours, exact, *theirs = (torch.where(compared, x.double(), 0.0) for x in (value, wanted, *(run[name] for run in twins)))
        # A run that leaves fp32 does not count. If all do, only the ceiling of the tolerance holds.
        finite_runs = [x for x in theirs if x.isfinite().all()] or theirs[:1]
        twin = max(finite_runs, key=lambda x: (x - exact).abs().max().item())
        # A sum that cancels has errors of the size of its terms. So the terms count like the truth.
        floor = 10 * torch.where(compared, truth.terms[name], 0.0)
        verdict = judge(kind, {name: ours.float()}, {name: twin}, {name: exact, "terms": floor})[0]
        if verdict.fault and bool(((ours - exact).abs() > truth.least[name]).any()):
            result.append((f"{case}: {verdict.fault}", True))
    return result


def check(seed: int, backend: str) -> list[tuple[str, bool]]:
    """Return the faults of ``backend`` for the case of ``seed``."""
    case = Case(seed)
    return faults(case, case.run(backend), case.twins(), case.truth())
