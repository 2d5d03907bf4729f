"""The events of a run: they go to a listener and into the run folder, and a request to stop takes effect between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lares_fast._errors import LaresFastError, with_path
from lares_fast.train.folder import RunFolder

Event = dict[str, Any]
Listener = Callable[[Event], None]


class Interrupted(LaresFastError):
    """The run was asked to stop; its state is saved."""


class Events:
    """Sends events to ``listener``, and writes them to events.jsonl in ``folder``."""

    def __init__(self, listener: Listener, folder: RunFolder) -> None:
        self._listener, self._folder = listener, folder
        self._stop_requested = False

    def show(self, event: str, **values: Any) -> None:
        """Send an event to the listener only."""
        self._listener({"event": event, **values})

    def record(self, event: str, **values: Any) -> None:
        """Send an event to the listener, then append it to events.jsonl."""
        self.show(event, **values)
        self._folder.add_event({"event": event, **values})

    def progress(self, what: str) -> Callable[[int, int], None]:
        """Return a function ``report(done, total)`` that shows the progress of ``what``.

        It raises :class:`Interrupted` if a stop was requested.
        """

        def report(done: int, total: int) -> None:
            self.show("progress", what=what, done=done, total=total)
            self.raise_if_stopping()

        return report

    @property
    def stopping(self) -> bool:
        """Whether a stop was requested."""
        return self._stop_requested

    def request_stop(self) -> None:
        """Make the next :meth:`raise_if_stopping` raise."""
        self._stop_requested = True

    def forget_stop(self) -> None:
        """Withdraw the request to stop, because the run has stopped."""
        self._stop_requested = False

    def raise_if_stopping(self) -> None:
        """Raise :class:`Interrupted` if a stop was requested."""
        if self._stop_requested:
            raise Interrupted(f"stopped and saved: resume with lares-fast train {with_path('--resume', self._folder.path)}")
