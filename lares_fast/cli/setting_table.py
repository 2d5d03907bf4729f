"""Every setting with its type, its default and its meaning, which comes from the docstrings of the classes of settings."""

from __future__ import annotations

import ast
import functools
import inspect
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from lares_fast.train.config import SECTIONS, RunConfig
from lares_fast.train.config_file import in_words, kind_of, known_keys

_ROLE = re.compile(r":\w+:`~?(?:\w+\.)*(\w+)`")


class Row(NamedTuple):
    """A setting. All parts are texts; ``meaning`` has the markup of docstrings."""

    key: str
    kind: str
    default: str
    meaning: str


def rows() -> list[Row]:
    """Return a row for each setting, in the order of config.yaml."""
    return [_row(key) for key in known_keys()]


def heading(section: str) -> str:
    """Return the first sentence of the docstring of the section's class."""
    return plain((SECTIONS.get(section, RunConfig).__doc__ or "").partition("\n")[0])


def plain(text: str) -> str:
    """Return ``text`` without the markup of docstrings, and with YAML's name of ``None``."""
    return _ROLE.sub(r"\1", text).replace("``None``", "null").replace("``", "")


def _row(key: str) -> Row:
    section, _, name = key.rpartition(".")
    kind = SECTIONS.get(section, RunConfig)
    (field,) = (each for each in fields(kind) if each.name == name)
    return Row(key, in_words(kind_of(key)), _shown(field.default), _meanings(kind)[name])


def _shown(default: Any) -> str:
    assert default is not MISSING
    return default if isinstance(default, str) else json.dumps(default)


@functools.cache
def _meanings(kind: type) -> dict[str, str]:
    """Return the docstring of each field of the dataclass ``kind``, by the name of the field."""
    bases = (base for base in reversed(kind.__mro__) if is_dataclass(base))
    return {name: text for base in bases for name, text in _literals(base)}


def _literals(kind: type) -> Iterator[tuple[str, str]]:
    """Yield each field of the class ``kind`` with the literal text that stands directly below it."""
    (found,) = (node for node in _tree(kind.__module__).body if isinstance(node, ast.ClassDef) and node.name == kind.__name__)
    for field, below in pairwise(found.body):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            yield ast.unparse(field.target), inspect.cleandoc(str(below.value.value)).replace("\n", " ")


@functools.cache
def _tree(module: str) -> ast.Module:
    return ast.parse(inspect.getsource(sys.modules[module]))
