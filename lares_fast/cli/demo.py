"""``lares-fast demo``: train, evaluate and recommend on a synthetic log, in about a minute."""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from lares_fast._errors import InputError, with_path
from lares_fast._files import LOCK, locked
from lares_fast.cli import settings
from lares_fast.train import config_file
from lares_fast.train.config import PHASES, RunConfig
from lares_fast.train.files import FILES, REPORT

if TYPE_CHECKING:
    from lares_fast.data import InteractionLog

_SHOWN_USERS, _SHOWN_HISTORY, _SHOWN_ITEMS = 3, 6, 5


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``demo``."""
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("runs/demo"), help="run folder (default: runs/demo)")
    settings.add_set_argument(parser)


def command(arguments: Namespace) -> int:
    """Run ``demo``."""
    began = time.monotonic()
    out = arguments.out
    config = settings.build("demo", arguments.assignments)
    if config.data.path is not None:
        raise InputError("the demo makes its own log and takes no data.path: use lares-fast train for your log.")
    _check_replaceable(out, config)
    with locked(out):
        for name in FILES:
            (out / name).unlink(missing_ok=True)
    # Imported here, because torch takes seconds.
    import torch

    from lares_fast.cli.training import train

    # The demo's model is so small that a second thread would make it slower.
    torch.set_num_threads(1)
    log = train(config, out, PHASES)
    print(_examples(out, log))
    print(f"\nreport   {out / REPORT}\ntime     {time.monotonic() - began:.0f} s")
    print(f"next     lares-fast recommend {with_path('--run', out)} --k 10 --user {log.user_ids[0]}")
    print("         lares-fast train --data YOUR_LOG --config instruments")
    return 0


def _check_replaceable(out: Path, config: RunConfig) -> None:
    """Raise :class:`InputError` unless ``out`` is empty or holds an earlier demo."""
    if not out.exists() or not any(path.name != LOCK for path in out.iterdir()):
        return
    # Other training without a log of one's own has other sizes of the synthetic log.
    logs = (config.data, settings.build("demo").data)
    if not config_file.is_written(out / "config.yaml") or settings.build(out / "config.yaml").data not in logs:
        raise InputError(f"{out} holds files that are not from an earlier demo: choose another --out.")


def _examples(out: Path, log: InteractionLog) -> str:
    from lares_fast.serve import load

    recommender = load(out)
    histories = [log.item_ids[log.history(user)].tolist() for user in range(_SHOWN_USERS)]
    found = recommender.recommend(histories, _SHOWN_ITEMS)
    lines = ["\nRecommendations for three users (users and products are synthetic; products already bought are left out):"]
    for user, history in enumerate(histories):
        dots = "... " if len(history) > _SHOWN_HISTORY else ""
        lines.append(f"  {log.user_ids[user]} bought {dots}{' '.join(history[-_SHOWN_HISTORY:])}")
        pairs = zip(found.ids[user], found.scores[user].tolist(), strict=False)
        lines.append("    recommended " + ", ".join(f"{item} ({score:.2f})" for item, score in pairs))
    return "\n".join(lines)
