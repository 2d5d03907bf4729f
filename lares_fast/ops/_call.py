"""One call of an op: its arguments in one frozen object, which is also where the operator's schema comes from."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, get_type_hints

from torch import Tensor

# Python type of a field -> its type in a schema. There is no list of tensors: an exported package cannot pass one.
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


@dataclass(frozen=True)
class Call:
    """Base class of the calls. A subclass lists the arguments as fields, in the order of the operator; ``backend`` is last.

    Every step from the public function to a backend hands this object on: the public function builds and checks it, the
    operator takes :meth:`arguments` and rebuilds it, and each backend reads its fields.
    """

    # The operator's name without the namespace.
    op: ClassVar[str]

    @classmethod
    def schema(cls, *, after: str = "") -> str:
        """The arguments in a schema, such as ``Tensor query, Tensor items, int k``; ``after`` is added behind them."""
        types = get_type_hints(cls)
        listed = [f"{_SCHEMA_TYPES[types[field.name]]} {field.name}" for field in fields(cls)]
        return ", ".join([*listed, *([after] if after else [])])

    @classmethod
    def count(cls) -> int:
        """How many arguments a call has."""
        return len(fields(cls))

    def arguments(self) -> tuple[Any, ...]:
        """The values of all fields, in order."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The values of the fields that hold a tensor or may hold one, in order."""
        types = get_type_hints(type(self))
        return tuple(getattr(self, field.name) for field in fields(self) if types[field.name] in (Tensor, Tensor | None))
