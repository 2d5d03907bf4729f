"""The house rules of docs/architecture.md, read from the sources."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEAVES = {"_errors", "_numbers", "_settings", "_random", "_transfer", "_watch", "config"}
LEAVES |= {"_native", "_native_call", "_native_random"}

# Room -> rooms of lares_fast that it may import, besides itself. A room is a module or a package right below lares_fast.
MAY_IMPORT = {
    "_errors": set(),
    "_settings": {"_errors"},
    "_numbers": {"_errors"},
    "_random": set(),
    "_transfer": set(),
    "_watch": set(),
    "_native": {"_errors", "_settings", "_random"},
    "_native_call": {"_errors", "_native"},
    "_native_random": {"_errors", "_native_call", "_random"},
    "config": {"_errors", "_numbers"},
    "sequences": {"_errors", "_numbers", "_transfer"},
    "reference": {"_errors", "_numbers", "_random", "_transfer", "config", "sequences"},
    "_modules": LEAVES | {"reference"},
    "_dispatch": LEAVES,
    "_library": LEAVES,
    "ops": LEAVES | {"reference", "sequences", "_dispatch", "_library", "kernels"},
    "catalog": LEAVES | {"reference", "sequences", "ops"},
    "convert": LEAVES | {"reference"},
    "model": LEAVES | {"reference", "sequences", "catalog", "ops", "_dispatch", "_modules"},
    "verify": LEAVES | {"reference", "sequences", "ops", "model", "_dispatch", "kernels"},
    "data": LEAVES | {"sequences"},
    "train": LEAVES | {"reference", "sequences", "catalog", "ops", "model", "data"},
    "serve": LEAVES | {"reference", "sequences", "catalog", "ops", "model", "data", "train"},
    "cli": LEAVES
    | {"reference", "sequences", "catalog", "ops", "model", "data", "train", "serve", "verify", "_dispatch", "convert"},
    "kernels": {"_settings"},
}
# The package itself loads every public module on first use, and its __main__ calls the command line.
ROOTS = {"__init__", "__main__"}
# Third-party packages that a room may import at module level. The rest is imported where it is used.
CORE = {"torch", "numpy", "safetensors"}
PACKAGES = {"reference": {"torch"}, "kernels": {"numpy", "torch", "triton"}, "_random": {"torch"}}
# ops/_triton.py loads this module by its name: it calls the ops, and each kernel waits for its verdict.
PLUG_IN = ("lares_fast.ops._triton", "lares_fast.verify")


def sources():
    for folder in ("lares_fast", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            room = parts[1] if parts[0] == "lares_fast" else "kernels"
            yield path, room


def module_of(path):
    """``lares_fast.ops.topk`` of its file; the folder kernels/ is installed as lares_fast.kernels."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "lares_fast" else ("lares_fast", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = list(sources())
MODULES = {module_of(path): path for path, _ in SOURCES}


def imports(path):
    """(module, whether at module level) for every import, those by ``import_module("...")`` among them."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in inner]
            if node.module == "lares_fast":
                # ``from lares_fast import ops`` names a room, and no name that the package defines.
                names = [name for name in inner if name in MODULES]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in MODULES.keys() - {"lares_fast"}:
            names = [node.value]
        else:
            continue
        for name in names:
            yield name, id(node) in top


@pytest.mark.parametrize(("path", "room"), SOURCES, ids=[str(path.relative_to(ROOT)) for path, _ in SOURCES])
def test_imports_flow_one_way(path, room):
    if room in ROOTS:
        return
    assert room in MAY_IMPORT, f"{path} is in no room of the architecture: add it to docs/architecture.md and here"
    for module, at_top in imports(path):
        package, *rest = module.split(".")
        if package == "lares_fast":
            target = rest[0] if rest else "__init__"
            allowed = target == room or target in MAY_IMPORT[room] or (module_of(path), module) == PLUG_IN
            assert allowed or (room == "cli" and target == "__init__"), f"{room} must not import {module}"
        elif at_top and package not in sys.stdlib_module_names:
            assert package in PACKAGES.get(room, CORE if room != "cli" else {package}), f"{path.name} imports {package}"


def test_no_import_goes_in_circles():
    """Of modules, lazy imports counted; a package's own __init__ is left out, because it only gathers names."""
    graph = {
        name: {target for target, _ in imports(path) if target in MODULES and (name, target) != PLUG_IN} - {name}
        for name, path in MODULES.items()
        if path.name not in ("__init__.py", "__main__.py")
    }
    done, below = set(), []

    def visit(name):
        assert name not in below, f"imports go in a circle: {' -> '.join([*below[below.index(name) :], name])}"
        if name not in done and name in graph:
            below.append(name)
            for target in sorted(graph[name]):
                visit(target)
            below.pop()
            done.add(name)

    for name in graph:
        visit(name)


def test_rooms_have_an_order():
    """The table above has no circle itself."""
    left = {room: set(allowed) for room, allowed in MAY_IMPORT.items()}
    while left:
        free = {room for room, allowed in left.items() if not allowed & left.keys()}
        assert free, f"the rooms {sorted(left)} import each other"
        left = {room: allowed for room, allowed in left.items() if room not in free}


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
    csrc = {path.name for path in (ROOT / "csrc").iterdir() if path.is_dir()} - {"cuda", "random", "simd", "emulator"}
    triton = {path.stem for path in (ROOT / "kernels").glob("[a-z]*.py")}
    assert csrc | triton <= set(STEMS)


def test_environment_variables_are_documented():
    documented = set(re.findall(r"LARES_FAST_\w+", (ROOT / "docs/env.md").read_text()))
    used = set()
    for path in [*(path for path, _ in SOURCES), ROOT / "setup.py"]:
        used |= set(re.findall(r"LARES_FAST_\w+", path.read_text()))
    assert used == documented
    for path, room in SOURCES:
        if room not in ("_settings", "cli", "verify"):
            assert "os.environ" not in path.read_text(), f"{path} reads the environment outside _settings.py"


def test_no_file_is_long():
    for path, _ in SOURCES:
        assert len(path.read_text().splitlines()) <= 400, f"{path} has more than 400 lines"


def test_no_page_holds_both_sides_of_a_merge():
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]:
        assert not re.search(r"^(<{7}|={7}|>{7})( |$)", path.read_text(), re.MULTILINE), f"{path} holds a merge's markers"
