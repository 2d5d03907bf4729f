"""The progress output of a command: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from lares_fast._device import Choice

Event = dict[str, Any]

# Work that takes less time gets no bar.
PATIENCE_SECONDS = 2.0
# Time between two plain lines about the same work.
LINE_SECONDS = 10.0


def notice(text: str) -> None:
    """Print a line on stderr, apart from the results."""
    print(f"lares-fast: {text}", file=sys.stderr)


def with_flag(text: str, setting: str, flag: str = "--set {name}={value}") -> str:
    """Return the sentence ``text`` followed by the flag that changes ``setting``, such as ``data.format=pairs``.

    Without a value in ``setting`` the flag shows ``VALUE``.
    """
    name, _, value = setting.partition("=")
    return f"{text.rstrip('.')} ({flag.format(name=name, value=value or 'VALUE')})."


def device_text(choice: Choice) -> str | None:
    """Return a line about the device that is used, or ``None`` if the machine has no GPU."""
    if choice.device.type != "cpu" or choice.refused:
        return f"device   {choice.device}, because {choice.reason}"
    return None


def counted(number: int, noun: str) -> str:
    """Return ``number`` with ``noun``, such as ``1 user`` or ``2,000 users``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def indented(text: str) -> str:
    """Return ``text`` with its later lines indented, so that they align with a first line behind a label such as ``data``."""
    return text.replace("\n", "\n         ")


def step_text(event: Event) -> str:
    """Return the running means of an epoch as text: the loss, its parts, the mean of T, the wait for data, and users/s.

    The wait for data is the percentage of the time that went into preparing batches.
    """
    return _means_text(event["means"], event["data_wait"], event["users_per_s"])


def valid_text(event: Event, users_per_s: float | None) -> str:
    """Return the line of an epoch as text: training means, speed, and validation metrics."""
    values, means = event["metrics"], dict(event["means"])
    means.pop("seconds", None)
    waited = means.pop("data_wait", None)
    quality = f"R@10 {values['recall@10']:.4f} N@10 {values['ndcg@10']:.4f} MRR@10 {values['mrr@10']:.4f}"
    head = f"{event['phase'].upper()} epoch {event['epoch']}" if means else f"{event['phase'].upper()} start"
    cost = _means_text(means, waited, users_per_s)
    return "  ".join(part for part in (head, cost, "valid " + quality, "* best" if event["best"] else "") if part)


def _means_text(means: dict[str, float], waited: float | None, users_per_s: float | None) -> str:
    parts = [f"{'mean T' if name == 'T' else name} {value:.{2 if name == 'T' else 4}g}" for name, value in means.items()]
    if waited is not None:
        parts.append(f"data-wait {100 * waited:.1f} %")
    if users_per_s is not None:
        parts.append(f"{users_per_s:,.0f} users/s")
    return " ".join(parts)


def clock_text(seconds: float) -> str:
    """Return a time such as ``4:05`` or ``1:04:05``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Console:
    """Show the events of a :class:`~lares_fast.train.Trainer` and the progress of other long work.

    Use it as a context manager. It shows one bar at a time, and prints one line for every finished epoch.
    """

    def __init__(self, stream: TextIO | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._now = now
        self._bar = _terminal_bar(self._stream) or _PlainBar(self._stream)
        self._what = ""
        self._began = self._first = self._shown = 0.0
        self._users_per_s: float | None = None

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def say(self, text: str = "") -> None:
        """Print a line, after removing the bar."""
        self._bar.close()
        self._what = ""
        print(text, file=self._stream, flush=True)

    def __call__(self, event: Event) -> None:
        """Show one event of the trainer."""
        match event["event"]:
            case "step":
                self._users_per_s = event["users_per_s"]
                what = f"{event['phase'].upper()} epoch {event['epoch']}/{event['epochs']}"
                self._show(what, event["step"], event["steps"], step_text(event), patience=0.0)
            case "progress":
                self.progress(event["what"], event["done"], event["total"])
            case "filtered":
                self.say(f"the RPT data filter kept {event['kept']:,} of {event['rows']:,} training rows")
            case "valid":
                self.say(valid_text(event, self._users_per_s if event["means"] else None))
            case "changed":
                self.say(f"changed  {event['what']} {event['name']}: {event['old']} -> {event['new']}")
            case "notice":
                self.say(f"note     {event['text']}")

    def progress(self, what: str, done: int, total: int) -> None:
        """Show the progress of ``what`` once it has taken longer than two seconds."""
        self._show(what, done, total, "", patience=PATIENCE_SECONDS)

    def _show(self, what: str, done: int, total: int, text: str, patience: float) -> None:
        now = self._now()
        if what != self._what:
            self._bar.close()
            self._what, self._began, self._first = what, now, done
            # The first update comes after one interval.
            self._shown = now
        if now - self._began < patience:
            return
        moved = done - self._first
        left = clock_text((now - self._began) * (total - done) / moved) if moved > 0 else "?"
        if now - self._shown >= self._bar.interval:
            self._shown = now
            self._bar.show(what, done, total, text, left)


class _PlainBar:
    """Print a line from time to time."""

    interval = LINE_SECONDS

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def show(self, what: str, done: int, total: int, text: str, left: str) -> None:
        parts = [what, f"{done:,}/{total:,}", text, f"ETA {left}"]
        print("  ".join(part for part in parts if part), file=self._stream, flush=True)

    def close(self) -> None:
        pass


class _RichBar:
    """A progress bar above a line of numbers, drawn by rich. ``close`` removes both."""

    interval = 0.1

    def __init__(self, console: Any) -> None:
        self._console = console
        self._live: Any = None
        self._task: Any = None

    def show(self, what: str, done: int, total: int, text: str, left: str) -> None:
        if self._live is None:
            self._open(what, total)
        self._progress.update(self._task, completed=done, total=total, left=left)
        self._text.plain = text

    def _open(self, what: str, total: int) -> None:
        from rich import live, progress
        from rich.console import Group
        from rich.text import Text

        self._progress = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=24),
            progress.TextColumn("{task.completed:,.0f}/{task.total:,.0f}  ETA {task.fields[left]}"),
            console=self._console,
        )
        self._task = self._progress.add_task(what, total=total, left="?")
        self._text = Text()
        self._live = live.Live(Group(self._progress, self._text), console=self._console, transient=True)
        self._live.start()

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def _terminal_bar(stream: TextIO) -> _RichBar | None:
    """Return a bar if ``stream`` is a terminal and rich is installed, else ``None``."""
    if not stream.isatty():
        return None
    try:
        from rich.console import Console as RichConsole
    except ImportError:
        return None
    return _RichBar(RichConsole(file=stream))
