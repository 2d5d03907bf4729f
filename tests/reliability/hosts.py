"""Test the package on other processors, and with other versions of Python, torch and NumPy.

Other processors are emulated by qemu-user, so every program runs on one x86-64 machine. The environments of the long form need
a package index and about 12 GB of disk, which are free again at the end.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from lares_fast._settings import STRICT
from tests.reliability.counts import ROOT, Counts

HERE = Path(__file__).parent
# Without these variables a child uses its own instruction sets and one thread.
CLEAN = {
    key: value
    for key, value in os.environ.items()
    if not re.match("LARES_FAST_|ATEN_|MKL_|ONEDNN_|OMP_|GLIBC_TUNABLES|PYTHON", key)
}
STRICT_MODE = {"LARES_FAST_STRICT": "1", **STRICT}

# Prints what importing does that a user could notice. Byte code that Python itself keeps is not counted.
SILENT = """
import json, os, sys, threading, time, torch
seen = []
def watch(event, arguments):
    if event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
        seen.append(f"opened {arguments[0]} to write")
    elif event.split(".")[0] in ("subprocess", "socket", "shutil", "tempfile") or event in (
        "os.fork", "os.posix_spawn", "os.system", "os.exec", "os.mkdir", "os.rename", "os.remove", "os.putenv"
    ):
        seen.append(event)
count = lambda: len(os.listdir("/proc/self/task"))
before = count()
sys.addaudithook(watch)
import lares_fast
MORE
print(json.dumps(seen + ["a thread"] * (count() - before)))
# A planted write and a planted thread must be seen.
open(os.devnull, "w").close()
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
print(json.dumps(["to write" in seen[-1], count() > before]))
"""
NAMES = "for name in lares_fast.__all__: getattr(lares_fast, name)"
# Prints the CPU seconds of the import after torch, and of every public name after that.
TIMED = """
import time, torch
begin = time.process_time()
import lares_fast
end = time.process_time()
for name in lares_fast.__all__: getattr(lares_fast, name)
print(end - begin, time.process_time() - end)
"""
IMPORT_SECONDS = 0.1

# Restrictions that make the libraries take the code of older CPUs.
OLD_MKL, OLD_ONEDNN = {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}, {"ONEDNN_MAX_CPU_ISA": "SSE41"}
OLD_GLIBC = {"GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-AVX512F"}
# CPUs of qemu, and the level that the native module must choose on each. qemu emulates no AVX-512.
CPUS = {
    "qemu64": "generic",
    "Nehalem": "generic",
    "Westmere": "generic",
    "SandyBridge": "generic",
    "Haswell": "avx2",
    "EPYC": "avx2",
    "max": "avx2",
}


def measure(counts: Counts) -> None:
    """Run the part."""
    imports(counts)
    hashes(counts)
    if not counts.quick:
        machines(counts)
        native_tests(counts)
        from tests.reliability import hosts_environments

        hosts_environments.measure(counts)


def run(*command: Any, cwd: Path = ROOT.parent, **environ: Any) -> subprocess.CompletedProcess[str]:
    """Run a program with one thread. ``environ`` adds variables."""
    settings = {**CLEAN, "OMP_NUM_THREADS": "1", **{key: str(value) for key, value in environ.items()}}
    return subprocess.run(list(map(str, command)), cwd=cwd, env=settings, capture_output=True, text=True, check=False)


def answer(*command: Any, **environ: Any) -> dict[str, Any]:
    """Return the JSON in the last line that a program prints, or ``{"error": ...}``."""
    done = run(*command, **environ)
    try:
        return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"error": done.stderr[-500:]}
    except (IndexError, json.JSONDecodeError):
        return {"error": f"printed {done.stdout[-200:]!r} {done.stderr[-200:]!r}"}


def imports(counts: Counts, python: Any = sys.executable) -> None:
    """Import the package in new processes."""
    what = "imports: output, warnings, files, threads, child processes"
    for names in (NAMES,) if counts.quick else ("", NAMES):
        done = run(python, "-P", "-B", "-W", "error", "-c", SILENT.replace("MORE", names))
        counts.tried(what)
        if done.returncode or done.stderr or done.stdout != "[]\n[true, true]\n":
            counts.failed(what, (done.stdout + done.stderr)[-500:])
    what = f"imports: less than {IMPORT_SECONDS} s of CPU time over torch (median)"
    times = [tuple(map(float, run(python, "-P", "-c", TIMED).stdout.split())) for _ in range(1 if counts.quick else 15)]
    counts.tried(what, len(times))
    package, names = (statistics.median(column) for column in zip(*times, strict=True))
    counts.note(what, f"{1000 * package:.1f} ms; all public names, which load on first use: {1000 * names:.0f} ms more")
    if package >= IMPORT_SECONDS:
        counts.failed(what, f"{package:.3f} s")


def hashes(counts: Counts) -> None:
    """Train twenty steps in strict mode on this CPU and on others, and compare the weights."""
    what = "strict mode: one hash of the weights after 20 steps"
    old = {**OLD_MKL, **OLD_ONEDNN, **OLD_GLIBC}
    others: dict[str, tuple[list[str], dict[str, str]]] = {"libraries that see an old CPU": ([], old)}
    if not counts.quick:
        others |= {
            "MKL with AVX2": ([], {"MKL_ENABLE_INSTRUCTIONS": "AVX2"}),
            "MKL with SSE4.2": ([], OLD_MKL),
            "oneDNN with SSE4.1": ([], OLD_ONEDNN),
            "glibc without FMA": ([], OLD_GLIBC),
        }
        if shutil.which("qemu-x86_64"):
            others |= {f"qemu {cpu}": (["qemu-x86_64", "-cpu", cpu], {}) for cpu in ("Haswell", "EPYC", "Nehalem")}
    steps = [sys.executable, HERE / "hosts_steps.py"]
    here = answer(*steps, **STRICT_MODE)
    counts.tried(what)
    if "error" in here:
        counts.failed(what, here["error"])
        return
    equal = ["this CPU"]
    for name, (emulator, restriction) in others.items():
        other = answer(*emulator, *steps, **STRICT_MODE, **restriction)
        counts.tried(what)
        if other.get("hashes") != here["hashes"]:
            counts.failed(what, f"{name}: {other}, and here {here}", lost="error" not in other)
        else:
            equal.append(name)
    # Without one of the variables the weights must differ. Otherwise the comparison above could not fail.
    if not counts.quick:
        loose = {name: value for name, value in STRICT.items() if name != "MKL_CBWR"}
        other = answer(*steps, **loose, **OLD_MKL)
        if other.get("hashes", here["hashes"]) == here["hashes"]:
            counts.failed(what, f"the hash does not depend on MKL_CBWR: {other}")
    text = f"{here['hashes']['rpt']} with torch {here['torch']}: {', '.join(equal)}"
    if not counts.quick:
        text += f"; {price():.1f} times the CPU time of the usual mode"
    counts.note(what, text)


def price() -> float:
    """Return the CPU time of strict steps of the published model's size over that of usual steps."""
    size = (400, 200, 32, 64)
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(3):
        for strict, values in times.items():
            values.append(answer(sys.executable, HERE / "hosts_steps.py", *size, **(STRICT_MODE if strict else {}))["seconds"])
    return statistics.median(times[True]) / statistics.median(times[False])


