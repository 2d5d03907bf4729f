"""Logs and settings that Atheris makes: it keeps inputs that reach new lines of the readers, and changes them further.

Only the child process that searches imports this module.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from random import Random
from typing import Any

import atheris

# The readers must be imported here for the first time, because their lines are counted.
with atheris.instrument_imports(include=["lares_fast.data", "lares_fast.cli.settings", "lares_fast.train.config_file"]):
    from tests.reliability import fuzz_readers
from tests.reliability.fuzzing import log_files, settings_files
from tests.reliability.fuzzing.children import Watcher, report

fault, notes = fuzz_readers.fault, fuzz_readers.notes

# Longer inputs make the search slow.
_MOST_BYTES = 2048
# The first byte of an input says what it is: a log of one of these formats, or settings.
_NAMES = list(fuzz_readers.KINDS)


def examples(_: str, seed: int, number: int, watch: Watcher) -> None:
    """Call ``watch`` with ``number`` inputs, print what was found, and end the process, because the search has no end."""
    _write_corpus(Path("corpus"), Random(seed))

    def check(data: bytes) -> None:
        watch(_example(data))
        if watch.tried[watch.what] >= number:
            report(watch, sys.modules[__name__])
            os._exit(0)

    # The child has limits of its own.
    limits = [f"-max_len={_MOST_BYTES}", "-rss_limit_mb=0", "-timeout=0", "-verbosity=0"]
    atheris.Setup([sys.argv[0], "corpus", f"-seed={seed + 1}", *limits], check)
    atheris.Fuzz()


def _write_corpus(folder: Path, random: Random) -> None:
    folder.mkdir()
    for at in range(60):
        histories = (None, log_files.ODD, log_files.LARGE)[at % 3]
        for kind, (name, content) in enumerate(log_files.files(random, histories)):
            (folder / f"{at} {name}").write_bytes(bytes([kind]) + content)
        config = settings_files.example("config.yaml", random).value
        (folder / f"{at} config").write_bytes(bytes([len(_NAMES)]) + config)


def _example(data: bytes) -> Any:
    kind = data[0] % (len(_NAMES) + 1) if data else 0
    if kind == len(_NAMES):
        return settings_files.Input("config.yaml", data[1:], settings_files.check_config)
    return fuzz_readers.File(_NAMES[kind], data[1:])
