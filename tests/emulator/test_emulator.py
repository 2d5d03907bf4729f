"""Run the sources of the CUDA kernels on the CPU (csrc/emulator): plain, under sanitizers, and with planted bugs."""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.emulator,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator switches stacks in x86-64 assembly"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
]

CSRC = Path(__file__).parents[2] / "csrc"


def spoil(file, good, bad, to):
    """Write ``file`` of csrc/ with ``bad`` for ``good`` to the folder ``to``. Return it and the kernels with that file."""
    source = (CSRC / file).read_text()
    assert source.count(good) == 1, f"{file} has changed: plant the bug elsewhere"
    (to / file).parent.mkdir(parents=True)
    (to / file).write_text(source.replace(good, bad))
    op = file.split("/")[0]
    return to, ["topk", "target_rank"] if op == "catalog" else [op]


def run(program, suite):
    environ = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([program, suite], capture_output=True, text=True, env=environ, timeout=300)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(("kind", "suite"), [("plain", "all"), ("asan", "all"), ("tsan", "small")])
def test_the_kernels_are_right(kind, suite, program, tmp_path):
    code, output = run(program(kind, tmp_path), suite)
    assert code == 0 and output.endswith("all cases agree\n"), output[-3000:]


ERRORS = """
#include <cstdio>
#include "cuda/errors.h"
int main() {
    for (int error = 0; error < 1100; ++error) if (lares_fast::beyond_use(error)) std::printf("%d\\n", error);
}
"""


def test_failed_calls_are_told_from_an_unusable_device(tmp_path):
    (tmp_path / "errors.cpp").write_text(ERRORS)
    subprocess.run(["g++", f"-I{CSRC}", str(tmp_path / "errors.cpp"), "-o", str(tmp_path / "errors")], check=True)
    done = subprocess.run([tmp_path / "errors"], capture_output=True, text=True, check=True)
    sticky = set(map(int, done.stdout.split()))
    assert sticky >= {214, 220, 226, 700, 702, 710, *range(714, 720), 999}
    # A bad value, no memory, no device, a busy device, an old driver, no image, no cubin, no resources, and a graph capture.
    assert not sticky & {
        0,
        1,
        2,
        9,
        34,
        35,
        36,
        46,
        98,
        100,
        101,
        200,
        209,
        218,
        222,
        400,
        701,
        720,
        801,
        803,
        *range(900, 908),
    }
    header = Path("/usr/local/cuda/include/driver_types.h")
    if header.is_file():
        ends = r"process must be terminated and relaunched"
        told = re.findall(r"/\*\*(.*?)\*/\s*cudaError\w+\s*=\s*(\d+)", header.read_text(), re.DOTALL)
        by_manual = {int(number) for text, number in told if re.search(ends, " ".join(text.replace("*", " ").split()))}
        assert by_manual and by_manual <= sticky


def slow_paths(program):
    """Return (case, op) -> (rounds, scores computed again), for each tile of items and each warp that has queries."""
    code, output = run(program, "counts")
    assert code == 0, output[-3000:]
    lines = re.findall(r"^(.*), (top|ranks): ([\d.]+) rounds, ([\d.]+) scores computed again$", output, re.MULTILINE)
    assert len(lines) == 12
    return {(case, op): (float(rounds), float(again)) for case, op, rounds, again in lines}


def test_queries_that_do_not_exist_and_items_at_minus_infinity_cost_nothing(program, tmp_path):
    found = slow_paths(program("plain", tmp_path))
    rounds, _ = found["B 32", "top"]
    assert 0 < rounds < 12
    assert all(mine <= rounds and again == 0 for mine, again in found.values()), found
    assert all(mine == 0 for (_, op), (mine, _) in found.items() if op == "ranks"), found


SLOW = {
    "items at -inf": ("(lowest_loses ? lowest : 0)", "(lowest_loses ? lowest & 0 : 0)", "B 33 masked"),
    "scores of -inf computed again": ("    if (sum == -INFINITY) return sum;\n", "", "B 33 masked"),
}


@pytest.mark.parametrize("plant", SLOW)
def test_a_planted_slow_path_is_counted(plant, program, tmp_path):
    good, bad, case = SLOW[plant]
    found = slow_paths(program("plain", tmp_path, *spoil("catalog/scores.cuh", good, bad, tmp_path / "spoilt")))
    assert found[case, "top"] > (12, 0) or found[case, "top"][1] > 0, found


