"""The first run on a GPU as one command, in a bare checkout: build, check and time, within a total time.

    python benchmarks/gpu/first.py --out DIR                              # everything, in 420 s
    python benchmarks/gpu/first.py --out DIR --only failed REPORT         # what failed there or was not reached
    python benchmarks/gpu/first.py --out DIR --only speed:recurrence      # rows, steps or groups by name
    python benchmarks/gpu/first.py --out DIR --rehearse                   # on the CPU, with the installed package

The folder has every result as soon as it is known: results.json, speed.jsonl, build.log, logs.txt, and table.txt at the end.
The exit code is 0 if all that was asked for passed. This process never touches the GPU.
"""

import argparse
import contextlib
import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# Kept from call to call, so that a second one compiles nothing again.
WORK = Path(tempfile.gettempdir()) / "lares_fast-gpu"
# Seconds after the start by which each phase is over; and what the table at the end may take.
UNTIL = {"build": 100, "checks": 220, "speed": 390}
TABLE = 5
# A first call leaves time for a second.
TOTAL, REHEARSAL = 420, 1200


def phases(total, rehearse=False):
    """The ends of the phases, cut to ``total`` seconds; a rehearsal has that alone, because its machine may be slow."""
    latest = max(0.0, total - TABLE)
    return {name: latest if rehearse else min(until, latest) for name, until in UNTIL.items()}


