"""Test the ops of csrc/ without Python: random valid and invalid calls under sanitizers, on aarch64, and with AVX-512.

AVX-512 is emulated on a CPU without it. The tests take minutes, so they run only under ``-m native_cpp``. A test is skipped,
with the reason, if the machine lacks a program that it needs.
"""

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support import native_program
from tests.support.native_program import ROOT

CPUINFO = Path("/proc/cpuinfo")
FLAGS = set(CPUINFO.read_text().split()) if CPUINFO.exists() and platform.machine() in ("x86_64", "AMD64") else set()
HAS_AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"} <= FLAGS
SIMDE = Path("/usr/include/simde/x86/avx512.h")

pytestmark = pytest.mark.native_cpp


def need(*programs):
    if missing := [program for program in programs if shutil.which(program) is None]:
        pytest.skip(f"{' and '.join(missing)} not found")


def build(name, *options, compiler="g++"):
    need("cmake", "ninja", compiler)
    return native_program.build(name, *options, compiler=compiler)


def run(program, level, calls, *, large, callers=1, bug=()):
    """Return (exit code, output) of the program. A sanitizer reports on stderr and ends the process."""
    command = [*program, level, calls, large, callers, 1, *bug]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def check(result, level, calls, callers=1):
    """Check that every call was made at this level and that nothing was reported."""
    code, output = result
    assert code == 0, output[-3000:]
    counts = re.fullmatch(rf"level {level}, (\d+) ops: (\d+) valid, (\d+) invalid\n", output)
    assert counts, output[-3000:]
    ops, valid, invalid = map(int, counts.groups())
    assert valid + invalid == ops * calls * callers
    assert min(valid, invalid) > 0.4 * (valid + invalid)


def levels():
    """Return the levels that this CPU has, and AVX-512 if it can be emulated on AVX2."""
    if not {"avx2", "fma"} <= FLAGS:
        return ["generic"]
    return ["generic", "avx2", *(["avx512", "avx512vnni", "amx"] if HAS_AVX512 or SIMDE.exists() else [])]


class Results:
    """The results of ``work(key)``, computed for two keys at a time.

    A worker of pytest-xdist computes only the results that its own tests ask for.
    """

    def __init__(self, pool, work, keys):
        self.work = work
        self.started = {} if "PYTEST_XDIST_WORKER" in os.environ else {key: pool.submit(work, key) for key in keys}

    def __getitem__(self, key):
        return self.started[key].result() if key in self.started else self.work(key)


@pytest.fixture(scope="module")
def pool():
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def checked():
    # With sanitizers -O3 compiles ten times as long as -O1.
    flags = ["-DOPTIMISE=-O1", "-DCMAKE_CXX_FLAGS=-fsanitize=address,undefined -fno-sanitize-recover=all -g1"]
    return build("address", *flags, f"-DAVX512_BY_SIMDE={'avx512' in levels() and not HAS_AVX512}")


# Only topk and its index have code for avx512vnni, and only the recurrence has code for amx.
CALLS = {"generic": 3_000, "avx2": 3_000, "avx512": 3_000, "avx512vnni": 1_000, "amx": 1_000}


@pytest.fixture(scope="module")
def fuzzed(checked, pool):
    return Results(pool, lambda level: run(checked, level, CALLS[level], large=400), levels())


@pytest.mark.parametrize("level", CALLS)
def test_fuzz_under_address_and_undefined_behaviour_sanitizers(level, fuzzed):
    if level not in levels():
        pytest.skip(f"this machine has neither {level} nor libsimde-dev on a CPU with AVX2")
    check(fuzzed[level], level, CALLS[level])


def test_hashes_of_results(checked):
    """tests/reliability/hosts.py compares the hashes that the program prints on two kinds of CPU."""
    code, output = run(checked, "generic", 20, large=0, bug=["bits"])
    assert code == 0, output
    assert len(output.split()) == 10


