"""The house rules of docs/architecture.md, read from the sources."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEAVES = {"_errors", "_law", "_numbers", "_settings", "_random", "_transfer", "_native", "_cuda", "config"}

# Room -> rooms of lares_fast that it may import, besides itself. What is not listed may not be imported.
MAY_IMPORT = {
    "_errors": set(),
    "_settings": {"_errors"},
    "_law": set(),
    "_numbers": {"_errors"},
    "_random": set(),
    "_transfer": set(),
    "_native": {"_errors", "_random", "_settings"},
    "_cuda": {"_errors", "_native", "_settings"},
    "config": {"_errors", "_numbers"},
    "reference": {"_errors", "_numbers", "_random", "_transfer", "config"},
    "_modules": LEAVES | {"reference"},
    "_dispatch": LEAVES | {"ops"},
    "_library": LEAVES,
    "ops": LEAVES | {"reference", "_dispatch", "_library", "kernels"},
    "convert": LEAVES | {"reference"},
    "model": LEAVES | {"reference", "ops", "_dispatch", "_modules"},
    "data": LEAVES,
    "train": LEAVES | {"reference", "ops", "model", "data"},
    "serve": LEAVES | {"reference", "ops", "model", "data", "train"},
    "kernels": {"_settings"},
}
# Third-party packages that a room may import at module level. The rest is imported where it is used.
CORE = {"torch", "numpy", "safetensors"}
PACKAGES = {"reference": {"torch"}, "kernels": {"numpy", "torch", "triton"}, "_random": {"torch"}}


def sources():
    for folder in ("lares_fast", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            room = parts[1] if parts[0] == "lares_fast" else "kernels"
            yield path, room


def imports(tree, package):
    """(module, whether at module level) for every import statement."""
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            # ``from lares_fast import ops`` names a room; ``from lares_fast.ops import topk`` has it in the module.
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == package else [node.module]
        else:
            continue
        for name in names:
            yield name, id(node) in top


SOURCES = list(sources())


@pytest.mark.parametrize(("path", "room"), SOURCES, ids=[str(path.relative_to(ROOT)) for path, _ in SOURCES])
def test_imports_flow_one_way(path, room):
    if room in ("cli", "__init__", "__main__", "integrations"):
        return  # these may import everything
    assert room in MAY_IMPORT, f"{path} is in no room of the architecture: add it to docs/architecture.md and here"
    for module, at_top in imports(ast.parse(path.read_text()), "lares_fast"):
        package, *rest = module.split(".")
        if package == "lares_fast":
            target = rest[0] if rest else "__init__"
            assert target == room or target in MAY_IMPORT[room], f"{room} must not import {module}"
        elif at_top and package not in sys.stdlib_module_names:
            assert package in PACKAGES.get(room, CORE), f"{path.name} imports {package} at module level"


def test_importing_the_package_is_light():
    heavy = ("triton", "pyarrow", "rich", "matplotlib", "jsonargparse", "yaml", "torch._dynamo")
    code = (
        "import sys, lares_fast; lares_fast.LARES, lares_fast.ops, lares_fast.data, lares_fast.train;"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_every_public_name_exists():
    import lares_fast

    for name in lares_fast.__all__:
        assert getattr(lares_fast, name) is not None


STEMS = sorted(path.stem for path in (ROOT / "lares_fast" / "ops").glob("[a-z]*.py"))


@pytest.mark.parametrize("stem", STEMS)
def test_an_op_is_found_by_its_stem(stem):
    for place in (
        f"lares_fast/reference/{stem}.py",
        f"tests/ops/test_{stem}.py",
        f"benchmarks/bench_{stem}.py",
        f"docs/kernels/{stem}.md",
    ):
        assert (ROOT / place).is_file(), f"op {stem} lacks {place}"
    assert (ROOT / "csrc" / stem).is_dir() or (ROOT / "kernels" / f"{stem}.py").is_file(), f"op {stem} has no kernel"


def test_a_kernel_has_a_stem():
    csrc = {path.name for path in (ROOT / "csrc").iterdir() if path.is_dir()} - {
        "base",
        "catalog",
        "cuda",
        "emulator",
        "memory",
        "random",
        "simd",
    }
    triton = {path.stem for path in (ROOT / "kernels").glob("[a-z]*.py")}
    assert csrc | triton <= set(STEMS)


def test_environment_variables_are_documented():
    documented = set(re.findall(r"LARES_FAST_\w+", (ROOT / "docs/env.md").read_text()))
    used = set()
    for path in [*(path for path, _ in SOURCES), ROOT / "setup.py"]:
        used |= set(re.findall(r"LARES_FAST_\w+", path.read_text()))
    assert used == documented
    for path, room in SOURCES:
        if room not in ("_settings", "cli"):
            assert "os.environ" not in path.read_text(), f"{path} reads the environment outside _settings.py"


def test_no_file_is_long():
    for path, _ in SOURCES:
        assert len(path.read_text().splitlines()) <= 400, f"{path} has more than 400 lines"


def test_no_page_holds_both_sides_of_a_merge():
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]:
        assert not re.search(r"^(<{7}|={7}|>{7})( |$)", path.read_text(), re.MULTILINE), f"{path} holds a merge's markers"
