"""Read mutated logs and settings: one sentence, or exactly what a simple parser finds."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from lares_fast._errors import LaresFastError
from lares_fast.data import read_log
from tests.reliability.counts import Counts
from tests.reliability.fuzzing import log_files, log_parsers, settings_files, strange_paths
from tests.reliability.fuzzing.children import count
from tests.reliability.fuzzing.outcomes import sentence_fault

# The number of inputs of each kind in the long form.
LONG = {
    "sequences": 3000,
    "pairs": 3000,
    "json": 3000,
    "inter": 3000,
    "csv": 4000,
    "tsv": 3000,
    "parquet": 3000,
    "logs in memory": 2000,
    "config.yaml": 1500,
    "--set": 1500,
    "item_ids.json": 1500,
    "paths": 400,
}
# The inputs of one child process.
BATCH = 1000
# The inputs of each kind in the quick form.
QUICK = 25
# Logs and settings that a search for new lines of the readers makes, in one child process.
GUIDED = 20_000
KINDS = {"log.txt": "sequences", "pairs.txt": "pairs", "log.json": "json", "log.inter": "inter"}
KINDS |= {"log.csv": "csv", "log.tsv": "tsv", "log.parquet": "parquet"}
# The share of damaged logs that both parsers read, for the note in the table.
compared = [0]


@dataclass(frozen=True)
class File:
    """A log as bytes, and how it is read."""

    name: str
    content: bytes
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name} {self.options} {self.content[:1200]!r}"


def examples(what: str, seed: int, number: int, watch: Callable[[Any], None]) -> None:
    """Call ``watch`` with ``number`` inputs of ``what``. Equal arguments give equal inputs."""
    random = Random(f"{what} {seed}")
    for _ in range(number):
        watch(_example(what, random))


def _example(what: str, random: Random) -> Any:
    for module in (settings_files, strange_paths):
        if what in module.KINDS:
            return module.example(what, random)
    histories = random.choice((None, None, log_files.ODD, log_files.LARGE))
    name, content = next((name, content) for name, content in log_files.files(random, histories) if KINDS[name] == what)
    if random.random() < 0.3:
        content = log_files.variants(content, random)
    if random.random() < 0.8:
        content = log_files.damaged(content, random)
    return File(name, content, random.choice(({}, {}, {}, {"min_events": 1}, {"columns": {"time": None}})))


def fault(example: Any) -> str | None:
    """Read the input, and return what is wrong with the outcome, or ``None``."""
    return file_fault(example) if isinstance(example, File) else example.fault()


def file_fault(file: File, read: Callable[..., Any] = read_log) -> str | None:
    """Write the log to the present folder, read it by ``read`` and compare it with a simple parser's result."""
    path = Path(file.name)
    path.write_bytes(file.content)
    kind, options = KINDS[file.name], dict(file.options)
    if kind in ("sequences", "pairs", "json"):
        options.pop("columns", None)
        options["format"] = kind
    try:
        log = read(path, **options)
    except LaresFastError as error:
        return sentence_fault(str(error))
    except Exception as error:
        return f"raised {type(error).__name__}: {str(error)[:200]!r}"
    if (found := log_parsers.breach(log, options.get("min_events", 3))) is not None:
        return found
    events = log_parsers.parse(path, kind, log.times is not None)
    if events is None:
        return None
    compared[0] += 1
    return log_parsers.difference(log, events, options.get("min_events", 3))


def measure(counts: Counts) -> None:
    """Count the inputs of every kind."""
    searches = [(__name__, LONG, BATCH)]
    # Atheris is made for few versions of Python, so it is no requirement.
    if not counts.quick and importlib.util.find_spec("atheris"):
        searches.append(("tests.reliability.fuzzing.guided", {"guided by coverage": GUIDED}, GUIDED))
    for module, long, batch in searches:
        for what, results in count(counts, module, long, batch, [(what, QUICK) for what in LONG]).items():
            both, peak = sum(found.notes.get("compared", 0) for found in results), max(found.peak for found in results)
            compared_text = f"{both:,} compared with a simple parser, " if both and not counts.quick else ""
            counts.note(what, f"{compared_text}peak memory {peak} MiB")


def notes() -> dict[str, int]:
    """Return what a child tells its parent in addition to the faults."""
    return {"compared": compared[0]}
