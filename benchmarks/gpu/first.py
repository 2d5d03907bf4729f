"""The first run on a GPU as one command, in a bare checkout: build, check and time, within a time limit.

    python benchmarks/gpu/first.py --out DIR                              # everything, in 420 s
    python benchmarks/gpu/first.py --out DIR --only failed REPORT         # steps that failed or were not reached in REPORT
    python benchmarks/gpu/first.py --out DIR --only speed:recurrence      # rows, steps or groups by name
    python benchmarks/gpu/first.py --out DIR --rehearse                   # on the CPU, with the installed package

Every result is written to the folder at once, in results.json, build.log and logs.txt. The last file is table.txt.
The exit code is 0 if every chosen step and row passed or was skipped. This process itself does not use the GPU.
"""

import argparse
import contextlib
import importlib
import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# This folder stays between calls, so that a second call compiles nothing again.
WORK = Path(tempfile.gettempdir()) / "lares_fast-gpu"
# The rows of lares-fast gpu-bench that this run measures, the most valuable rows first. Here their names begin with "speed:".
ROWS = (
    "ceilings",
    "spt_step:bf16",
    "rpt_step:bf16",
    "topk:B256-N1M-K100",
    "recurrence:bf16-B2048",
    "recurrence:bf16-B1024-gradients",
    "cross_entropy:bf16-N24588",
    "recurrence:fp32-B2048",
    "cross_entropy:fp32-N24588",
    "spt_step:fp32",
    "rpt_step:fp32",
    "target_rank:B256-N1M",
    "topk:B256-N24588-K100",
    "topk:B1-N1M-K100",
    "attention:L50-full",
    "attention:L20-instruments",
    "evaluation",
    "cross_entropy:bf16-N1M",
    "recurrence:bf16-B2048-full",
    "recurrence:bf16-B256",
    "recurrence:fp32-B1024-gradients",
    "rows_per_second",
)
ROW = "speed:"
# Seconds after the start at which each phase must end.
UNTIL = {"build": 100, "checks": 220, "speed": 390}
# Seconds for the table at the end.
TABLE_SECONDS = 5
# Default of --total. It leaves time for a second call.
TOTAL, REHEARSAL = 420, 1200


def phases(total, rehearse=False):
    """Return the ends of the phases within ``total`` seconds. A rehearsal has no other limit: its machine may be slow."""
    latest = max(0.0, total - TABLE_SECONDS)
    return {name: latest if rehearse else min(until, latest) for name, until in UNTIL.items()}


def claim(folder):
    """Create ``folder``, or stop if another account owns it or may write to it: code is built there and then run."""
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        sys.exit(f"first.py: {folder} is not a folder that only this account can write to: remove it.")


