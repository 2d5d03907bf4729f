"""Rows of a whole training step of phase 1, with Adam."""

import torch

import lares_fast
from benchmarks import baseline_official, cases
from benchmarks.gpu.measurement import BF16, Row, near
from lares_fast import LARESConfig, reference
from lares_fast.sequences import Sequences, unpad

D = 64


class TrainingStep:
    """Training steps of one candidate. Our lengths and depths are on the CPU, where the trainer keeps them."""

    def __init__(self, machine, kind, B, candidate, *, dropout=0.5, fixed=False):
        self.device, self.ours, self.depths = machine.device, candidate.startswith("ours"), (5, 5, 5)
        config = LARESConfig(n_items=cases.N, dropout=dropout)
        torch.manual_seed(0)
        weights = reference.LARES(config).state_dict()
        build = lares_fast.LARES if self.ours else baseline_official.OfficialLARES
        self.model = build(config).to(machine.device).train()
        self.model.load_state_dict(weights)
        if "compile" in candidate:
            self.model.encode = torch.compile(self.model.encode)
        self.autocast = "bf16" in candidate
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3, fused=not machine.rehearse)
        own, partners = (cases.sequences(kind, B, 20, seed) for seed in (2, 3))
        self.target = torch.randint(1, cases.N, (B,), generator=torch.Generator().manual_seed(4)).to(machine.device)
        noise = torch.Generator().manual_seed(5)
        self.states = [3 * torch.randn(B, 20, D, generator=noise) if fixed else None for _ in range(3)]
        if self.ours:
            own, partners = Sequences.from_padded(*own), Sequences.from_padded(*partners)
            of = (own, own, partners)
            self.states = [s if s is None else unpad(s, x.offsets) for s, x in zip(self.states, of, strict=True)]
        self.states = [s if s is None else s.to(machine.device) for s in self.states]
        to_device = (
            (lambda x, n: (x.to(machine.device), n))
            if self.ours
            else (lambda x, n: (x.to(machine.device), n.to(machine.device)))
        )
        self.batches = to_device(*own), to_device(*partners)
        self.draws = [cases.draw(i, B) for i in range(3)]

    def loss(self):
        own, partners = self.batches
        given, weights = (self.model, own, self.target, partners), {"alpha": 0.1, "gamma": 0.5}
        with torch.autocast(self.device.type, BF16, enabled=self.autocast):
            if not self.ours:
                with self.device:
                    return baseline_official.spt_loss(*given, self.depths, 2, **weights, dead_work=False, states=self.states)
            passes = tuple(reference.Pass(*one) for one in zip(self.depths, self.draws, self.states, strict=True))
            return reference.spt_loss(*given, passes, 2, **weights).total

    def __call__(self):
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return loss


def training_step(machine, kind, compiled=False):
    """Time a whole step. Loss and gradients are checked without dropout and from one h0, as in bench_train_step.py."""
    (B,) = machine.small(1024)

    def exact(candidate):
        step = TrainingStep(machine, kind, min(B, 32), candidate, dropout=0.0, fixed=True)
        loss = step.loss()
        loss.backward()
        return [loss.detach(), *(p.grad for _, p in sorted(step.model.named_parameters()))]

    truth, row = exact("official way"), Row(machine)
    checks = {"": near(truth, 1e-3), "bf16": near(truth, 1e-1)}
    candidates = ["official way", "official way, autocast bf16", "ours", "ours, autocast bf16"]
    if compiled and not machine.rehearse:
        candidates.insert(2, "torch.compile, autocast bf16")
    for name in candidates:
        check = checks["bf16" if "bf16" in name else ""]
        row.faults += [f"{name}: {fault}" for fault in check(exact(name))]
        finite = lambda loss: [] if torch.isfinite(loss) else ["its loss is not finite"]  # noqa: E731
        row.add(name, TrainingStep(machine, kind, B, name), finite)
    # The pre-block and T steps of 2 layers for three passes, forward and backward; the softmax over the catalog; Adam.
    own, partners = (int(cases.sequences(kind, B, 20, seed)[1].sum()) for seed in (2, 3))
    flops = 3 * (2 * own + partners) * 12 * 2 * (4 * D * D + 2 * D * 256) + 10 * B * cases.N * D
    parameters = sum(p.numel() for p in row.calls["ours"].model.parameters())
    return row.result(max(flops / machine.peak["bf16"], 28 * parameters / machine.copy))
