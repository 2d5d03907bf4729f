"""Logs and settings that Atheris makes: it keeps inputs that reach new lines of the readers, and changes them further.

The child process runs this module by ``run``, before it imports the readers a second time with their lines counted.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import atheris

_COUNTED = ("lares_fast.data", "lares_fast.cli.settings")
# Longer inputs make the search slow.
_MOST_BYTES = 2048


def run(seed: int, number: int, watch: Callable[[Any], None]) -> None:
    """Call ``watch`` with ``number`` inputs. The process ends then, after it has printed what was found."""
    for name in [name for name in sys.modules if name.startswith(_COUNTED) or name.startswith("tests.reliability.f")]:
        del sys.modules[name]
    with atheris.instrument_imports(include=list(_COUNTED)):
        readers = importlib.import_module("tests.reliability.fuzz_readers")
    from tests.reliability.fuzzing import children, log_files, settings_files

    names = list(readers.KINDS)
    corpus = Path("corpus")
    corpus.mkdir()
    random = Random(seed)
    for at in range(60):
        for kind, (name, content) in enumerate(log_files.files(random, (None, log_files.ODD, log_files.LARGE)[at % 3])):
            assert names[kind] == name
            (corpus / f"{at} {name}").write_bytes(bytes([kind]) + content)
        (corpus / f"{at} config").write_bytes(bytes([len(names)]) + settings_files.example("config.yaml", random).value)

    def check(data: bytes) -> None:
        kind = data[0] % (len(names) + 1) if data else 0
        if kind == len(names):
            watch_it = settings_files.Input("config.yaml", data[1:], settings_files.check_config)
        else:
            watch_it = readers.File(names[kind], data[1:])
        watcher.check(watch_it)
        if watcher.tried >= number:
            children.report(watcher, readers)
            sys.stdout.flush()
            # The search would go on, and its end would replace the exit code.
            import os

            os._exit(0)

    watcher = watch
    arguments = [sys.argv[0], str(corpus), f"-seed={seed + 1}", f"-max_len={_MOST_BYTES}", "-rss_limit_mb=0", "-timeout=0"]
    atheris.Setup(arguments, check)
    atheris.Fuzz()
