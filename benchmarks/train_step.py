"""The candidates of bench_train_step.py, and the process that runs one of them.

``python -m benchmarks.train_step CASE CANDIDATE`` is that process. For each line of standard input it does one step and prints
the step's user and system seconds. At the end of the input it prints the peak memory of the steps in MiB.
"""

import copy
import json
import resource
import subprocess
import sys
from dataclasses import dataclass

import torch

import lares_fast
from benchmarks import ROOT, harness, memory
from lares_fast import LARESConfig, reference
from lares_fast.gpu_bench import cases, official
from lares_fast.gpu_bench.packed_model import PackedLARES
from lares_fast.sequences import Sequences, unpad

L, K = 20, 10


@dataclass(frozen=True)
class Case:
    phase: str
    # A kind of cases.lengths.
    lengths: str
    B: int
    # T of the three passes of phase 1, or of the G trajectories of phase 2.
    depths: tuple[int, ...]
    dropout: float

    @property
    def shape(self):
        depths = f"T {'/'.join(map(str, self.depths))}"
        lengths = "lengths of Instruments" if self.lengths == "instruments" else f"all lengths {L}"
        return f"B {self.B}, {lengths}, {depths}, 2+2 layers, D 64, N {cases.N}, dropout {self.dropout}"


CASES = {
    "spt": Case("spt", "instruments", 1024, (5, 5, 5), 0.5),
    "spt-full": Case("spt", "full", 1024, (5, 5, 5), 0.5),
    "rpt": Case("rpt", "instruments", 400, (3, 8, 5, 4), 0.1),
}
OURS = "lares_fast"
# The allocator keeps all memory and maps no block separately, so that a step reuses the pages of the step before it.
KEEP_PAGES = {"MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_MMAP_MAX_": "0"}
# Name = (model, whether it does the dead work, environment variables).
CANDIDATES = {
    "official way": (official.OfficialLARES, True, {}),
    "official way, allocator tuned": (official.OfficialLARES, True, KEEP_PAGES),
    "without dead work": (official.OfficialLARES, False, {}),
    "packed torch, softmax": (lambda config: PackedLARES(config, sdpa=False), False, {}),
    "packed torch, SDPA": (lambda config: PackedLARES(config, sdpa=True), False, {}),
    OURS: (lares_fast.LARES, False, {}),
}


class Step:
    """A candidate's model, optimizer and batch. With ``fixed``, all candidates get the same h0, to compare them."""

    def __init__(self, case, candidate, *, fixed=False):
        self.case, self.ours = case, candidate == OURS
        build, self.dead_work, _ = CANDIDATES[candidate]
        config = LARESConfig(n_items=cases.N, dropout=case.dropout)
        torch.manual_seed(0)
        weights = reference.LARES(config).state_dict()
        self.model = build(config).train()
        self.model.load_state_dict(weights)
        self.start = copy.deepcopy(self.model).eval()
        self.batch, self.partners = (cases.sequences(case.lengths, case.B, L, seed) for seed in (2, 3))
        self.target = torch.randint(1, cases.N, (case.B,), generator=torch.Generator().manual_seed(4))
        noise = torch.Generator().manual_seed(5)
        count = len(case.depths) * (1 if case.phase == "spt" else 2)
        self.states = [3 * torch.randn(case.B, L, 64, generator=noise) if fixed else None for _ in range(count)]
        if self.ours:
            self.batch, self.partners = Sequences.from_padded(*self.batch), Sequences.from_padded(*self.partners)
            of = [self.batch, self.batch, self.partners] if case.phase == "spt" else [self.batch] * count
            self.states = [s if s is None else unpad(s, x.offsets) for s, x in zip(self.states, of, strict=True)]
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def loss(self):
        """Return (the loss, the rewards). Phase 1 has no rewards: None."""
        return (self._spt if self.case.phase == "spt" else self._rpt)()

    def _spt(self):
        depths, weights = self.case.depths, {"alpha": 0.1, "gamma": 0.5}
        batches = self.model, self.batch, self.target, self.partners
        if not self.ours:
            return official.spt_loss(*batches, depths, 2, **weights, dead_work=self.dead_work, states=self.states), None
        passes = (reference.Pass(T, cases.draw(i, self.case.B), self.states[i]) for i, T in enumerate(depths))
        return reference.spt_loss(*batches, tuple(passes), 2, **weights).total, None

    def _rpt(self):
        depths, G = self.case.depths, len(self.case.depths)
        arguments = self.model, self.start, self.batch, self.target
        policy, frozen = self.states[:G], self.states[G:]
        if not self.ours:
            return official.rpt_loss(
                *arguments, depths, k=K, beta=1.0, dead_work=self.dead_work, states=policy, frozen_states=frozen
            )
        num_steps = torch.tensor(depths)[:, None].expand(-1, self.case.B)
        passes = (
            reference.Pass(num_steps, cases.draw(i, G * self.case.B), None if states[0] is None else torch.cat(states))
            for i, states in enumerate((policy, frozen))
        )
        loss = reference.rpt_loss(*arguments, *passes, k=K, beta=1.0, reward="recall")
        return loss.total, loss.rewards

    def __call__(self):
        loss, _ = self.loss()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()


class Worker:
    """A candidate that runs in its own process."""

    def __init__(self, case, candidate):
        environment = {**harness.os.environ, **CANDIDATES[candidate][2]}
        command = [sys.executable, "-m", "benchmarks.train_step", case, candidate]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def step(self):
        """Do one step and return its user and system seconds."""
        self._process.stdin.write("\n")
        return json.loads(self._process.stdout.readline())

    def close(self):
        """End the process and return its peak memory in MiB."""
        self._process.stdin.close()
        peak = json.loads(self._process.stdout.readline())
        self._process.wait()
        return peak


def serve(case, candidate):
    step = Step(CASES[case], candidate)

    def answer():
        for _ in sys.stdin:
            before = resource.getrusage(resource.RUSAGE_SELF)
            step()
            after = resource.getrusage(resource.RUSAGE_SELF)
            print(json.dumps([after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime]), flush=True)

    with harness.one_core():
        print(memory.extra_mib(answer), flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])
