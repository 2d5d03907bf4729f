"""Choose the backend of a call, and explain the choice. No other module chooses a backend."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from lares_fast import _settings
from lares_fast._errors import BackendError
from lares_fast._numbers import choice


def _nothing(*_: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One way to run an op. All functions take the call (:class:`lares_fast.ops._call.Call`).

    Args:
        name: the name that users give as ``backend``.
        run: runs the call and returns its results.
        obstacle: returns why this backend cannot run the call, as a clause, or ``None``.
        not_automatic: returns why this backend runs the call only if it is requested by name, as a clause, or ``None``.
        note: returns text that :func:`explain` adds to a backend that can run the call, or ``None``.
    """

    name: str
    run: Callable[..., Any]
    obstacle: Callable[..., str | None] = _nothing
    not_automatic: Callable[..., str | None] = _nothing
    note: Callable[..., str | None] = _nothing


_TABLE: dict[str, tuple[Backend, ...]] = {}
# Op -> a function that builds its call from the arguments of the public function. The op of a backward pass has no entry,
# because only operators call it.
_BUILD: dict[str, Callable[..., Any]] = {}
# The backend that :func:`backend` requests.
CHOSEN: ContextVar[str | None] = ContextVar("lares_fast_backend", default=None)

# (op, backend) -> the number of calls that this backend ran. Tests read it.
calls: Counter[tuple[str, str]] = Counter()


def register(op: str, *backends: Backend, build: Callable[..., Any] | None = None) -> None:
    """Declare the backends of ``op``, the preferred one first. ``build`` makes a call from the public arguments."""
    _TABLE[op] = backends
    if build is not None:
        _BUILD[op] = build


def requested(argument: str | None) -> str:
    """Return the requested backend: from the argument, else from :func:`backend`, else from the environment, else ``auto``.

    Raises :class:`InputError` for an unknown name.
    """
    if argument is None:
        argument = CHOSEN.get() or _settings.backend()
    return choice("backend", argument, _settings.BACKENDS)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Request the backend ``name`` for every op within the ``with`` block.

    An op raises :class:`BackendError` if it does not have this backend, or if the backend cannot run the call. An unknown
    ``name`` raises :class:`InputError`. The backward of an op requests what its forward requested, wherever it runs.
    """
    token = CHOSEN.set(requested(name))
    try:
        yield
    finally:
        CHOSEN.reset(token)


def run(op: str, argument: str | None, *args: Any) -> Any:
    """Run a call of ``op`` on the requested backend; with ``auto``, on the first backend that can run it.

    Operators call this when they run. If the public function chose the backend, a compiler would trace the choice and keep it.
    Raises the errors of :func:`choose`.
    """
    chosen = choose(op, argument, *args)
    calls[op, chosen.name] += 1
    return chosen.run(*args)


def choose(op: str, argument: str | None, *args: Any) -> Backend:
    """Return the backend that :func:`run` uses.

    Raises :class:`BackendError` if the requested backend does not exist for ``op`` or cannot run the call.
    """
    name = requested(argument)
    for candidate in _TABLE[op]:
        if name not in ("auto", candidate.name):
            continue
        obstacle = candidate.obstacle(*args)
        if obstacle is None and (name != "auto" or candidate.not_automatic(*args) is None):
            return candidate
        if name == candidate.name:
            raise BackendError(f"{op} cannot run on the backend {name!r}: {obstacle}.")
    raise BackendError(f"{op} has no backend {name!r}; it has: {', '.join(b.name for b in _TABLE[op])}.")


def explain(op: str, *args: Any, backend: str | None = None, **options: Any) -> str:
    """Return which backend runs ``op`` on these arguments and why the others do not, one line for each backend.

    ``args`` and ``options`` are the arguments of the op's public function. Raises :class:`InputError` for an unknown ``op`` or
    ``backend``, and the errors of the public function for its arguments.

    >>> print(explain("topk", query, items, 10))  # doctest: +SKIP
    topk: native
      native     would run
      reference  can run
    """
    choice("op", op, sorted(_BUILD))
    call = _BUILD[op](*args, backend=backend, **options)
    name, chosen, lines = requested(backend), None, []
    for candidate in _TABLE[op]:
        obstacle = candidate.obstacle(call)
        not_automatic = candidate.not_automatic(call) if obstacle is None and name == "auto" else None
        if obstacle is not None:
            verdict = f"cannot run: {obstacle}"
        elif not_automatic is not None:
            verdict = f"can run if it is requested: {not_automatic}"
        elif chosen is None and name in ("auto", candidate.name):
            chosen, verdict = candidate.name, "would run"
        else:
            verdict = "can run"
        if obstacle is None and (note := candidate.note(call)):
            verdict += f", {note}"
        lines.append(f"  {candidate.name:<10} {verdict}")
    return "\n".join([f"{op}: {chosen or f'nothing can run it on the backend {name!r}'}", *lines])
