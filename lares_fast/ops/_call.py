"""One call of an op: a frozen object with its arguments, from which the operator's schema is derived."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, NamedTuple, Self, get_args, get_origin, get_type_hints

from torch import Tensor

from lares_fast import _settings
from lares_fast._numbers import choice

# Python type of a field -> its type in a schema. Lists of tensors are left out, because an exported package cannot pass one.
_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "int",
    int | None: "int?",
    float: "float",
    bool: "bool",
    str: "str",
    str | None: "str?",
}


class Field(NamedTuple):
    """A field of a call: its name and type. A group of tensors also has its class and the names of its members."""

    name: str
    type: Any
    group: Any = None
    members: tuple[str, ...] = ()


@dataclass(frozen=True)
class Call:
    """The arguments of one call. Every step from the public function to a backend passes this object on.

    The public function builds and checks the call. The operator takes :meth:`arguments` and builds the call again from them. A
    backend reads the fields. ``__post_init__`` checks the name of the backend. The calls of the catalog ops check all of their
    fields there, so that no invalid call exists.

    A subclass lists the arguments as fields, with the names and the order of the public function, and ``backend`` is among
    them. A field has one of the types in ``_SCHEMA_TYPES``, or it is a group: a named tuple of tensors, or ``None``. A group
    ``exclude`` with the members ``offsets`` and ``ids`` gives the operator two arguments, ``exclude_offsets`` and
    ``exclude_ids``.
    """

    # The name of the op in the table of backends.
    op: ClassVar[str]
    layout: ClassVar[tuple[Field, ...]]
    # The name of each field and the number of its members, which is 0 unless it is a group. :meth:`arguments` reads only these
    # constants, so that a compiler can trace it.
    _sizes: ClassVar[tuple[tuple[str, int], ...]]

    def __post_init__(self) -> None:
        if (backend := getattr(self, "backend", None)) is not None:
            choice("backend", backend, _settings.BACKENDS)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        types = {name: kind for name, kind in get_type_hints(cls).items() if get_origin(kind) is not ClassVar}
        cls.layout = tuple(_field(name, kind) for name, kind in types.items() if kind is not KW_ONLY)
        cls._sizes = tuple((field.name, len(field.members)) for field in cls.layout)

    @classmethod
    def build(cls, *arguments: Any, **options: Any) -> Self:
        """Return the call for the arguments of the public function; ``__post_init__`` converts them to the fields' types."""
        return cls(*arguments, **options)

    @classmethod
    def schema(cls, *, after: str = "") -> str:
        """Return the arguments as a schema lists them, such as ``Tensor query, Tensor items, int k``, and then ``after``."""
        listed = []
        for field in cls.layout:
            if field.group is None:
                listed.append(f"{_SCHEMA_TYPES[field.type]} {field.name}")
            listed += [f"Tensor? {field.name}_{member}" for member in field.members]
        return ", ".join([*listed, *([after] if after else [])])

    @classmethod
    def count(cls) -> int:
        """Return the number of the operator's arguments."""
        return sum(size or 1 for _, size in cls._sizes)

    @classmethod
    def of(cls, *arguments: Any) -> Self:
        """Return the call with these arguments of the operator."""
        values = {}
        position = 0
        for name, _, group, members in cls.layout:
            if group is None:
                values[name] = arguments[position]
                position += 1
                continue
            parts = arguments[position : position + len(members)]
            values[name] = None if parts[0] is None else group(*parts)
            position += len(members)
        return cls(**values)

    def arguments(self) -> tuple[Any, ...]:
        """Return the arguments of the operator, in order."""
        values: list[Any] = []
        for name, size in self._sizes:
            value = getattr(self, name)
            if not size:
                values.append(value)
            elif value is None:
                values.extend([None] * size)
            else:
                values.extend(value)
        return tuple(values)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return the values of the fields that hold a tensor or may hold one, in order; groups are left out."""
        return tuple(getattr(self, field.name) for field in self.layout if field.type in (Tensor, Tensor | None))


def _field(name: str, kind: Any) -> Field:
    for part in get_args(kind):
        if hasattr(part, "_fields"):
            return Field(name, kind, part, part._fields)
    return Field(name, kind)
