"""``lares-fast eval``: compute the results table of a trained run from its weights.

This module declares the arguments. It imports :mod:`lares_fast.cli.evaluation`, which needs torch, when they are right.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from lares_fast._errors import InputError
from lares_fast.cli import settings
from lares_fast.cli.options import add_device_arguments, require_steps
from lares_fast.cli.outputs import files_in, require_apart
from lares_fast.train.config_file import known_keys

# The settings that this command uses.
_USED = [
    *(key for key in known_keys() if key.startswith("data.")),
    *("evaluation.batch_size", "evaluation.ks", "evaluation.depth_ratios", "evaluation.noise_seed"),
]
# The options that take the place of other settings.
_INSTEAD = {"device": "--device", "precision": "--precision", "model.eval_depth": "--steps", "model.mean_depth": "--steps"}


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``eval``."""
    parser.usage = "lares-fast eval --run DIR [--SECTION.NAME VALUE ...] [OPTION ...]"
    parser.add_argument("--run", metavar="DIR", type=Path, required=True, help="run folder that lares-fast train wrote")
    settings.add_data_argument(parser, "the log of the run, if it has moved")
    parser.add_argument("--split", choices=("valid", "test"), default="test", help="rows to evaluate (default: test)")
    parser.add_argument("--steps", metavar="T", type=int, help="number of reasoning steps (default: all depths of the run)")
    add_device_arguments(parser)
    parser.add_argument("--csv", metavar="FILE", type=Path, help="also write every metric to a CSV file")
    settings.add_arguments(parser, _USED, usual="the setting of the run")


def command(arguments: Namespace) -> int:
    """Run ``eval``."""
    require_steps(arguments.steps)
    given = settings.given(arguments.assignments)
    settings.require_used("eval", given, _USED, _INSTEAD)
    if arguments.steps is not None and (option := given.get("evaluation.depth_ratios")):
        raise InputError(f"{option} has no effect with --steps: leave one of them out.")
    config = settings.of_run(arguments.run, arguments.assignments)
    if arguments.csv is not None:
        log = {"--data" if "data.path" in given else "--run": [config.data.path]}
        require_apart("--csv", [arguments.csv], {"--run": files_in(arguments.run)})
        require_apart("--csv", [arguments.csv], log)
    # Imported here, because torch takes seconds.
    from lares_fast.cli.evaluation import evaluate

    return evaluate(arguments, config)