def machines(counts: Counts) -> None:
    """Call the ops of the native module on emulated CPUs. The bits must be those of the same level on this CPU."""
    what = "ops of the native module on emulated x86-64 CPUs: level, no crash, bits of this CPU at that level"
    if shutil.which("qemu-x86_64") is None:
        counts.note(what, "qemu-x86_64 is not installed")
        return
    bits = [sys.executable, HERE / "hosts_bits.py"]
    here = {level: answer(*bits, LARES_FAST_SIMD=level) for level in sorted(set(CPUS.values()))}
    for cpu, level in CPUS.items():
        counts.tried(what)
        found = answer("qemu-x86_64", "-cpu", cpu, *bits)
        if found != here[level] or found.get("level") != level:
            counts.failed(what, f"{cpu}: {found}, and should be {here[level]}", lost="error" not in found)
    counts.note(what, ", ".join(f"{cpu}: {level}" for cpu, level in CPUS.items()))


def native_tests(counts: Counts, calls: int = 200) -> None:
    """Run the C++ tests of the ops on emulated CPUs, and compare bits between x86-64 and aarch64."""
    from tests.cpp.test_native_cpp import build
    from tests.cpp.test_native_cpp import run as run_tests

    what = "calls of the C++ op tests on emulated CPUs"
    static = "-DCMAKE_EXE_LINKER_FLAGS=-static"
    arm = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"]
    x86 = build("hosts_x86", static)
    aarch64 = ["qemu-aarch64", *build("hosts_arm", static, *arm, compiler="aarch64-linux-gnu-g++")]
    targets = {f"x86-64 {cpu}": (["qemu-x86_64", "-cpu", cpu, *x86], level) for cpu, level in CPUS.items()}
    targets["aarch64"] = (aarch64, "generic")
    for name, (program, level) in targets.items():
        chosen = run(*program, "auto", 0, 0, 1, 1, "level").stdout.strip()
        code, output = run_tests(program, level, calls, large=calls)
        found = re.search(rf"level {level}, (\d+) ops: (\d+) valid, (\d+) invalid", output)
        counts.tried(what, int(found[2]) + int(found[3]) if found else 1)
        if code or not found or chosen != level:
            counts.failed(what, f"{name} chose {chosen!r} and should choose {level}; code {code}: {output[-500:]}")
        # A planted bug must end the program.
        if run_tests(program, level, calls, large=0, bug=["ties"])[0] == 0:
            counts.failed(what, f"{name}: a planted bug was not found")
    both = [run_tests(program, "generic", 50, large=0, bug=["bits"]) for program in (x86, aarch64)]
    if any(code for code, _ in both):
        counts.failed(what, f"a program that hashes the results has failed: {both}")
        return
    words = [output.split() for _, output in both]
    here, there = (dict(zip(hashes[::2], hashes[1::2], strict=True)) for hashes in words)
    equal = [op for op, value in here.items() if there[op] == value]
    counts.note(what, f"equal bits on x86-64 generic and aarch64: {', '.join(equal) or 'none'} (of {', '.join(here)})")
