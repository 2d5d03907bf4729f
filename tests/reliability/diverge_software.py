"""Continue runs with other software: threads, instruction sets, backend, versions. Each difference is shown and logged."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from lares_fast.train.checkpoint import load_state, save_state
from tests.reliability.corrupt_places import called
from tests.reliability.counts import PACKAGE, Counts
from tests.support.damage import plain

SOFTWARE = "other threads, instruction set, backend or version for the second part of a run"
SAME = "the same software for the second part of a run: equal bits"
_RUN = ["--config", "tiny", "--set", "data.synthetic_users=300", "--set", "spt.batch_size=64", "--phase", "spt"]
_AGAIN = ["--phase", "spt", "--set", "spt.epochs=2"]

# The variables of the second part of a run, and the entries that must change, with their new values.
CHANGES: tuple[tuple[dict[str, str], dict[str, object]], ...] = (
    ({"OMP_NUM_THREADS": "2"}, {"threads": 2}),
    ({"LARES_FAST_SIMD": "generic"}, {"simd": "generic"}),
    ({"LARES_FAST_SIMD": "avx2"}, {"simd": "avx2"}),
    ({"LARES_FAST_BACKEND": "reference"}, {"backend": "reference"}),
    ({"ATEN_CPU_CAPABILITY": "default"}, {"torch_simd": "DEFAULT"}),
    ({"ATEN_CPU_CAPABILITY": "avx2"}, {"torch_simd": "AVX2"}),
    ({"MKL_CBWR": "COMPATIBLE"}, {"MKL_CBWR": "COMPATIBLE"}),
    ({"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}, {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}),
    ({"ONEDNN_MAX_CPU_ISA": "SSE41"}, {"ONEDNN_MAX_CPU_ISA": "SSE41"}),
    ({"ONEDNN_DEFAULT_FPMATH_MODE": "BF16"}, {"ONEDNN_DEFAULT_FPMATH_MODE": "BF16"}),
    # The command line sets the variables of PyTorch and MKL itself.
    (
        {"LARES_FAST_STRICT": "1", "LARES_FAST_SIMD": "generic"},
        {"strict": True, "simd": "generic", "torch_simd": "DEFAULT", "MKL_CBWR": "COMPATIBLE"},
    ),
)
# Entries that are edited in state.pt, as if an earlier part had had them. The quick form edits each sixth one.
EDITED = {
    "torch": "2.99.0",
    "lares_fast": "0.0.1",
    "numpy": "1.20.0",
    "device": "NVIDIA H100",
    "threads": 64,
    "compiler": "GNU 3.4.0 -O1",
    "cpu": "Another CPU",
    "simd": "sse2",
    "backend": "native",
    "strict": True,
    "fp32_precision": "bf16",
}


def measure(counts: Counts, folder: Path) -> None:
    """Stop a run after one epoch, change the software, and continue it."""
    start = folder / "first-part"
    train = (lambda *arguments: called("train", *arguments)[1]) if counts.quick else command
    train("--out", start, "--set", "spt.epochs=1", *_RUN)
    edited = list(EDITED.items())[:: 6 if counts.quick else 1]
    for entry, old in edited:
        copy = shutil.copytree(start, folder / "edited")
        state = load_state(copy / "state.pt")
        now = state["environment"][entry]
        state["environment"][entry] = old
        save_state(copy / "state.pt", state)
        judge(counts, entry, copy, train("--resume", copy, *_AGAIN), {entry: (old, now)})
        shutil.rmtree(copy)
    if counts.quick:
        return
    whole = weights(folder / "whole", "--out", folder / "whole", "--set", "spt.epochs=2", *_RUN)
    for repeat in range(3):
        counts.tried(SAME)
        copy = shutil.copytree(start, folder / "same")
        if weights(copy, "--resume", copy, *_AGAIN) != whole:
            counts.failed(SAME, f"try {repeat} gave other bits", lost=True)
        shutil.rmtree(copy)
    found = []
    for variables, expected in CHANGES:
        copy = shutil.copytree(start, folder / "other")
        before = load_state(copy / "state.pt")["environment"]
        # What a machine has anyway does not change.
        changes = {entry: (before[entry], value) for entry, value in expected.items() if before[entry] != value}
        if (text := command("--resume", copy, *_AGAIN, **variables, fail=False)) is None:
            # This processor does not have the instruction set.
            shutil.rmtree(copy)
            continue
        what = " ".join(f"{name}={value}" for name, value in variables.items())
        judge(counts, what, copy, text, changes)
        state = load_state(copy / "state.pt")
        found.append(f"{what} gave {'the same' if plain(state['model']) == whole else 'other'} bits")
        shutil.rmtree(copy)
    counts.note(SOFTWARE, "; ".join(found))


def judge(counts, what, copy, text, expected):
    """Count a failure unless exactly the ``expected`` differences were printed, and logged."""
    counts.tried(SOFTWARE)
    lines = [json.loads(line) for line in (copy / "events.jsonl").read_text().splitlines()]
    logged = {line["name"]: (line["old"], line["new"]) for line in lines if line["event"] == "changed"}
    logged.pop("spt.epochs", None)
    printed = all(f"changed  environment {name}: {old} -> {new}" in text for name, (old, new) in expected.items())
    if logged != expected or not printed:
        counts.failed(SOFTWARE, f"{what}: logged {logged}, {'printed' if printed else 'not printed'}", lost=True)


def weights(folder, *arguments):
    """Call the command line, and return the weights of the model in ``folder``."""
    command(*arguments)
    return plain(load_state(folder / "state.pt")["model"])


def command(*arguments, fail=True, **environ):
    """Call ``lares-fast train`` in a process of its own, and return what it printed; ``None`` if it failed and may fail."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "lares_fast", "train", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
            "PYTHONPATH": str(PACKAGE),
            **environ,
        },
    )
    assert not fail or done.returncode == 0, done.stdout + done.stderr
    return None if done.returncode else done.stdout