def assemble():
    """The package without its native module, which Triton's kernels do not need, in a folder that stands first on the path."""
    package = WORK / "site" / "lares_fast"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "lares_fast", package, ignore=shutil.ignore_patterns("*.so", "__pycache__", "_build.json"))
    shutil.copytree(ROOT / "kernels", package / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    note(package, native=False, reason="benchmarks/gpu/first.py has not built it")
    sys.path.insert(0, str(package.parent))
    os.environ.update(
        PYTHONPATH=os.pathsep.join(filter(None, [str(package.parent), os.environ.get("PYTHONPATH")])),
        LARES_FAST_CACHE=str(WORK / "cache"),
        TRITON_CACHE_DIR=str(WORK / "triton"),
        TORCHINDUCTOR_CACHE_DIR=str(WORK / "inductor"),
        # Many processes share the cores.
        OMP_NUM_THREADS="2",
    )
    return package


def note(package, **facts):
    """What the package says of its build."""
    (package / "_build.json").write_text(json.dumps(facts))


def tool(name, folder):
    """A build program: the one of the Python package ``name``, else of the path."""
    with contextlib.suppress(ImportError):
        if found := shutil.which(name, path=getattr(importlib.import_module(name), folder)):
            return found
    return shutil.which(name) or name


def architecture():
    """That of the first GPU, such as 90; nothing if the driver does not say."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return said.split("\n")[0].replace(".", "").strip()


def build_commands():
    """Configure and compile, with neither pip nor setuptools; for ``LARES_FAST_CUDA_ARCHS``, else for the card that is here."""
    import pybind11

    import lares_fast

    ninja, folder = tool("ninja", "BIN_DIR"), str(WORK / "build")
    configure = [
        tool("cmake", "CMAKE_BIN_DIR"), "-S", str(ROOT), "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}",
        "-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPACKAGE_VERSION={lares_fast.__version__}", "-DLARES_FAST_CUDA=1",
    ]  # fmt: skip
    if archs := os.environ.get("LARES_FAST_CUDA_ARCHS", "").replace(",", ";") or architecture():
        configure.append(f"-DLARES_FAST_CUDA_ARCHS={archs}")
    return configure, [ninja, "-C", folder, "_C"]


def build(package, seconds, log):
    """Build the native module into ``package`` within ``seconds``; the result of the step."""
    from lares_fast.verify.process import run_command

    began = time.monotonic()
    with log.open("w") as file:
        try:
            for command in build_commands():
                left = began + seconds - time.monotonic()
                if code := run_command(command, seconds=left, out=file, log=file):
                    return result("failed", began, f"{Path(command[0]).name} ended with code {code}: see build.log")
                if code is None:
                    return result("hung", began, f"the build took more than {seconds:.0f} s")
            (module,) = (WORK / "build").glob("_C.*.so")
        except (ImportError, OSError, ValueError) as error:
            file.write(f"{type(error).__name__}: {error}\n")
            return result("failed", began, str(error))
    # The steps that need it begin when this function has returned.
    shutil.copy2(module, package)
    note(package, native=True, reason="")
    return result("passed", began)


def result(status, began, log=""):
    return {"status": status, "seconds": round(time.monotonic() - began, 1), **({"log": log} if log else {})}


def installed():
    """The step "build" of a rehearsal: the native module of the installed package."""
    from lares_fast import _native

    there, why = _native.available()
    return {"status": "passed" if there else "failed", "seconds": 0, **({} if there else {"log": why})}


def checks(steps, report, built, *, rehearse, jobs, began, ends):
    """Correctness: the steps that need no native module begin beside its build, the others when ``built`` is set."""
    from lares_fast.cli import gpu_day

    how = {"rehearse": rehearse, "jobs": jobs, "seconds": ends["checks"], "end": began + ends["checks"]}
    native = {name: step for name, step in steps.items() if step.native}
    plain = {name: step for name, step in steps.items() if not step.native}
    at_once = start(gpu_day.run, plain, report, **how)
    if rehearse:
        # On few cores, one after the other.
        at_once.join()
    while not built.wait(0.5):
        if hopeless(report.found):
            break
    if report.found["build"]["status"] != "passed":
        for name in native:
            report.put(name, {"status": "not reached", "why": "the native module was not built: see build.log"})
    elif not hopeless(report.found):
        gpu_day.run(native, report, **how)
    at_once.join()


def start(call, *arguments, **how):
    """A thread with this call; that a signal has ended it is told by the main thread."""

    def run():
        with contextlib.suppress(KeyboardInterrupt):
            call(*arguments, **how)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def hopeless(found):
    """Whether the machine itself was found broken."""
    from lares_fast.verify.gpu_plan import FIRST

    return any(found[name]["status"] in ("failed", "hung") for name in FIRST if name in found)


def speed(names, out, seconds, rehearse):
    """The rows ``names`` in a process of their own, which writes them into the report."""
    from lares_fast.verify.process import run_command

    command = [sys.executable, "-P", str(HERE / "speed.py"), "--out", str(out), "--seconds", f"{seconds:.0f}", "--only", *names]
    with (out / "logs.txt").open("a") as log:
        run_command([*command, *(["--rehearse"] if rehearse else [])], seconds=seconds + 5, out=log, log=log)


def heading(found, commit):
    """Where the results are from."""
    record = found.get("record", {})
    cards = ", ".join(gpu["name"] for gpu in record.get("gpus", ())) or record.get("gpu", "unknown")
    about = {"card": cards, **{name: record.get(name, "unknown") for name in ("date", "driver", "torch", "triton", "python")}}
    about |= {"commit": commit, "command": shlex.join(["python", "benchmarks/gpu/first.py", *sys.argv[1:]])}
    return "\n".join(f"{name}: {value}" for name, value in about.items())


def checked_out():
    """The commit of the sources, if git knows it."""
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def arguments(argv):
    parser = argparse.ArgumentParser(description="The first run on a GPU: build, check and time.")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder of the results; made if it is not there")
    parser.add_argument("--total", metavar="SECONDS", type=float, help=f"for all together (default: {TOTAL})")
    parser.add_argument("--jobs", metavar="N", type=int, help="checks at the same time (default: 10; 2 in a rehearsal)")
    parser.add_argument("--only", metavar="NAME", nargs="+", help="steps, rows or groups; or failed REPORT")
    parser.add_argument("--commit", help="of the sources, where git is not there to say it")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with the installed package")
    given = parser.parse_args(argv)
    for name in ("total", "jobs"):
        if (value := getattr(given, name)) is not None and not value > 0:
            parser.error(f"--{name} must be greater than 0, but is {value:g}")
    return given


def main(argv=None):
    began, given = time.monotonic(), arguments(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    package = None if given.rehearse else assemble()
    # Only now is the package on the path.
    from lares_fast._errors import InputError
    from lares_fast.cli import gpu_day
    from lares_fast.verify import gpu_plan
    from lares_fast.verify.process import leaving_none_behind

    sys.path.append(str(ROOT))
    rows = importlib.import_module("benchmarks.gpu.speed").ROWS
    steps = gpu_plan.plan(rehearse=given.rehearse, quick=given.rehearse)
    try:
        names = gpu_plan.chosen(given.only, ["build", *steps, *rows])
        before = gpu_plan.read(Path(given.only[1])) if given.only and given.only[0] == "failed" else {}
    except InputError as error:
        sys.exit(f"first.py: {error}")
    ends = phases(given.total or (REHEARSAL if given.rehearse else TOTAL), given.rehearse)
    # Nothing is told without the machine and the module.
    report = gpu_day.Report(given.out / "results.json", dict.fromkeys(["build", "record", *names]), before)
    built = threading.Event()

    def make():
        try:
            log, left = given.out / "build.log", began + ends["build"] - time.monotonic()
            report.put("build", installed() if given.rehearse else build(package, left, log))
        finally:
            built.set()

    with leaving_none_behind():
        start(make)
        asked = {name: step for name, step in steps.items() if name == "record" or name in names}
        jobs = given.jobs or (2 if given.rehearse else 10)
        checks(asked, report, built, rehearse=given.rehearse, jobs=jobs, began=began, ends=ends)
        left = began + ends["speed"] - time.monotonic()
        asked = [name for name in names if name in rows]
        if asked and left > 0 and not hopeless(report.found):
            speed(asked, given.out, left, given.rehearse)
    found = gpu_plan.read(report.place)
    text = f"{heading(found, given.commit or checked_out())}\n\n{gpu_day.table(found)}\n"
    (given.out / "table.txt").write_text(text)
    with (given.out / "logs.txt").open("a") as logs:
        logs.writelines(f"\n== {name}\n{one['log']}\n" for name, one in found.items() if "log" in one)
    print(f"{text}\n{time.monotonic() - began:.0f} s in all")
    return int(not all(gpu_plan.is_well(found[name]) for name in report.found))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        # What was known is on the disk.
        sys.exit(130)
