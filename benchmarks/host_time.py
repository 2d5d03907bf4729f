"""Compare the host time of a training step of two checkouts, on a machine without a GPU.

``python -m benchmarks.host_time BEFORE AFTER [--rounds 12] [--optimizers foreach fused]``

Build the native module of each checkout in place first. Kernels are launched at a driver that needs no GPU
(tests/triton/stub_cuda.c), so a step takes the time that the host needs for it: batch, loss, backward and optimizer. The
operations of PyTorch run on tiny tensors of the CPU. Two processes, one for each checkout, take turns (before, after, after,
before), so that other programs slow both equally. The ratio of a round compares CPU times. A ratio above 1 means that AFTER is
faster.

Some of this time is not there on a GPU: on the CPU, the functions of PyTorch that update a list of tensors, and so Adam,
compute one tensor after the other.

If AFTER can replay its steps from CUDA graphs, as training on a GPU does, its replayed steps are measured too, against the
same steps of BEFORE. Captures and replays of the stand-in for graphs are empty. So the time of a replayed step has the batch,
its copy and the search for the graph, but not the one call that starts the graph in the driver.

A step has 8 rows, 2 + 2 layers of width 64, 5 steps of the recurrence in every pass, dropout, fp32 and Adam.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
PHASES = ("spt", "rpt")
PARTS = ("batch", "loss", "backward", "optimizer")
REPLAYED_PARTS = ("batch", "replay")
ROWS = 8
# Steps of one measurement, and steps before the first one, which compile the kernels.
STEPS, WARM_UP = 5, 3


def open_checkout(tree: Path) -> None:
    """Import the package and the kernels of the checkout ``tree``."""
    # Triton's driver is loaded before torch, because torch would tell it that there is no GPU.
    import triton

    triton.runtime.driver.active.get_current_device()
    sys.path.insert(0, str(tree))
    import lares_fast

    # An editable install would find the kernels of another checkout.
    folder = tree / "kernels"
    where = {"location": folder / "__init__.py", "submodule_search_locations": [str(folder)]}
    spec = importlib.util.spec_from_file_location("lares_fast.kernels", **where)
    lares_fast.kernels = sys.modules["lares_fast.kernels"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lares_fast.kernels)
    assert Path(lares_fast.__file__).is_relative_to(tree), lares_fast.__file__
    from lares_fast.ops import _triton

    _triton.obstacle = lambda tensor: None


class Step:
    """The training steps of a phase."""

    def __init__(self, phase: str, optimizer: str) -> None:
        import torch

        from lares_fast import LARES, LARESConfig
        from lares_fast.data import leave_one_out, synthetic_log
        from lares_fast.train import RPTConfig, SPTConfig
        from lares_fast.train.rpt import RPT
        from lares_fast.train.spt import SPT

        log = synthetic_log(n_users=200, n_items=300, mean_length=9, seed=1)
        rows = leave_one_out(log).train
        torch.manual_seed(0)
        config = LARESConfig(n_items=log.n_items, mean_depth=5, depth_sampling="constant", dropout=0.1)
        model, start = LARES(config).train(), LARES(config)
        if phase == "spt":
            self.phase = SPT(model, log, rows, SPTConfig())
        else:
            self.phase = RPT(model, start, log, rows, RPTConfig(group_size=4))
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, **{optimizer: True})
        self.index, self.number = torch.arange(ROWS), 0

    def __call__(self, around=contextlib.nullcontext) -> list[float]:
        """Make a step, and return the CPU seconds of each of PARTS. All parts except the batch run in a block ``around()``."""
        self.number += 1
        key, times = (self.number, 1), [time.process_time()]
        batch = self.phase.batch(self.index, key)
        times.append(time.process_time())
        with around():
            # Phases were not modules once, and their losses took the key.
            loss = self.phase.loss(batch, key)[0] if hasattr(self.phase, "loss") else self.phase(batch)
            times.append(time.process_time())
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            times.append(time.process_time())
            self.optimizer.step()
            times.append(time.process_time())
        return [end - start for start, end in itertools.pairwise(times)]


class Replayed(Step):
    """The training steps of a phase as a GPU replays them. A stand-in takes the place of the graphs, and it does nothing."""

    def __init__(self, phase: str, optimizer: str) -> None:
        import torch

        from lares_fast.train.device_log import DeviceLog
        from lares_fast.train.graphs import Graphs
        from lares_fast.train.steps import DeviceSteps

        super().__init__(phase, optimizer)
        cpu = torch.device("cpu")
        self.phase.settings = dataclasses.replace(self.phase.settings, batch_size=ROWS)
        run = SimpleNamespace(model=self.phase.model, device=cpu)
        self.steps = DeviceSteps(run, self.phase, self.optimizer, DeviceLog(self.phase.log, cpu, free=2**40), None)
        self.steps._graphs = Graphs(lambda content: None, cpu, lambda function: lambda: None, print)

    def __call__(self) -> list[float]:
        """Make a step, and return the CPU seconds of each of REPLAYED_PARTS."""
        self.number += 1
        times = [time.process_time()]
        batch = self.steps.prepare([(self.index, (self.number, 1))])
        times.append(time.process_time())
        self.steps.make(batch, None)
        times.append(time.process_time())
        return [end - start for start, end in itertools.pairwise(times)]


def launches(step: Step) -> tuple[int, int]:
    """Return the launches of kernels and the operations of PyTorch in a step, without the preparation of the batch."""
    from lares_fast.kernels import _launch

    sys.path.append(str(ROOT))
    from tests.support.launches import Counted

    kernels = 0

    def count(kernel, programs, *call) -> None:
        nonlocal kernels
        kernels += 1

    token, counted = _launch.stand_in.set(count), Counted()
    step(lambda: counted)
    _launch.stand_in.reset(token)
    return kernels, counted.launches.total()


def work(tree: Path, optimizer: str) -> None:
    """Print the launches of each phase, and whether steps can be replayed.

    Then read names of phases, or "replayed" and a name, make steps, and print the mean CPU seconds of each part.
    """
    open_checkout(tree)
    import torch

    torch.set_num_threads(1)
    # Kernels do not run, so their results are arbitrary numbers, and arithmetic with subnormal ones is slow.
    torch.set_flush_denormal(True)
    steps = {phase: Step(phase, optimizer) for phase in PHASES}
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    counts = [number for step in steps.values() for number in launches(step)]
    replays = importlib.util.find_spec("lares_fast.train.graphs") is not None
    if replays:
        steps |= {f"replayed {phase}": Replayed(phase, optimizer) for phase in PHASES}
    print("ready", *counts, int(replays), flush=True)
    for line in sys.stdin:
        step = steps[line.strip()]
        print(*(sum(part) / STEPS for part in zip(*(step() for _ in range(STEPS)), strict=True)), flush=True)


def build_stub(folder: Path) -> None:
    """Build a libcuda.so.1 that needs no GPU."""
    compiler = shutil.which("gcc") or shutil.which("cc") or sys.exit("host_time needs a C compiler.")
    source, library = ROOT / "tests" / "triton" / "stub_cuda.c", folder / "libcuda.so.1"
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source], check=True)


def environment(stub: Path) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if name not in ("STUB_LOG", "TRITON_INTERPRET")}
    return {
        "TRITON_CACHE_DIR": str(stub / "cache"),
        **plain,
        "TRITON_LIBCUDA_PATH": str(stub),
        "LD_LIBRARY_PATH": str(stub),
        "TRITON_DEFAULT_BACKEND": "nvidia",
        "STUB_CAPABILITY": "80",
        "STUB_SHARED": "166912",
        "OMP_NUM_THREADS": "1",
    }


def report(measured: Callable[[str, int], list[float]], names: tuple[str, str], launched: Sequence[str], rounds: int) -> None:
    """Measure the steps ``names`` of the two workers in turns. Print the time of each, with what it launches, and the ratio."""
    times, ratios = ([], []), []
    for _ in range(rounds):
        totals = [0.0, 0.0]
        for number in (0, 1, 1, 0):
            times[number].append(measured(names[number], number))
            totals[number] += sum(times[number][-1])
        ratios.append(totals[0] / totals[1])
    for name, of_worker, what, which in zip(names, times, launched, ("before", "after"), strict=True):
        parts = REPLAYED_PARTS if name.startswith("replayed") else PARTS
        medians = (1e3 * statistics.median(part) for part in zip(*of_worker, strict=True))
        listed = ", ".join(f"{part} {value:.2f}" for part, value in zip(parts, medians, strict=True))
        print(f"{name:12} {1e3 * statistics.median(map(sum, of_worker)):6.2f} ms ({listed}), {what}, {which}")
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    print(f"{'ratio':12} {middle:6.2f} (min {low:.2f}, max {high:.2f})", flush=True)


def compare(trees: list[Path], optimizers: list[str], rounds: int) -> None:
    """Print the host time of each phase in both checkouts, their ratio, and their launches."""
    with tempfile.TemporaryDirectory() as folder:
        stub = Path(folder)
        build_stub(stub)
        workers = [
            subprocess.Popen(
                [sys.executable, "-P", __file__, "--work", str(tree.resolve()), "--optimizers", optimizer],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(stub),
            )
            for tree, optimizer in zip(trees, optimizers, strict=True)
        ]  # fmt: skip

        def measured(name: str, number: int) -> list[float]:
            workers[number].stdin.write(f"{name}\n")
            workers[number].stdin.flush()
            return list(map(float, workers[number].stdout.readline().split()))

        found = [worker.stdout.readline().split() for worker in workers]
        if any(line[:1] != ["ready"] for line in found):
            sys.exit("a checkout does not run: see its error above.")
        counts = [list(map(int, line[1:])) for line in found]
        for place, phase in enumerate(PHASES):
            launched = [
                f"{kernels} kernels, {operations} operations" for kernels, operations in (c[2 * place :][:2] for c in counts)
            ]
            report(measured, (phase, phase), launched, rounds)
            if counts[1][-1]:
                report(measured, (phase, f"replayed {phase}"), (launched[0], "one graph"), rounds)
        for worker in workers:
            worker.stdin.close()
            worker.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="*", type=Path, metavar="CHECKOUT", help="the checkout before, and the checkout after")
    parser.add_argument("--rounds", type=int, default=12, help="rounds of each comparison (default: 12)")
    parser.add_argument(
        "--optimizers", nargs="+", default=["foreach", "fused"], metavar="KIND",
        help="the implementation of Adam in each checkout (default: foreach fused)",
    )  # fmt: skip
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work is not None:
        work(arguments.work, arguments.optimizers[0])
    elif len(arguments.trees) != 2 or len(arguments.optimizers) != 2:
        parser.error("give two checkouts and two kinds of Adam: before and after")
    else:
        compare(arguments.trees, arguments.optimizers, arguments.rounds)


if __name__ == "__main__":
    main()
