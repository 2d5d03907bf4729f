"""A call of ``ops.recurrence`` with random weights, which the tests of its backends share."""

from dataclasses import replace

import torch

from lares_fast import ops, reference
from lares_fast._random import Draw
from lares_fast.config import LARESConfig
from lares_fast.ops.recurrence import build_call
from lares_fast.reference.backbone import build_block
from tests.support import oracle

LENGTHS = [1, 2, 20, 49, 50, 63, 64, 65, 128]
RAGGED = [(5 * b) % 8 + 1 for b in range(len(LENGTHS))]


class Case:
    """A call with random weights. Its gradients are the gradients of a random linear function of the output."""

    def __init__(self, lengths=LENGTHS, D=64, H=2, inner=128, layers=2, adapter="add", depth=3, output="last", p=0.5, std=0.15):
        torch.manual_seed(0)
        config = LARESConfig(
            n_items=2, hidden_size=D, n_heads=H, inner_size=inner, n_core_layers=layers, adapter=adapter or "add"
        )
        module = reference.Recurrence(config) if adapter else build_block(config, layers)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=std)
        tokens = sum(lengths)
        self.tensors = {"h": 2 * torch.randn(tokens, D)}
        if adapter:
            self.tensors["pre"] = torch.randn(tokens, D)
        self.tensors |= {name: x.detach().clone() for name, x in module.named_parameters()}
        # The reference's error in a single number, a gate, can be 0 by chance. So there are several upstream gradients.
        self.upstreams = 4 if any(x.numel() == 1 for x in self.tensors.values()) else 1
        self.offsets = torch.tensor([0, *lengths]).cumsum(0)
        draw = Draw((3, 7), torch.randperm(1000)[: len(lengths)]) if p else None
        depth = depth if isinstance(depth, int) else torch.tensor(depth, dtype=torch.int64)
        self.options = {"n_heads": H, "adapter": adapter or "add", "depth": depth, "output": output, "draw": draw, "dropout": p}

    @staticmethod
    def inputs(tensors):
        """Return (h, pre or None, weights)."""
        rest = {**tensors}
        return rest.pop("h"), rest.pop("pre", None), list(rest.values())

    def call(self, tensors, backend, **changes):
        h, pre, weights = self.inputs(tensors)
        return ops.recurrence(h, self.offsets, weights, pre=pre, backend=backend, **{**self.options, **changes})

    def operator_call(self, *, keep=True, **changes):
        """Return the call that the operator takes; ``changes`` replace options of the public function."""
        h, pre, weights = self.inputs(self.tensors)
        return replace(build_call(h, self.offsets, weights, **{"pre": pre, **self.options, **changes}), keep=keep)

    def run(self, backend, dtype=torch.float32, **changes):
        """Return (output, gradients) by name."""
        tensors = {name: x.to(dtype).requires_grad_() for name, x in self.tensors.items()}
        out = self.call(tensors, backend, **changes)
        draw = torch.Generator().manual_seed(1)
        weightings = [torch.randn(out.shape, generator=draw).to(dtype) for _ in range(self.upstreams)]
        grads = [torch.autograd.grad(out, list(tensors.values()), weights, retain_graph=True) for weights in weightings]
        return {"out": out.detach()}, dict(zip(tensors, map(torch.stack, zip(*grads, strict=True)), strict=True))

    def check(self, backend="native", dtype=torch.float32):
        """Check that ``backend`` stays within the tolerances on inputs rounded to ``dtype``; return its results."""
        self.tensors = {name: x.to(dtype).float() for name, x in self.tensors.items()}
        found, twin, truth = self.run(backend, dtype), self.run("reference", dtype), self.run("reference", torch.float64)
        oracle.check("forward", found[0], twin[0], truth[0])
        oracle.check("gradient", found[1], twin[1], truth[1])
        return found

    def check_alone(self, backend):
        """Check that sequence 4 has one result in its batch and alone."""
        whole = self.call(self.tensors, backend)
        first, last = self.offsets[4:6].tolist()
        alone = {**self.tensors, "h": self.tensors["h"][first:last], "pre": self.tensors["pre"][first:last]}
        self.offsets = torch.tensor([0, last - first])
        # PyTorch may add in another order for another number of rows.
        assert torch.allclose(self.call(alone, backend)[0], whole[4], rtol=0, atol=1e-5)
