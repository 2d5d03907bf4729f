"""Prepare a server whose forks run the command line at once: everything is imported, and one run has been trained.

The server imports this module when it starts.
"""

import atexit
import contextlib
import gc
import io
import os

import torch._dynamo  # noqa: F401 - optimizers import it when they are made

from lares_fast.cli import main, pictures
from tests.reliability import kill_faults  # noqa: F401 - forks import it
from tests.reliability.kill_runs import place

# A drawing takes half of the time of a small run.
pictures.sheet = lambda *_: "<svg></svg>\n"
with place() as somewhere, contextlib.redirect_stdout(io.StringIO()):
    run = somewhere.new()
    for words in (
        somewhere.first(run),
        ["recommend", "--run", run, "--input", somewhere.log, "--output", run / "out.parquet"],
    ):
        if code := main([str(word) for word in words]):
            raise RuntimeError(f"the command line has ended with code {code}")
# At its end, the server says nothing about objects that other packages have not freed.
atexit.register(os._exit, 0)
gc.collect()
# Forks share the memory of objects that the collector does not visit.
gc.freeze()
