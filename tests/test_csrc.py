"""The structure of csrc/: includes flow one way, and files are short."""

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"

# Folder -> folders of csrc/ that its files may include, besides its own. Each folder may only include folders above it.
MAY_INCLUDE = {
    "base": set(),
    "emulator": set(),
    "memory": set(),
    "simd": set(),
    "random": {"base"},
    "cuda": {"base", "emulator"},
    "catalog": {"base", "cuda", "simd"},
    "recurrence": {"base", "memory", "random", "simd"},
    "target_rank": {"base", "catalog", "cuda", "memory", "simd"},
    "topk": {"base", "catalog", "cuda", "memory", "simd"},
    "linear_cross_entropy": {"base", "catalog", "memory", "simd", "target_rank"},
    # The bindings and the build information.
    ".": {"base", "catalog", "cuda", "linear_cross_entropy", "random", "recurrence", "simd", "target_rank", "topk"},
}
FILES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh", ".in"))


def includes(path):
    """Yield the folder and the path of each include in quotation marks."""
    for name in re.findall(r'^\s*#\s*include "([^"]+)"', path.read_text(), re.MULTILINE):
        yield str(Path(name).parent), name


def test_the_table_of_folders_has_no_circle():
    folders = list(MAY_INCLUDE)
    for folder, below in MAY_INCLUDE.items():
        assert below <= set(folders[: folders.index(folder)]), f"{folder} comes before a folder that it may include"


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(CSRC)) for path in FILES])
def test_includes_flow_one_way(path):
    folder = str(path.parent.relative_to(CSRC))
    assert folder in MAY_INCLUDE, f"csrc/{folder} is not in the table of folders"
    for target, name in includes(path):
        assert target == folder or target in MAY_INCLUDE[folder], f"csrc/{folder} must not include {name}"
        assert (CSRC / name).is_file(), f"there is no csrc/{name}"


def test_every_permission_is_used():
    used = {folder: set() for folder in MAY_INCLUDE}
    for path in FILES:
        folder = str(path.parent.relative_to(CSRC))
        used[folder] |= {target for target, _ in includes(path)} - {folder}
    assert used == MAY_INCLUDE


def test_no_file_is_long():
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 400, f"{path.name} has more than 400 lines"