def assemble():
    """Copy the package to a folder that comes first on the path. Triton's kernels need no native module, so it has none."""
    claim(WORK)
    package = WORK / "site" / "lares_fast"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "lares_fast", package, ignore=shutil.ignore_patterns("*.so", "__pycache__", "_build.json"))
    shutil.copytree(ROOT / "kernels", package / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    write_build_info(package, native=False, reason="benchmarks/gpu/first.py has not built it")
    sys.path.insert(0, str(package.parent))
    os.environ.update(
        PYTHONPATH=os.pathsep.join(filter(None, [str(package.parent), os.environ.get("PYTHONPATH")])),
        LARES_FAST_CACHE=str(WORK / "cache"),
        TRITON_CACHE_DIR=str(WORK / "triton"),
        TORCHINDUCTOR_CACHE_DIR=str(WORK / "inductor"),
        # Many processes run at the same time.
        OMP_NUM_THREADS="2",
    )
    return package


def write_build_info(package, **facts):
    """Write the file in which the package describes its build."""
    (package / "_build.json").write_text(json.dumps(facts))


def tool(name, folder):
    """Return the path of a build program, from the Python package ``name`` or else from PATH."""
    with contextlib.suppress(ImportError):
        if found := shutil.which(name, path=getattr(importlib.import_module(name), folder)):
            return found
    return shutil.which(name) or name


def architecture():
    """Return the architecture of the first GPU, such as 90, or an empty text if the driver does not answer."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return printed.split("\n")[0].replace(".", "").strip()


def build_commands():
    """Return the commands that configure and compile the native module, without pip and setuptools.

    They compile for ``LARES_FAST_CUDA_ARCHS``, or else for the GPU of this machine.
    """
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
    """Build the native module into ``package`` within ``seconds``, and return the result of this step."""
    from lares_fast.verify.process import run_command

    began = time.monotonic()
    with log.open("w") as file:
        try:
            for command in build_commands():
                left = began + seconds - time.monotonic()
                if code := run_command(command, seconds=left, out=file, log=file):
                    return result("failed", began, f"{Path(command[0]).name} ended with exit code {code}: see build.log")
                if code is None:
                    return result("hung", began, f"the build took more than {seconds:.0f} s")
            (module,) = (WORK / "build").glob("_C.*.so")
        except (ImportError, OSError, ValueError) as error:
            file.write(f"{type(error).__name__}: {error}\n")
            return result("failed", began, str(error))
    # The steps that need the module start after this function has returned.
    shutil.copy2(module, package)
    write_build_info(package, native=True, reason="")
    return result("passed", began)


def result(status, began, log=""):
    return {"status": status, "seconds": round(time.monotonic() - began, 1), **({"log": log} if log else {})}


def installed():
    """Return the result of the step "build" in a rehearsal: whether the installed package has its native module."""
    from lares_fast import _native

    there, why = _native.available()
    return {"status": "passed" if there else "failed", "seconds": 0, **({} if there else {"log": why})}


def checks(steps, report, built, *, rehearse, jobs, began, ends):
    """Run the checks. Steps that need no native module start at once, the other steps when ``built`` is set."""
    from lares_fast.verify import gpu_run

    limits = gpu_run.Limits(ends["checks"], jobs, began + ends["checks"])
    native = {name: step for name, step in steps.items() if step.native}
    plain = {name: step for name, step in steps.items() if not step.native}
    at_once = start(gpu_run.run_steps, plain, report, limits, rehearse=rehearse)
    if rehearse:
        # A rehearsal has few cores, so the native steps wait.
        at_once.join()
    while not built.wait(0.5):
        if machine_failed(report.found):
            break
    if report.found["build"]["status"] != "passed":
        for name in native:
            report.put(name, {"status": "not reached", "why": "the native module was not built: see build.log"})
    elif not machine_failed(report.found):
        gpu_run.run_steps(native, report, limits, rehearse=rehearse)
    at_once.join()


def start(call, *arguments, **how):
    """Run this call in a thread. The main thread reports an interruption, so this thread ends silently."""

    def run():
        with contextlib.suppress(KeyboardInterrupt):
            call(*arguments, **how)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def machine_failed(found):
    """Return whether one of the first steps, which check the machine itself, failed or hung."""
    from lares_fast.verify.gpu_plan import FIRST

    return any(found[name]["status"] in ("failed", "hung") for name in FIRST if name in found)


def speed(names, report, out, end, rehearse):
    """Run the rows ``names`` until ``end``, alone on the GPU, and put their results into ``report``."""
    from lares_fast.gpu_bench import bench, rows

    listener = bench.Listener(
        machine=lambda machine: None,
        begin=lambda name: report.put(f"{ROW}{name}", {"status": "begun"}),
        stage=lambda what: None,
        end=lambda name, result: report.put(f"{ROW}{name}", {"title": rows.ROWS[name].title, **result}),
    )
    how = bench.Bench(out / "logs.txt", rehearse=rehearse, end=end)
    how.run({name: rows.ROWS[name] for name in names}, listener)


def tables(found):
    """Return the table of the steps, and the table of the rows with their times."""
    from lares_fast.gpu_bench import table
    from lares_fast.verify import gpu_report

    rows = {name.removeprefix(ROW): one for name, one in found.items() if name.startswith(ROW)}
    steps = gpu_report.table({name: one for name, one in found.items() if not name.startswith(ROW)})
    return f"{steps}\n\n{table.text_of({}, rows)}"


def heading(found, commit):
    """Return the lines about the machine and the software."""
    machine = found.get("machine", {})
    cards = ", ".join(gpu["name"] for gpu in machine.get("gpus", ())) or machine.get("gpu", "unknown")
    about = {"card": cards, **{name: machine.get(name, "unknown") for name in ("date", "driver", "torch", "triton", "python")}}
    about |= {"commit": commit, "command": shlex.join(["python", "benchmarks/gpu/first.py", *sys.argv[1:]])}
    return "\n".join(f"{name}: {value}" for name, value in about.items())


def checked_out():
    """Return the commit of the sources, or ``unknown`` if git cannot tell it."""
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def arguments(argv):
    parser = argparse.ArgumentParser(description="The first run on a GPU: build, check and time.")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder of the results; created if needed")
    parser.add_argument("--total", metavar="SECONDS", type=float, help=f"time limit of everything (default: {TOTAL})")
    parser.add_argument("--jobs", metavar="N", type=int, help="checks that run at a time (default: 10; 2 in a rehearsal)")
    parser.add_argument("--only", metavar="NAME", nargs="+", help="run only these steps, rows or groups; or failed REPORT")
    parser.add_argument("--commit", help="commit of the sources, if git cannot tell it")
    parser.add_argument("--rehearse", action="store_true", help="run on the CPU, with the installed package")
    given = parser.parse_args(argv)
    for name in ("total", "jobs"):
        if (value := getattr(given, name)) is not None and not value > 0:
            parser.error(f"--{name} must be greater than 0, but got {value:g}")
    return given


def main(argv=None):
    began, given = time.monotonic(), arguments(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    package = None if given.rehearse else assemble()
    # The package is on the path only now.
    from lares_fast._errors import InputError
    from lares_fast._files import open_log, write_text
    from lares_fast.cli.console import notice
    from lares_fast.verify import gpu_plan, gpu_report
    from lares_fast.verify.process import leaving_no_processes

    steps = gpu_plan.plan(rehearse=given.rehearse, quick=given.rehearse)
    try:
        names = gpu_plan.chosen(given.only, ["build", *steps, *(f"{ROW}{name}" for name in ROWS)])
        before = gpu_report.read(Path(given.only[1])) if given.only and given.only[0] == "failed" else {}
    except InputError as error:
        sys.exit(f"first.py: {error}")
    ends = phases(given.total or (REHEARSAL if given.rehearse else TOTAL), given.rehearse)
    # Every report describes the machine and the build.
    names_in_report = dict.fromkeys(["build", "machine", *names])
    report = gpu_report.Report(given.out / "results.json", names_in_report, before, tell=notice)
    built = threading.Event()

    def make():
        try:
            log, left = given.out / "build.log", began + ends["build"] - time.monotonic()
            report.put("build", installed() if given.rehearse else build(package, left, log))
        finally:
            built.set()

    with leaving_no_processes():
        start(make)
        chosen = {name: step for name, step in steps.items() if name == "machine" or name in names}
        jobs = given.jobs or (2 if given.rehearse else 10)
        checks(chosen, report, built, rehearse=given.rehearse, jobs=jobs, began=began, ends=ends)
        chosen_rows = [name for name in ROWS if f"{ROW}{name}" in names]
        if not machine_failed(report.found):
            speed(chosen_rows, report, given.out, began + ends["speed"], given.rehearse)
    found = report.found
    text = f"{heading(found, given.commit or checked_out())}\n\n{tables(found)}\n"
    write_text(given.out / "table.txt", text)
    with open_log(given.out / "logs.txt") as logs:
        logs.writelines(f"\n== {name}\n{one['log']}\n".encode() for name, one in found.items() if "log" in one)
    print(f"{text}\n{time.monotonic() - began:.0f} s in all")
    return int(not all(gpu_report.is_well(found[name]) for name in report.found))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        # The results so far are in the folder.
        sys.exit(130)
