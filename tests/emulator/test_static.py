"""What nvcc makes of the CUDA sources: registers, spills and instructions."""

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
# Of a multiprocessor, and threads of a block: those of topk_merge at most.
FILE_OF_REGISTERS, THREADS = 65_536, {"topk_merge": 512}


def planned(name):
    """Blocks a multiprocessor that the launcher counts on."""
    if name == "topk_merge":
        return 2
    (blocks,) = re.findall(r"BLOCKS_A_MULTIPROCESSOR = (\d+);", (ROOT / "csrc/catalog/plan.h").read_text())
    return int(blocks)


def find(name):
    """A CUDA program: on PATH, in the usual folder, or from its package."""
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
    """topk_scan<true> of _ZN10lares_fast9topk_scanILb1EEEvNS_8TopkScanE."""
    name, plain = re.match(r"_ZN10lares_fast\d+(topk_scan|topk_merge|rank_count)(?:ILb([01])E)?", symbol).groups()
    return name + ("" if plain is None else f"<{('false', 'true')[int(plain)]}>")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(log of ptxas, fat binary) of each source, compiled as CMake does."""
    folder, results = tmp_path_factory.mktemp("fatbin"), []
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    for source in ("topk/topk_cuda", "target_rank/target_rank_cuda"):
        to = folder / f"{Path(source).name}.fatbin"
        arguments = ("-O3", "-std=c++17", f"-I{ROOT / 'csrc'}", "-Xptxas=-v", "--threads=2", *codes)
        log = output(
            find("nvcc"),
            *arguments,
            "-gencode=arch=compute_80,code=compute_80",
            "-fatbin",
            "-o",
            to,
            ROOT / "csrc" / f"{source}.cu",
        )
        results.append((log, to))
    return results


def test_nothing_spills_and_registers_allow_the_blocks_that_are_planned(compiled):
    seen = set()
    for log, _ in compiled:
        for part in log.split("Compiling entry function")[1:]:
            symbol, arch = re.match(r" '(\w+)' for 'sm_(\d+)'", part).groups()
            stack, stores, loads = map(
                int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", part).groups()
            )
            registers = int(re.search(r"Used (\d+) registers", part).group(1))
            name = kernel(symbol)
            assert (stack, stores, loads) == (0, 0, 0), f"{name} for sm_{arch}"
            # A warp's registers are given out by 256.
            block = -(-registers // 8) * 8 * THREADS.get(name, 128)
            assert FILE_OF_REGISTERS // block >= planned(name), f"{name} for sm_{arch} has {registers} registers"
            assert " bytes smem" not in part, f"{name} for sm_{arch} has static shared memory"
            seen.add((name, arch))
    assert seen == {(name, arch) for name in KERNELS for arch in ARCHS}


def test_products_are_tensor_core_instructions(compiled):
    seen = set()
    for _, file in compiled:
        for image in output(find("cuobjdump"), "-sass", file).split("Fatbin elf code")[1:]:
            arch = re.search(r"arch = sm_(\d+)", image).group(1)
            for part in image.split("Function : ")[1:]:
                name = kernel(part.split()[0])
                tensor = len(re.findall(r"\bHMMA\.1688\.F32\.TF32\b", part))
                # Two blocks of 16 queries, eight of 8 items, three products; the loop over dimensions is not unrolled.
                assert tensor == (48 if name in TENSOR else 0), f"{name} for sm_{arch}"
                assert not re.search(r"\b(LDL|STL)\b", part), f"{name} for sm_{arch} uses local memory"
                assert ("LDGSTS" in part) == (name != "topk_merge"), f"{name} for sm_{arch}"
                seen.add((name, arch))
    assert seen == {(name, arch) for name in KERNELS for arch in ARCHS}


@pytest.mark.parametrize("arch", ["86", "103", "110", "121"])
def test_the_ptx_serves_devices_without_an_image(compiled, arch, tmp_path):
    for _, file in compiled:
        output(find("cuobjdump"), "-xptx", "all", file, cwd=tmp_path)
    found = sorted(tmp_path.glob("*.ptx"))
    assert len(found) == len(compiled)
    for file in found:
        output(find("ptxas"), f"-arch=sm_{arch}", file, "-o", tmp_path / "image.cubin")
