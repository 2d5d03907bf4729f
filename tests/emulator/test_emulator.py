"""The CUDA kernels' own sources on the CPU (csrc/emulator): plain, under sanitizers, and with bugs that must be reported."""

import os
import platform
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
FLAGS = [
    "-std=c++17",
    "-O1",
    "-g",
    "-DLARES_EMULATOR",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-ffp-contract=off",
]
SANITIZE = {
    "plain": [],
    "asan": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "tsan": ["-fsanitize=thread"],
}


def build(sources, kind, to):
    """The cases, compiled from the folder ``sources``."""

    def compile(output, *arguments):
        command = ["g++", *FLAGS, f"-I{sources}", *arguments, "-o", str(to / output)]
        done = subprocess.run(command, cwd=sources, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return str(to / output)

    parts = ["emulator/device.cpp", "cuda/plan.cpp"]
    if kind == "tsan":
        # The device itself stays out of TSan's sight.
        parts = [compile("device.o", "-DLARES_EMULATOR_TSAN", "-c", "emulator/device.cpp"), "cuda/plan.cpp"]
    return compile(f"cases_{kind}", *SANITIZE[kind], "emulator/cases.cpp", *parts)


def run(program, suite):
    environ = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([program, suite], capture_output=True, text=True, env=environ, timeout=300)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(("kind", "suite"), [("plain", "all"), ("asan", "all"), ("tsan", "small")])
def test_the_kernels_are_right(kind, suite, tmp_path):
    code, output = run(build(CSRC, kind, tmp_path), suite)
    assert code == 0 and output.endswith("all cases agree\n"), output[-3000:]


# name: (file, text that stands there once, text instead of it, how it is built, what the report must say)
PLANTS = {
    "no barrier before a stage is read and the other one written": (
        "cuda/scores.cuh", "            __syncthreads();\n", "", "tsan", ("data race", "start_copy")),
    "a barrier that some threads skip": (
        "cuda/scores.cuh", "            __syncthreads();\n", "            if (threadIdx.x % 32 || chunk) __syncthreads();\n",
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
        "cuda/scores.cuh", "            finish_copies();\n", "", "plain", ("copies that nobody waited for",)),
    "a result written one place too far": (
        "topk/topk_cuda.cuh", "ids[query * scan.k + at] = ", "ids[query * scan.k + at + 1] = ",
        "asan", ("heap-buffer-overflow", "topk_merge")),
    "a word beyond the end of shared memory": (
        "topk/topk_cuda.cuh", "        waiting()[lane.lane] = 0;\n", "        waiting()[lane.lane + 1] = 0;\n",
        "asan", ("heap-buffer-overflow", "topk_scan")),
    "queries past the last one are read": (
        "cuda/scores.cuh", "first_query + row < s.B ? first_query + row : -1", "first_query + row",
        "asan", ("heap-buffer-overflow", "walk")),
    "a target that is no item is read": (
        "cuda/scores.cuh", "return id < 0 || id >= N ? -1 : id;", "return id < 0 || id >= N + 2000 ? -1 : id;",
        "asan", ("heap-buffer-overflow", "walk")),
    "fragment rows 8 to 15 taken for 0 to 7": (
        "cuda/scores.cuh", "place(first_row + 16 * m + 8 * half + lane.group", "place(first_row + 16 * m + lane.group",
        "plain", ("WRONG", "3xTF32")),
    "columns of the second half of a fragment swapped": (
        "cuda/scores.cuh", "split(q.y, q_high[m][half + 2], q_low[m][half + 2]);",
        "split(q.y, q_high[m][3 - half], q_low[m][3 - half]);", "plain", ("WRONG", "3xTF32")),
    "operands that are not rounded": (
        "cuda/scores.cuh", "low = round_to_tf32(x - __uint_as_float(high));",
        "low = __float_as_uint(x - __uint_as_float(high));",
        "plain", ("not rounded to tf32",)),
    "one of three products left out": (
        "cuda/scores.cuh", "                mma_tf32(step, q_low[m], x_high);\n", "", "plain", ("WRONG: Gaussian",)),
    "a queue that massed ties overrun": (
        "topk/topk_cuda.cuh", "waiting()[lane.lane] > QUEUE - 4)", "waiting()[lane.lane] > QUEUE)",
        "asan", ("heap-buffer-overflow", "Warp::offer")),
    "a tie with the threshold dropped": (
        "topk/topk_cuda.cuh", "!(sums[at] < least && ", "!(sums[at] <= least && ", "plain", ("WRONG",)),
    "the threshold of another query": (
        "topk/topk_cuda.cuh", "__shfl_sync(ALL_LANES, threshold, row);", "__shfl_sync(ALL_LANES, threshold, row ^ 1);",
        "plain", ("WRONG",)),
    "a threshold one place too high": (
        "topk/topk_cuda.cuh", "list(row)[scan.k - 1];", "list(row)[scan.k / 2];", "plain", ("WRONG",)),
    "a warp operation that only some lanes reach": (
        "topk/topk_cuda.cuh", "            const Rank least = __shfl_sync(ALL_LANES, threshold, row);\n",
        "            const Rank least = left ? __shfl_sync(ALL_LANES, threshold, row) : 0;\n",
        "plain", ("EMULATOR: lanes of a warp at different operations",)),
    "the excluded are not left out": (
        "topk/topk_cuda.cuh", "if (rank > least && !excluded(query, item))", "if (rank > least)", "plain", ("WRONG",
        "where none is left")),
    "a target that outranks itself": (
        "target_rank/target_rank_cuda.cuh", "const Items before = call.ties_by_id ? items_before(target_place) : 0;",
        "const Items before = call.ties_by_id ? items_before(target_place + 2) : 0;", "plain", ("WRONG", "rank of query")),
    "an exclusion counted twice": (
        "target_rank/target_rank_cuda.cuh", "__popcll(better & ~__shfl_sync(ALL_LANES, gone, lane.row(i)))",
        "(__popcll(better) - __popcll(better & __shfl_sync(ALL_LANES, gone, lane.row(i))) * 2)",
        "plain", ("WRONG", "without the excluded")),
}  # fmt: skip


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_bug_is_reported(plant, tmp_path):
    file, good, bad, kind, said = PLANTS[plant]
    shutil.copytree(CSRC, tmp_path / "csrc")
    source = (tmp_path / "csrc" / file).read_text()
    assert source.count(good) == 1
    (tmp_path / "csrc" / file).write_text(source.replace(good, bad))
    code, output = run(build(tmp_path / "csrc", kind, tmp_path), "small" if kind == "tsan" else "all")
    assert code != 0, "not reported"
    assert all(words in output for words in said), output[-3000:]
