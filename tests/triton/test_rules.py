"""Rules for every Triton kernel, checked in the sources: each forbids something that fails only on a GPU."""

import ast
from collections import Counter
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
FILES = sorted(KERNELS.glob("*.py"))
TREES = {path.name: ast.parse(path.read_text()) for path in FILES}


# The functions that multiply matrices.
PRODUCTS = ("tl.dot", "rows_times", "linear")


def calls(tree, name):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == name:
            yield node


def accumulated(statement):
    """Yield the variable to which ``statement`` adds products, once for each product."""
    if isinstance(statement, ast.AugAssign):
        target, earlier = statement.target, True
    elif isinstance(statement, ast.Assign):
        target = statement.targets[0]
        earlier = ast.unparse(target) in [ast.unparse(x) for x in ast.walk(statement.value) if isinstance(x, ast.Name)]
    else:
        return
    if earlier:
        products = [call for name in PRODUCTS for call in calls(statement.value, name)]
        yield from [ast.unparse(target)] * len(products)


LOADS, STORES = ("tl.load", "load_tile"), ("tl.store", "store_tile")


def unfenced(function):
    """Yield a fault for each store to a place that was loaded from since the last barrier, in the order of the source."""
    loaded = set()
    found = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    # Arguments are evaluated before the call.
    for call in sorted(found, key=lambda node: (node.end_lineno, node.end_col_offset)):
        name = ast.unparse(call.func)
        if name in LOADS:
            loaded.add(ast.unparse(call.args[0]))
        elif name in ("tl.debug_barrier", "norm_backward"):
            loaded.clear()
        elif name in STORES and ast.unparse(call.args[0]) in loaded:
            yield "a barrier stands between a load and a store of one place: another thread may store before this one loads"


def faults(tree):
    for call in calls(tree, "tl.program_id"):
        if ast.unparse(call.args[0]) != "0":
            yield "grids have one dimension: the others end at 65535"
    for call in calls(tree, "tl.dot"):
        if "input_precision" not in [keyword.arg for keyword in call.keywords]:
            yield "tl.dot names its input_precision: the default rounds fp32 to TF32"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("tl.atomic"):
            yield "no atomics: results must not depend on program order"
        if isinstance(node, (ast.For, ast.While)):
            sums = Counter(name for statement in ast.walk(node) for name in accumulated(statement))
            if any(count > 1 for count in sums.values()):
                yield "one product per accumulator and iteration: two are compiled wrongly on some GPUs"
        if isinstance(node, ast.FunctionDef):
            yield from unfenced(node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            yield "kernels are launched by _launch.launch alone"
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "triton.autotune":
            yield "launch configurations are fixed"


@pytest.mark.parametrize("name", TREES)
def test_kernels_keep_the_rules(name):
    found = set(faults(TREES[name]))
    if name == "_launch.py":
        found.remove("kernels are launched by _launch.launch alone")
    assert not found


BROKEN = {
    "x = tl.program_id(1)": "grids have one dimension",
    "x = tl.dot(a, b)": "tl.dot names",
    "tl.atomic_add(p, x)": "no atomics",
    "while True:\n    x += tl.dot(a, b, input_precision='ieee')\n    x += tl.dot(c, d, input_precision='ieee')": "one product",
    "while True:\n    x = x * s + tl.dot(a, b, input_precision='')\n    x += tl.dot(c, d, input_precision='')": "one product",
    "while True:\n    x += tl.dot(a, b, input_precision='') + tl.dot(c, d, input_precision='')": "one product",
    "while True:\n    x += rows_times(a, b, G)\n    x += rows_times(c, d, G)": "one product",
    "while True:\n    x += rows_times(a, b, G) + tl.dot(c, d, input_precision='')": "one product",
    "def f():\n    tl.store(P + i, tl.load(P + i) + x)": "a barrier stands between",
    "def f():\n    x = load_tile(P, i)\n    store_tile(P, x + 1, i)": "a barrier stands between",
    "kernel[(3,)](x)": "launched by _launch",
    "@triton.autotune(configs)\ndef f(): pass": "configurations are fixed",
}


@pytest.mark.parametrize("source", BROKEN)
def test_a_broken_rule_is_found(source):
    assert any(BROKEN[source] in fault for fault in faults(ast.parse(source)))
