"""The cases of the part ``threads``, which run in a process of their own: forks, other processes, limits and signals."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch

from lares_fast._errors import InputError
from tests.reliability.thread_calls import CALLS, all_digests, digest, prepare

# Seconds after which a child counts as hung. The machine may be very busy.
LIMIT = 120.0
DONE = 7


def tell(what: str, *, failed: str = "", lost: bool = False, number: int = 1) -> None:
    """Print that ``number`` tries of the kind ``what`` were made, and what failed."""
    print(json.dumps({"what": what, "number": number, "failed": failed, "lost": lost}), flush=True)


def require(holds: bool, text: str) -> None:
    """Raise :class:`AssertionError` unless ``holds``."""
    if not holds:
        raise AssertionError(text)


def forked(work: Callable[[], None], *, limit: float = LIMIT) -> str:
    """Run ``work`` in a forked child, and return "" or what went wrong there."""
    with tempfile.TemporaryFile("w+") as log:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.dup2(log.fileno(), 2)
                work()
                status = DONE
            except BaseException:
                traceback.print_exc(file=log)
                log.flush()
            finally:
                os._exit(status)
        pid = polls = 0
        # Polls are counted, because the time also passes while the machine is suspended.
        while not pid:
            pid, status = os.waitpid(child, os.WNOHANG)
            if polls * 0.005 > limit:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return f"hung for {limit:.0f} s"
            polls += 1
            time.sleep(0.005)
        code = os.waitstatus_to_exitcode(status)
        log.seek(0)
        return "" if code == DONE else f"exit code {code}: {log.read()[-400:]}"


def same_as(expected: dict[str, str], threads: int | None = None) -> None:
    """Make each call, and raise :class:`AssertionError` if a bit differs from ``expected``."""
    for name, call in CALLS.items():
        require(digest(call(threads)) == expected[name], f"{name} differs")


def forks(what: str, number: int, expected: dict[str, str]) -> None:
    """Fork ``number`` children, each of which makes each call on another number of threads."""
    for i in range(number):
        problem = forked(lambda i=i: same_as(expected, i % 3 + 1))  # type: ignore[misc]
        tell(what, failed=problem, lost="differs" in problem)


def fork_before_use(number: int) -> dict[str, str]:
    """Compare the results of children of a process that has made no call, and return their common digests."""
    found: list[dict[str, str]] = []
    for _ in range(number):
        with tempfile.NamedTemporaryFile("r") as file:
            problem = forked(lambda name=file.name: _write(name, all_digests()))  # type: ignore[misc]
            if not problem:
                found.append(json.load(file))
                problem = "" if found[-1] == found[0] else "two children differ"
        tell("forks before the first call", failed=problem, lost="differ" in problem)
    return found[0]


def _write(name: str, value: object) -> None:
    with open(name, "w") as file:
        json.dump(value, file)


def python_threads(number: int, expected: dict[str, str]) -> None:
    """Make ``number`` calls from 8 Python threads, each of which changes its number of threads before each call."""
    problems: list[str] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(number // 8):
            torch.set_num_threads(rng.randint(1, 4))
            name = rng.choice(list(expected))
            try:
                if digest(CALLS[name](None)) != expected[name]:
                    problems.append(f"{name} differs")
            except Exception as error:
                problems.append(f"{name}: {error!r}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        torch.set_num_threads(random.randint(1, 4))
        time.sleep(0.001)
    torch.set_num_threads(1)
    what = "calls from 8 Python threads"
    for problem in problems:
        tell(what, failed=problem, lost="differs" in problem, number=0)
    tell(what, number=number // 8 * 8)


def fork_beside_calls(number: int, expected: dict[str, str]) -> None:
    """Fork ``number`` children while three Python threads are inside calls."""
    stop = threading.Event()

    def work(seed: int) -> None:
        rng = random.Random(seed)
        while not stop.is_set():
            CALLS[rng.choice(list(CALLS))](rng.randint(1, 3))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    try:
        forks("forks while 3 threads are inside calls", number, expected)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def processes(method: str, expected: dict[str, str], number: int) -> None:
    """Make all calls ``number`` times in two processes that multiprocessing starts by ``method``."""
    what = f"multiprocessing: {method}"
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method)) as pool:
        for answer in [pool.submit(all_digests) for _ in range(number)]:
            try:
                found = answer.result(timeout=4 * LIMIT)
                tell(what, failed="" if found == expected else "a result differs", lost=found != expected)
            except Exception as error:
                tell(what, failed=repr(error))


class Dataset(torch.utils.data.Dataset[int]):
    """Element i is 1 if all calls have the expected bits in the worker."""

    def __init__(self, expected: dict[str, str], number: int) -> None:
        self.expected = expected
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, place: int) -> int:
        return int(all_digests() == self.expected)


def data_loader(expected: dict[str, str], number: int) -> None:
    """Make all calls in the forked workers of a DataLoader, ``number`` times."""
    loader = torch.utils.data.DataLoader(
        Dataset(expected, number), num_workers=2, multiprocessing_context="fork", timeout=LIMIT
    )
    for right in loader:
        tell("workers of a DataLoader", failed="" if int(right) else "a result differs", lost=not int(right))


def without_new_threads(expected: dict[str, str]) -> None:
    """Make each call on 4 threads where the system grants no new thread."""

    def work() -> None:
        if os.geteuid() == 0:
            # The limit does not count for root.
            os.setgid(54321)
            os.setuid(54321)
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
        try:
            threading.Thread(target=int).start()
        except RuntimeError:
            same_as(expected, 4)
            return
        raise AssertionError("the limit of the number of threads has no effect here")

    problem = forked(work)
    tell("no new thread is granted", failed=problem, number=len(CALLS), lost="differs" in problem)


def _vm_size() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def without_memory(name: str, more: int, expected: dict[str, str]) -> None:
    """Make one call on 3 threads where ``more`` bytes of memory are left. It may only refuse or give the right result."""

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (_vm_size() + more, resource.RLIM_INFINITY))
        try:
            results = CALLS[name](3)
        except (InputError, MemoryError):
            return
        except RuntimeError as error:
            # PyTorch cannot allocate an output.
            require("memory" in str(error), repr(error))
            return
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        require(digest(results) == expected[name], f"{name} differs")

    problem = forked(work)
    tell("no memory is left", failed=f"{name} with {more} bytes: {problem}" if problem else "", lost="differs" in problem)


def interrupted(after: float, expected: dict[str, str]) -> None:
    """Interrupt calls by SIGINT ``after`` so many seconds, and make all calls again."""

    def work() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        timer = threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            while True:
                for call in CALLS.values():
                    call(2)
        except KeyboardInterrupt:
            same_as(expected)

    problem = forked(work)
    tell("Ctrl-C during calls", failed=problem, lost="differs" in problem)


def planted(expected: dict[str, str]) -> None:
    """Check that a wrong result, a child that hangs and a child that crashes are noticed."""
    wrong = dict.fromkeys(expected, "another digest")
    for sign, problem in [
        ("differs", forked(lambda: same_as(wrong))),
        ("hung", forked(lambda: time.sleep(600), limit=0.5)),
        ("exit code -6", forked(os.abort)),
    ]:
        tell("planted faults are noticed", failed="" if sign in problem else f"{sign} is missing in {problem!r}")


def main(quick: bool) -> None:
    """Run all cases. Those that need a process without a call come first."""
    # No thread of PyTorch is started, because its threads do not survive a fork.
    torch.set_num_threads(1)
    rng = random.Random(1)
    prepare()
    expected = fork_before_use(2 if quick else 50)
    for _ in range(2 if quick else 60):
        for name in CALLS:
            without_memory(name, rng.choice([0, 10_000, 100_000, 1_000_000, 3_000_000, 10_000_000, 40_000_000]), expected)
    planted(expected)
    forks("forks after use", 2 if quick else 100, all_digests())
    for _ in range(1 if quick else 10):
        without_new_threads(expected)
    for _ in range(2 if quick else 60):
        interrupted(rng.uniform(0.0, 0.2), expected)
    data_loader(expected, 2 if quick else 40)
    for method in ["fork"] if quick else ["fork", "spawn", "forkserver"]:
        processes(method, expected, 2 if quick else 20)
    python_threads(160 if quick else 12_000, expected)
    fork_beside_calls(4 if quick else 200, expected)


if __name__ == "__main__":
    main(sys.argv[1:] == ["--quick"])
