"""The only place that chooses a backend, and the only place that explains the choice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from lares_fast import _settings
from lares_fast._errors import BackendError, InputError


@dataclass(frozen=True)
class Backend:
    """One way to run an op. ``obstacle(*args)`` says in words why it cannot take a call, or returns ``None``.

    ``unasked(*args)`` says why it takes one only where it is asked for by name, or returns ``None``; ``note(*args)`` what
    :func:`explain` adds.
    """

    name: str
    run: Callable[..., Any]
    obstacle: Callable[..., str | None]
    unasked: Callable[..., str | None] = lambda *_: None
    note: Callable[..., str | None] = lambda *_: None


_TABLE: dict[str, tuple[Backend, ...]] = {}
# Op -> builds and checks its call from the arguments of the public function.
_BUILD: dict[str, Callable[..., Any]] = {}
_CHOSEN: ContextVar[str | None] = ContextVar("lares_fast_backend", default=None)

# (op, backend) -> calls that really ran there; tests assert on it.
calls: Counter[tuple[str, str]] = Counter()


def register(op: str, *backends: Backend, build: Callable[..., Any] | None = None) -> None:
    """Declare the backends of ``op``, most preferred first. ``build`` makes its call from the public arguments."""
    _TABLE[op] = backends
    if build is not None:
        _BUILD[op] = build


def requested(argument: str | None) -> str:
    """The backend asked for: by argument, by the :func:`backend` context, by environment, else ``auto``."""
    name = argument or _CHOSEN.get() or _settings.backend()
    if name not in _settings.BACKENDS:
        raise InputError(f"backend must be one of {', '.join(_settings.BACKENDS)}, but got {name!r}.")
    return name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Within the ``with`` block every op uses backend ``name``, or raises :class:`BackendError`."""
    token = _CHOSEN.set(requested(name))
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def run(op: str, argument: str | None, *args: Any) -> Any:
    """Call ``op`` on the backend that :func:`requested` names, or with ``auto`` on the first that can take ``args``.

    Ops ask here, when they run, and not where they are called: a compiler's trace would fix the answer.
    """
    chosen = choose(op, argument, *args)
    calls[op, chosen.name] += 1
    return chosen.run(*args)


def choose(op: str, argument: str | None, *args: Any) -> Backend:
    """The backend that :func:`run` would use."""
    name = requested(argument)
    for candidate in _TABLE[op]:
        if name not in ("auto", candidate.name):
            continue
        obstacle = candidate.obstacle(*args)
        if obstacle is None and (name != "auto" or candidate.unasked(*args) is None):
            return candidate
        if name == candidate.name:
            raise BackendError(f"{op} cannot run on the backend {name!r}: {obstacle}.")
    raise BackendError(f"{op} has no backend {name!r}; it has: {', '.join(b.name for b in _TABLE[op])}.")


def explain(op: str, *args: Any, backend: str | None = None, **options: Any) -> str:
    """Return which backend would run ``op`` on these arguments of the op, and why the others would not; one line each.

    >>> print(explain("topk", query, items, 10))  # doctest: +SKIP
    topk: native
      native     would run
      reference  can run
    """
    if op not in _TABLE:
        raise InputError(f"op must be one of {', '.join(sorted(_TABLE))}, but got {op!r}.")
    if op in _BUILD:
        args = (_BUILD[op](*args, backend=backend, **options),)
    name, chosen, lines = requested(backend), None, []
    for candidate in _TABLE[op]:
        obstacle = candidate.obstacle(*args)
        unasked = candidate.unasked(*args) if obstacle is None and name == "auto" else None
        if obstacle is not None:
            verdict = f"cannot run: {obstacle}"
        elif unasked is not None:
            verdict = f"can run if it is asked for: {unasked}"
        elif chosen is None and name in ("auto", candidate.name):
            chosen, verdict = candidate.name, "would run"
        else:
            verdict = "can run"
        if obstacle is None and (note := candidate.note(*args)):
            verdict += f", {note}"
        lines.append(f"  {candidate.name:<10} {verdict}")
    return "\n".join([f"{op}: {chosen or f'nothing can run it on the backend {name!r}'}", *lines])
