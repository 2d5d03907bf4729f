"""Check the output of nvcc for the CUDA sources: registers, spills and instructions."""

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ARCHS = ("80", "90", "100", "120")
TENSOR = {"topk_scan<false>", "rank_count<false>"}
KERNELS = {*TENSOR, "topk_scan<true>", "rank_count<true>", "topk_merge"}
SOURCES = ("topk/topk_cuda", "target_rank/target_rank_cuda")
# Registers of a multiprocessor, and threads of a block. Other kernels have 128 threads.
REGISTERS, THREADS = 65_536, {"topk_merge": 512}


def planned(name):
    """Return the number of blocks on one multiprocessor that the launch plan assumes."""
    if name == "topk_merge":
        return 2
    (blocks,) = re.findall(r"BLOCKS_A_MULTIPROCESSOR = (\d+);", (ROOT / "csrc/catalog/plan.h").read_text())
    return int(blocks)


def find(name):
    """Find a CUDA program on PATH, in the usual folder, or in its package."""
    package = Path(sysconfig.get_path("purelib")) / "nvidia"
    folders = [None, "/usr/local/cuda/bin", *map(str, package.glob("*/bin"))]
    return next((found for folder in folders if (found := shutil.which(name, path=folder))), None)


pytestmark = [
    pytest.mark.emulator,
    pytest.mark.skipif(find("nvcc") is None, reason="no nvcc"),
    pytest.mark.skipif(
        find("cuobjdump") is None, reason="no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
    ),
]


def output(*command, cwd=None):
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def kernel(symbol):
    """Return the name of a mangled kernel: topk_scan<true> for _ZN10lares_fast9topk_scanILb1EEEvNS_14TopkDeviceScanE."""
    name, plain = re.match(r"_ZN10lares_fast\d+(topk_scan|topk_merge|rank_count)(?:ILb([01])E)?", symbol).groups()
    return name + ("" if plain is None else f"<{('false', 'true')[int(plain)]}>")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Return (log of ptxas, files with the images) of the kernels' sources.

    LARES_FAST_CUDA_BUILD may name a folder that tests/packaging/test_cuda.py has filled: the log and the objects of the wheel.
    Otherwise the sources are compiled here with the options of CMakeLists.txt.
    """
    if folder := os.environ.get("LARES_FAST_CUDA_BUILD"):
        files = [Path(folder) / f"{Path(source).name}.cu.o" for source in SOURCES]
        missing = [file.name for file in (*files, Path(folder) / "build.log") if not file.is_file()]
        assert not missing, (
            f"{folder} lacks {missing[0]}: run tests/packaging/test_cuda.py first, or unset LARES_FAST_CUDA_BUILD"
        )
        return (Path(folder) / "build.log").read_text(), files
    folder, logs, files = tmp_path_factory.mktemp("fatbin"), [], []
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    codes.append("-gencode=arch=compute_80,code=compute_80")
    for source in SOURCES:
        files.append(folder / f"{Path(source).name}.fatbin")
        arguments = ("-O3", "-std=c++17", f"-I{ROOT / 'csrc'}", "-Xptxas=-v", "--threads=2", *codes)
        logs.append(output(find("nvcc"), *arguments, "-fatbin", "-o", files[-1], ROOT / "csrc" / f"{source}.cu"))
    return "".join(logs), files


def test_nothing_spills_and_registers_allow_the_blocks_that_are_planned(compiled):
    seen = set()
    log, _ = compiled
    for part in log.split("Compiling entry function")[1:]:
        symbol, arch = re.match(r" '(\w+)' for 'sm_(\d+)'", part).groups()
        if "image_probe" in symbol:
            continue
        stack, stores, loads = map(int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", part).groups())
        registers = int(re.search(r"Used (\d+) registers", part).group(1))
        name = kernel(symbol)
        assert (stack, stores, loads) == (0, 0, 0), f"{name} for sm_{arch}"
        # Registers are allocated to warps in units of 256.
        block = -(-registers // 8) * 8 * THREADS.get(name, 128)
        assert REGISTERS // block >= planned(name), f"{name} for sm_{arch} has {registers} registers"
        assert " bytes smem" not in part, f"{name} for sm_{arch} has static shared memory"
        seen.add((name, arch))
    assert seen == {(name, arch) for name in KERNELS for arch in ARCHS}


def test_products_are_tensor_core_instructions(compiled):
    seen = set()
    for file in compiled[1]:
        for image in output(find("cuobjdump"), "-sass", file).split("Fatbin elf code")[1:]:
            arch = re.search(r"arch = sm_(\d+)", image).group(1)
            for part in image.split("Function : ")[1:]:
                name = kernel(part.split()[0])
                tensor = len(re.findall(r"\bHMMA\.1688\.F32\.TF32\b", part))
                # Two blocks of 16 queries, eight blocks of 8 items, three products. The loop over dimensions is not unrolled.
                assert tensor == (48 if name in TENSOR else 0), f"{name} for sm_{arch}"
                assert not re.search(r"\b(LDL|STL)\b", part), f"{name} for sm_{arch} uses local memory"
                assert ("LDGSTS" in part) == (name != "topk_merge"), f"{name} for sm_{arch}"
                seen.add((name, arch))
    assert seen == {(name, arch) for name in KERNELS for arch in ARCHS}


@pytest.mark.parametrize("arch", ["86", "103", "110", "121"])
def test_the_ptx_serves_devices_without_an_image(compiled, arch, tmp_path):
    for file in compiled[1]:
        output(find("cuobjdump"), "-xptx", "all", file, cwd=tmp_path)
    found = sorted(tmp_path.glob("*.ptx"))
    assert len(found) == len(SOURCES)
    for file in found:
        output(find("ptxas"), f"-arch=sm_{arch}", file, "-o", tmp_path / "image.cubin")
