"""The rules of docs/architecture.md, checked against the sources."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEAVES = {"_errors", "_files", "_numbers", "_settings", "_random", "_transfer", "_watch", "config"}
LEAVES |= {"_native", "_native_call", "_native_random", "_memory", "_torch_state", "_finite", "_tensors"}

# Part -> parts of lares_fast that it may import, besides itself. A part is a module or a package right below lares_fast.
MAY_IMPORT = {
    "_errors": set(),
    "_files": {"_errors"},
    "_settings": {"_errors"},
    "_numbers": {"_errors"},
    "_memory": {"_errors"},
    "_torch_state": {"_errors"},
    "_random": {"_errors", "_numbers", "_transfer"},
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
    "_library": LEAVES | {"_dispatch"},
    "ops": LEAVES | {"reference", "sequences", "_dispatch", "_library", "kernels"},
    "catalog": LEAVES | {"reference", "sequences", "ops"},
    "convert": LEAVES | {"reference"},
    "_finite": {"_errors"},
    "_tensors": set(),
    "_weights": LEAVES | {"reference"},
    "_model_folder": LEAVES | {"_weights"},
    "model": LEAVES | {"_weights", "_model_folder", "reference", "sequences", "catalog", "ops", "_dispatch", "_modules"},
    "verify": LEAVES | {"reference", "sequences", "ops", "model", "_dispatch", "kernels"},
    "data": LEAVES | {"sequences"},
    "_device": LEAVES | {"ops", "_dispatch"},
    "train": LEAVES
    | {
        "_weights",
        "_model_folder",
        "reference",
        "sequences",
        "catalog",
        "ops",
        "model",
        "data",
        "_dispatch",
        "_device",
        "_modules",
    },
    "serve": LEAVES
    | {"_weights", "_model_folder", "reference", "sequences", "catalog", "ops", "model", "data", "train", "_device"},
    "gpu_bench": LEAVES | {"reference", "sequences", "ops", "model", "data", "train", "verify", "kernels"},
    "cli": LEAVES
    | {"reference", "sequences", "catalog", "ops", "model", "data", "train", "serve", "verify", "_dispatch", "_device"}
    | {"convert", "gpu_bench"},
    "kernels": {"_settings"},
}
# The package itself loads every public module on first use, and its __main__ calls the command line.
ROOTS = {"__init__", "__main__"}
# Third-party packages that a part may import at module level. Other packages are imported where they are used.
CORE = {"torch", "numpy"}
PACKAGES = {"reference": {"torch"}, "kernels": {"numpy", "torch", "triton"}, "_random": {"torch"}}
# ops/_triton.py imports the package `verify` by its name, because `verify` itself calls the ops for the self-tests of kernels.
PLUG_IN = ("lares_fast.ops._triton", "lares_fast.verify")


def sources():
    for folder in ("lares_fast", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            part = parts[1] if parts[0] == "lares_fast" else "kernels"
            yield path, part


def module_of(path):
    """Return a file's module, such as ``lares_fast.ops.topk``. The folder kernels/ is installed as lares_fast.kernels."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "lares_fast" else ("lares_fast", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = list(sources())
MODULES = {module_of(path): path for path, _ in SOURCES}


def imports(path):
    """Yield (module, whether at module level) for every import, also for those by ``import_module("...")``."""
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
                # ``from lares_fast import ops`` names a module. Other names that the package defines are no modules.
                names = [name for name in inner if name in MODULES]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in MODULES.keys() - {"lares_fast"}:
            names = [node.value]
        else:
            continue
        for name in names:
            yield name, id(node) in top


@pytest.mark.parametrize(("path", "part"), SOURCES, ids=[str(path.relative_to(ROOT)) for path, _ in SOURCES])
def test_imports_flow_one_way(path, part):
    if part in ROOTS:
        return
    assert part in MAY_IMPORT, f"{path} is in no part of the architecture: add it to docs/architecture.md and to MAY_IMPORT"
    for module, at_top in imports(path):
        package, *rest = module.split(".")
        if package == "lares_fast":
            target = rest[0] if rest else "__init__"
            allowed = target == part or target in MAY_IMPORT[part] or (module_of(path), module) == PLUG_IN
            assert allowed or (part == "cli" and target == "__init__"), f"{part} must not import {module}"
        elif at_top and package not in sys.stdlib_module_names:
            assert package in PACKAGES.get(part, CORE if part != "cli" else {package}), f"{path.name} imports {package}"


def test_no_import_goes_in_circles():
    """No module imports itself through others. Lazy imports count. The __init__ of a package, which gathers names, does not."""
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


def test_parts_have_an_order():
    """The table MAY_IMPORT has no circle."""
    left = {part: set(allowed) for part, allowed in MAY_IMPORT.items()}
    while left:
        free = {part for part, allowed in left.items() if not allowed & left.keys()}
        assert free, f"the parts {sorted(left)} import each other"
        left = {part: allowed for part, allowed in left.items() if part not in free}


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


# Folders of csrc/ that several ops share.
SHARED = {"base", "catalog", "cuda", "emulator", "memory", "random", "simd"}


def test_a_kernel_has_a_stem():
    csrc = {path.name for path in (ROOT / "csrc").iterdir() if path.is_dir()} - SHARED
    triton = {path.stem for path in (ROOT / "kernels").glob("[a-z]*.py")}
    assert csrc | triton <= set(STEMS)


def test_environment_variables_are_documented():
    documented = set(re.findall(r"LARES_FAST_\w+", (ROOT / "docs/env.md").read_text()))
    used = set()
    for path in [*(path for path, _ in SOURCES), ROOT / "setup.py"]:
        used |= set(re.findall(r"LARES_FAST_\w+", path.read_text()))
    assert used == documented
    for path, part in SOURCES:
        if part not in ("_settings", "cli", "verify"):
            assert "os.environ" not in path.read_text(), f"{path} reads the environment outside _settings.py"


FOLDERS = (".ci", "benchmarks", "csrc", "examples", "kernels", "lares_fast", "tests")
FILES = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]
CODE = {
    path.relative_to(ROOT): path
    for path in FILES
    if path.suffix in (".py", ".sh", ".c", ".cpp", ".h", ".in", ".cu", ".cuh") and "__pycache__" not in path.parts
}
LONGEST_FILE, MOST_PARAMETERS = 400, 12
# Public functions whose call has more parts than the limit. Each takes the parts after its tensors by keyword.
MANY_PARTS = {
    "lares_fast/ops/recurrence.py: recurrence": "one call is tensors, the model's sizes, the adapter, the draw and the backend",
    "lares_fast/reference/recurrence.py: recurrence": "its reference takes the same call, without the backend",
}


def test_no_file_is_long():
    long = {str(name): lines for name, path in CODE.items() if (lines := len(path.read_text().splitlines())) > LONGEST_FILE}
    assert long == {}


def test_no_function_has_many_parameters():
    """Launches of Triton kernels in kernels/ are left out: a kernel takes a pointer and strides of each tensor."""
    many = {}
    for name, path in CODE.items():
        if path.suffix == ".py" and name.parts[0] != "kernels":
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    count = len([*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs])
                    if count > MOST_PARAMETERS:
                        many[f"{name}: {node.name}"] = count
    assert many.keys() == MANY_PARTS.keys(), many


def test_no_page_has_the_markers_of_a_merge_conflict():
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]:
        assert not re.search(r"^(<{7}|={7}|>{7})( |$)", path.read_text(), re.MULTILINE), (
            f"{path} has the markers of a merge conflict"
        )