# name: (file, text that the file has once, text instead of it, how it is built, what the report must say[, a case])
# A bug that shows late in the suite names the case that finds it, so that the other cases need not run first.
PLANTS = {
    "no barrier before a stage is read and the other one written": (
        "catalog/scores.cuh", "            __syncthreads();\n", "", "tsan", ("data race", "start_copy")),
    "a barrier that some threads skip": (
        "catalog/scores.cuh", "            __syncthreads();\n", "            if (threadIdx.x % 32 || chunk) __syncthreads();\n",
        "plain", ("EMULATOR: deadlock", "scores.cuh")),
    "no __syncwarp before a queue's count is read": (
        "topk/topk_cuda.cuh", "            left &= left - 1;\n            __syncwarp();\n", "            left &= left - 1;\n",
        "tsan", ("data race", "Warp::offer")),
    "no __syncwarp before a list's last rank is read": (
        "topk/topk_cuda.cuh", "        __syncwarp();\n        const Rank last", "        const Rank last",
        "tsan", ("data race", "Warp::flush")),
    "no barrier between the merges of two warps": (
        "topk/topk_cuda.cuh", "        __syncthreads();\n        if (warp < apart", "        if (warp < apart",
        "tsan", ("data race", "merge")),
    "copies that are not waited for": (
        "catalog/scores.cuh", "            finish_copies();\n", "", "plain", ("copies that were not waited for",)),
    "a result written one place too far": (
        "topk/topk_cuda.cuh", "ids[query * scan.k + at] = ", "ids[query * scan.k + at + 1] = ",
        "asan", ("heap-buffer-overflow", "topk_merge")),
    "a word beyond the end of shared memory": (
        "topk/topk_cuda.cuh", "        waiting()[lane.lane] = 0;\n", "        waiting()[lane.lane + 1] = 0;\n",
        "asan", ("heap-buffer-overflow", "topk_scan")),
    "queries past the last one are read": (
        "catalog/scores.cuh", "first_query + row < s.B ? first_query + row : -1", "first_query + row",
        "asan", ("heap-buffer-overflow", "for_each_tile")),
    "queries that do not exist are offered items": (
        "catalog/scores.cuh", ": (1u << ROW_SUMS) - 1;", ": 0;", "asan", ("heap-buffer-overflow", "topk_scan")),
    "an excluded list beyond the ids is read": (
        "catalog/scores.cuh", "to > E || ", "to > E + 1 || ",
        "asan", ("AddressSanitizer",), "offsets out of range"),
    "a query whose list is not valid is answered": (
        "topk/topk_cuda.cuh", "valid ? rank_id(rank) : -1", "rank_id(rank)", "plain",
        ("WRONG", "but its list is not valid"), "excluded ids out of range"),
    "a target that is no item has a rank among them": (
        "target_rank/target_rank_cuda.cuh", "lane.row(i))) all = behind;", "lane.row(i))) all = 0;", "plain",
        ("WRONG: ", "rank of query")),
    "a target that is no item is read": (
        "catalog/scores.cuh", "return id < 0 || id >= N ? -1 : id;", "return id < 0 || id >= N + 2000 ? -1 : id;",
        "asan", ("heap-buffer-overflow", "for_each_tile")),
    "fragment rows 8 to 15 taken for 0 to 7": (
        "catalog/scores.cuh", "place(first_row + 16 * m + 8 * half + lane.group", "place(first_row + 16 * m + lane.group",
        "plain", ("WRONG", "3xTF32"), "warp - 1"),
    "columns of the second half of a fragment swapped": (
        "catalog/scores.cuh", "split(q.y, q_high[m][half + 2], q_low[m][half + 2]);",
        "split(q.y, q_high[m][3 - half], q_low[m][3 - half]);", "plain", ("WRONG", "3xTF32")),
    "operands that are not rounded": (
        "catalog/scores.cuh", "low = round_to_tf32(x - __uint_as_float(high));",
        "low = __float_as_uint(x - __uint_as_float(high));",
        "plain", ("not rounded to tf32",), "Gaussian"),
    "one of three products left out": (
        "catalog/scores.cuh", "                mma_tf32(step, q_low[m], x_high);\n", "", "plain",
        ("WRONG: Gaussian",), "Gaussian"),
    "a queue that overflows with many ties": (
        "topk/topk_cuda.cuh", "waiting()[lane.lane] > QUEUE - 4)", "waiting()[lane.lane] > QUEUE)",
        "asan", ("heap-buffer-overflow", "Warp::offer")),
    "a tie with the threshold dropped": (
        "topk/topk_cuda.cuh", "!(sums[at] < least && ", "!(sums[at] <= least && ", "plain", ("WRONG",), "k of 1"),
    "the threshold of another query": (
        "topk/topk_cuda.cuh", "__shfl_sync(ALL_LANES, threshold, row);", "__shfl_sync(ALL_LANES, threshold, row ^ 1);",
        "plain", ("WRONG",), "warp - 1"),
    "a threshold one place too high": (
        "topk/topk_cuda.cuh", "list(row)[scan.k - 1];", "list(row)[scan.k / 2];", "plain", ("WRONG",)),
    "a warp operation that only some lanes reach": (
        "topk/topk_cuda.cuh", "            const Rank least = __shfl_sync(ALL_LANES, threshold, row);\n",
        "            const Rank least = left ? __shfl_sync(ALL_LANES, threshold, row) : 0;\n",
        "plain", ("EMULATOR: lanes of a warp at different operations",)),
    "excluded items are not left out": (
        "topk/topk_cuda.cuh", "if (rank > least && !excluded(query, item))", "if (rank > least)", "plain", ("WRONG",
        "but no item is left")),
    "a target that outranks itself": (
        "target_rank/target_rank_cuda.cuh", "const Items before = call.ties_by_id ? items_before(target_place) : 0;",
        "const Items before = call.ties_by_id ? items_before(target_place + 2) : 0;", "plain", ("WRONG", "rank of query")),
    "an exclusion counted twice": (
        "target_rank/target_rank_cuda.cuh", "__popcll(better & ~__shfl_sync(ALL_LANES, gone, lane.row(i)))",
        "(__popcll(better) - __popcll(better & __shfl_sync(ALL_LANES, gone, lane.row(i))) * 2)",
        "plain", ("WRONG", "without the excluded items")),
}  # fmt: skip


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_bug_is_reported(plant, program, tmp_path):
    file, good, bad, kind, said, *case = PLANTS[plant]
    suite = case[0] if case else "small" if kind == "tsan" else "all"
    code, output = run(program(kind, tmp_path, *spoil(file, good, bad, tmp_path / "spoilt")), suite)
    assert code != 0, "not reported"
    assert all(words in output for words in said), output[-3000:]
