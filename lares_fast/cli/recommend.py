"""``lares-fast recommend``: recommend items by their raw ids, for one user, one history or all users of a file.

This module declares the arguments. It imports :mod:`lares_fast.cli.recommending`, which needs torch, when they are right.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path

from lares_fast._errors import InputError
from lares_fast.cli import settings
from lares_fast.cli.options import add_device_arguments, require_steps
from lares_fast.cli.outputs import files_in, require_apart
from lares_fast.train.config_file import known_keys

# The settings that this command uses: those with which a log is read, and the number of histories in a batch.
_NOT_READING = ("data.split", "data.valid_fraction", "data.test_fraction")
_READING = [key for key in known_keys() if key.startswith("data.") and key not in _NOT_READING and ".synthetic_" not in key]
# Filters for training, which leave out no history.
_OF_THE_LOG = ("data.path", "data.min_events", "data.min_item_events")
_USED = [*_READING, "evaluation.batch_size"]


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``recommend``."""
    parser.usage = (
        "lares-fast recommend --run DIR (--user ID | --item ID ... | --history ITEMS | --input FILE) "
        "[--SECTION.NAME VALUE ...] [OPTION ...]"
    )
    parser.add_argument("--run", metavar="DIR", type=Path, required=True, help="run folder that lares-fast train wrote")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--user", metavar="ID", help="recommend to this user (raw id) of the run's log")
    what.add_argument(
        "--item", metavar="ID", action="append", help="one raw item id of a history; repeat it, oldest item first"
    )
    what.add_argument(
        "--history",
        metavar="ITEMS",
        help='a history of raw item ids, oldest first: a JSON list such as ["a", "b, c"], or ids without commas such as a,b',
    )
    what.add_argument("--input", metavar="FILE", type=Path, help="recommend to all users of this log, in any training format")
    settings.add_data_argument(parser, "with --user: the log of the run, if it has moved")
    parser.add_argument("--k", type=int, default=10, help="number of items for each user (default: 10)")
    parser.add_argument("--output", metavar="FILE", type=Path, help="write a .csv or .parquet file (default: print CSV)")
    parser.add_argument("--keep-seen", action="store_true", help="also recommend items that are in the history")
    parser.add_argument("--steps", metavar="T", type=int, help="number of reasoning steps (default: the setting of the run)")
    add_device_arguments(parser)
    settings.add_arguments(parser, _USED, usual="the setting of the run")


def command(arguments: Namespace) -> int:
    """Run ``recommend``."""
    given = settings.given(arguments.assignments)
    settings.require_used("recommend", given, _USED, {"device": "--device", "precision": "--precision"})
    _require_used(arguments, given)
    require_steps(arguments.steps)
    if arguments.output and arguments.output.suffix not in (".csv", ".parquet"):
        raise InputError(f"--output {arguments.output} must end in .csv or .parquet.")
    # A history needs no configuration, so a folder with a model alone is enough for it.
    reads = arguments.user is not None or arguments.input is not None
    config = settings.of_run(arguments.run, arguments.assignments) if reads else settings.build(None, arguments.assignments)
    if arguments.output:
        require_apart("--output", [arguments.output], {"--run": files_in(arguments.run), "--input": [arguments.input]})
        if arguments.user is not None:
            log = "--data" if "data.path" in given else "--run"
            require_apart("--output", [arguments.output], {log: [config.data.path]})
    # Imported here, because torch takes seconds.
    from lares_fast.cli.recommending import recommend

    return recommend(arguments, config, given)


def _require_used(arguments: Namespace, given: Mapping[str, str]) -> None:
    """Raise :class:`InputError` for an option about a log that the other options do not read."""
    if arguments.user is not None:
        return
    source = next(name for name in ("input", "history", "item") if getattr(arguments, name) is not None)
    for key, option in given.items():
        if key in _OF_THE_LOG or (key in _READING and source != "input"):
            raise InputError(f"{option} has no effect with --{source}: leave one of them out.")
