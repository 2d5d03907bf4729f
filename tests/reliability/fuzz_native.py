"""Call the native code with random bytes: libFuzzer over the C++ functions, and hostile calls of the module from Python."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.reliability.counts import ROOT, Counts
from tests.support.native_program import build

# clang's address and undefined behaviour sanitizers. The three checks that are left out triple the time of compilation, and the
# address sanitizer reports the same faults when the memory is read.
SANITIZERS = "-fsanitize=address,undefined,fuzzer-no-link -fno-sanitize=null,alignment,object-size -fno-sanitize-recover=all"
FLAGS = f"{SANITIZERS} -g1 -mllvm -asan-instrumentation-with-call-threshold=0"
CLANG = next((name for name in ("clang++-14", "clang++") if shutil.which(name)), None)
# A limit that lets the id one beyond the last item through.
PLANT = ("target_rank_cpu.cpp", "t.target[b] < t.N", "t.target[b] <= t.N")


def measure(counts: Counts) -> None:
    """Count hostile calls from Python, and in the long form runs of libFuzzer. Both must notice planted faults."""
    hostile(counts, 8_000 if counts.quick else 300_000)
    planted_calls(counts)
    if counts.quick:
        return
    if CLANG is None:
        raise SystemExit("fuzz_native needs clang 14 or newer with libFuzzer: install the package clang")
    program = Path(build("fuzz", "-DLIBFUZZER=ON", "-DOPTIMISE=-O1", f"-DCMAKE_CXX_FLAGS={FLAGS}", compiler=CLANG)[0])
    with tempfile.TemporaryDirectory() as folder:
        planted_read(counts, program, Path(folder))
        fuzz(counts, program, Path(folder), minutes=25)


def command(seed: str, calls: int, *options: str) -> list[str]:
    """Return the command of hostile_calls.py."""
    return [sys.executable, "-m", "tests.reliability.hostile_calls", seed, str(calls), *options]


def hostile(counts: Counts, number: int) -> None:
    """Make ``number`` hostile calls in child processes."""
    what = "hostile calls of the module from Python"
    share = min(number, 50_000)
    refused = 0
    for seed in range(number // share):
        with tempfile.NamedTemporaryFile() as at:
            done = subprocess.run(
                command(str(seed), share, "--at", at.name), cwd=ROOT, capture_output=True, text=True, timeout=3600, check=False
            )
            refused += sum(map(int, re.findall(r"refused (\d+)", done.stdout)))
            call = int.from_bytes(Path(at.name).read_bytes()[:8], "little")
        counts.tried(what, call + 1, goal=number)
        if done.returncode != 0:
            how = f"exit code {done.returncode} in call {seed}/{call}: {done.stderr[-300:]}"
            counts.failed(what, how, lost="changed" in done.stderr or "wrote" in done.stderr)
    counts.note(what, f"{refused:,} were refused with an error, the others were accepted")


def planted_calls(counts: Counts) -> None:
    """Check that a crash and a write beside an array end the program of the hostile calls."""
    what = "planted faults are noticed"
    for plant, sign in (("crash", "-11"), ("write", "memory beside an array changed")):
        run = command("0", 50, "--plant", plant)
        done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
        counts.tried(what)
        if sign not in f"{done.returncode} {done.stderr}":
            counts.failed(what, f"{plant}: exit code {done.returncode}, {done.stderr[-300:]}")


def run_fuzzer(program: Path, folder: Path, *options: str) -> tuple[int, str]:
    """Run libFuzzer in ``folder``, and return its exit code and its report."""
    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    limits = (
        "-max_len=256",
        "-timeout=120",
        "-rss_limit_mb=4096",
        "-print_final_stats=1",
        "-reload=0",
        f"-artifact_prefix={folder}/",
    )
    # More than the memory that a caller could have is refused by malloc, and not reported as an error.
    environment = {**os.environ, "ASAN_OPTIONS": "allocator_may_return_null=1:detect_leaks=0"}
    with open(folder / "report.txt", "w+") as report:
        code = subprocess.run([program, *limits, *options, corpus], stderr=report, env=environment, check=False).returncode
        report.seek(0)
        return code, report.read()


def fuzz(counts: Counts, program: Path, folder: Path, *, minutes: int) -> None:
    """Run libFuzzer for ``minutes``, and count its runs."""
    what = "runs of libFuzzer over the C++ functions"
    for part in range(minutes):
        code, report = run_fuzzer(program, folder, "-max_total_time=60", f"-seed={part + 1}")
        runs = re.search(r"stat::number_of_executed_units: (\d+)", report)
        counts.tried(what, int(runs[1]) if runs else 1)
        if covered := re.findall(r"cov: (\d+)", report):
            counts.note(what, f"{int(covered[-1]):,} edges covered in {part + 1} minutes, with the address and undefined "
                              "behaviour sanitizers of clang")  # fmt: skip
        if code != 0:
            sign = re.search(r"(wrong result: .*|ERROR: .*|runtime error: .*)", report)
            counts.failed(what, sign[1] if sign else report[-600:], lost="wrong result" in report)
            return


def planted_read(counts: Counts, program: Path, folder: Path) -> None:
    """Compile a limit that is too large into a copy of the program. libFuzzer must find the read beyond the memory."""
    name, text, instead = PLANT
    what = "planted faults are noticed"
    copy = folder / "csrc"
    shutil.copytree(ROOT / "csrc", copy)
    file = copy / "target_rank" / name
    assert file.read_text().count(text) == 1, f"{name} has changed: plant the fault elsewhere"
    file.write_text(file.read_text().replace(text, instead))
    assert CLANG is not None
    objects = [x for x in program.parent.rglob("*.o") if x.name != f"{name}.o"]
    spoilt = folder / "spoilt"
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", f"-I{copy}", *FLAGS.split()]
    for line in (
        [CLANG, *flags, "-c", file, "-o", folder / "spoilt.o"],
        [CLANG, "-fsanitize=address,undefined,fuzzer", folder / "spoilt.o", *objects, "-pthread", "-o", spoilt],
    ):
        subprocess.run(line, check=True)
    _, report = run_fuzzer(spoilt, folder, "-max_total_time=300", "-seed=1")
    shutil.rmtree(folder / "corpus")
    counts.tried(what)
    runs = re.findall(r"#(\d+)", report)
    if "AddressSanitizer: heap-buffer-overflow" in report:
        counts.note(what, f"libFuzzer found a read beyond the memory after about {int(runs[-1]):,} runs" if runs else "")
    else:
        counts.failed(what, f"libFuzzer did not report the read beyond the memory: {report[-600:]}")