def run_kind(program, kind, calls):
    """Return (exit code, output) of calls that choose their level themselves."""
    done = subprocess.run([*program, kind, str(calls), "1"], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_calls_of_random_bytes(checked):
    """The target of libFuzzer works, as tests/reliability/fuzz_native.py needs it."""
    assert run_kind(checked, "bytes", 500) == (0, "bytes: 500 calls\n")


def test_a_forked_child_can_take_memory_from_the_pool(checked):
    assert run_kind(checked, "forks", 200) == (0, "forks: 200 calls\n")


@pytest.mark.parametrize(
    ("bug", "report"),
    [
        ("ties", "and should"),
        *((output, f": {output}[") for output in ("logprob", "d_hidden", "d_items")),
        ("read", "AddressSanitizer"),
    ],
)
def test_a_planted_bug_ends_the_program(bug, report, checked):
    code, output = run(checked, levels()[-1], 300, large=0, bug=[bug])
    assert code != 0
    assert report in output


def test_a_pool_without_care_for_forks_is_found(checked, tmp_path):
    text = "pthread_atfork([] { mutex.lock(); }, [] { mutex.unlock(); }, [] { mutex.unlock(); })"
    source = (ROOT / "csrc" / "memory" / "pool.cpp").read_text()
    assert source.count(text) == 1, "pool.cpp has changed: plant the bug elsewhere"
    (tmp_path / "pool.cpp").write_text(source.replace(text, "0"))
    link(checked, tmp_path, tmp_path / "pool.cpp", ROOT / "csrc", "pool.cpp.o")
    code, output = run_kind([tmp_path / "native_tests"], "forks", 20_000)
    assert code == 1
    assert "waits for the lock" in output


# name: (file of csrc/recurrence, text that the file has once, text instead of it)
PLANTS = {
    "a LayerNorm whose gradient lacks a term": (
        "rows.h",
        "fma(xhat, broadcast(slope[i]), broadcast(mean[i]))",
        "broadcast(mean[i])",
    ),
    "the mask of other columns": (
        "dropout.h",
        "static_cast<std::uint32_t>(p / 4) << 3",
        "static_cast<std::uint32_t>(p / 4 + 1) << 3",
    ),
    "the mask of other keys": ("dropout.h", "quad | key_tile << 16", "quad | (key_tile + 1) << 16"),
    "a sequence that begins one token early": ("plan.cpp", "push_back({first,", "push_back({first - (b > 0),"),
    "rows that GELU leaves out": ("product.h", "after(panel + n, done, end - done)", "after(panel + n, done, rows)"),
    "another dropout site": (
        "forward.h",
        "l.down_bias, site(AFTER_FEED_FORWARD,",
        "l.down_bias, site(AFTER_ATTENTION,",
    ),
    "a row that is not written": (
        "block.h",
        "put(s.start, s.length, s.out, false)",
        "put(s.start, s.length - 1, s.out, false)",
    ),
    "the token before the last instead of the last": (
        "block.h",
        "(block.sequences[i].start + block.sequences[i].length - 1)",
        "(block.sequences[i].start + (block.sequences[i].length - 1) / 2)",
    ),
    "a query that sees the next token": ("attention.h", "first_lanes(query + r + 1 - key)", "first_lanes(query + r + 2 - key)"),
}


def run_with_plant(bug, checked, folder):
    """Build the program with ``bug`` in it, and :func:`run` it."""
    name, text, instead = PLANTS[bug]
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    file = folder / "csrc" / "recurrence" / name
    assert file.read_text().count(text) == 1, f"{name} has changed: plant the bug elsewhere"
    file.write_text(file.read_text().replace(text, instead))
    spoilt = "plan.cpp" if name == "plan.cpp" else "recurrence_kernel.cpp"
    target = "native_tests.dir" if name == "plan.cpp" else "lares_fast_generic.dir"
    link(checked, folder, file.parent / spoilt, folder / "csrc", f"{target}/csrc/recurrence/{spoilt}.o")
    return run([folder / "native_tests"], "generic", 300, large=0)


def link(program, folder, source, include, instead):
    """Build ``program`` in ``folder`` with ``source`` instead of its object whose path ends with ``instead``."""
    objects = [x for x in Path(program[0]).parent.rglob("*.o") if not str(x).endswith(instead)]
    flags = ["-std=c++17", "-ffp-contract=off", "-DLARES_INSTRUCTION_SET=generic", f"-I{include}"]
    # The wrong results show without sanitizers and optimisation, which would take most of the time.
    for command in (
        ["g++", *flags, "-c", source, "-o", folder / "spoilt.o"],
        ["g++", "-fsanitize=address,undefined", folder / "spoilt.o", *objects, "-pthread", "-o", folder / "native_tests"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def planted(checked, pool, tmp_path_factory):
    return Results(pool, lambda bug: run_with_plant(bug, checked, tmp_path_factory.mktemp("plant")), PLANTS)


@pytest.mark.parametrize("bug", PLANTS)
def test_a_bug_planted_in_the_recurrence_is_found(bug, planted):
    code, output = planted[bug]
    assert code != 0
    assert re.search(r"recurrence, .* and should be", output), output[-3000:]


@pytest.fixture(scope="module")
def raced():
    need("cmake", "ninja", "g++")
    return native_program.build_thread_program()


@pytest.mark.parametrize("level", ["generic", "avx2"])
def test_several_threads_under_the_thread_sanitizer(level, raced):
    if level not in levels():
        pytest.skip(f"this CPU has no {level}")
    check(run(raced, level, 12, large=6, callers=8), level, 12, callers=8)


def test_a_planted_race_is_reported(raced):
    code, output = run(raced, "generic", 0, large=0, bug=["race"])
    assert code != 0
    assert "ThreadSanitizer: data race" in output


def test_aarch64():
    need("qemu-aarch64")
    target = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", "-DCMAKE_EXE_LINKER_FLAGS=-static"]
    program = ["qemu-aarch64", *build("aarch64", *target, compiler="aarch64-linux-gnu-g++")]
    check(run(program, "generic", 300, large=100), "generic", 300)
    assert run(program, "generic", 300, large=0, bug=["ties"])[0] != 0
