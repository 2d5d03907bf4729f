"""``lares-fast eval``: the results table of a trained run, recomputed from its weights."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from functools import partial
from pathlib import Path
from typing import Any

from lares_fast._errors import InputError
from lares_fast.cli import settings
from lares_fast.cli.console import Console, notice
from lares_fast.cli.inputs import open_log, split_log
from lares_fast.cli.tables import bound_rows, protocol_text, results_text
from lares_fast.data import InteractionLog, Split
from lares_fast.serve import Recommender, load_about
from lares_fast.train import RunConfig, metrics, model_ranks
from lares_fast.train.baselines import markov_ranks, popularity_ranks
from lares_fast.train.files import write_text
from lares_fast.train.identity import log_identity
from lares_fast.train.keys import evaluation_key
from lares_fast.train.metrics import rows_csv


def add_arguments(parser: ArgumentParser) -> None:
    """The arguments of ``eval``."""
    parser.add_argument("--run", metavar="DIR", type=Path, required=True, help="run folder of lares-fast train")
    parser.add_argument("--data", metavar="PATH", help="the log, if it is no longer where the run found it")
    parser.add_argument("--split", choices=("valid", "test"), default="test", help="which rows to rank (default: test)")
    parser.add_argument("--steps", metavar="T", type=int, help="one number of reasoning steps (default: all of the run's)")
    parser.add_argument("--bf16", action="store_true", help="encode with operands rounded to bf16")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="also write every metric as CSV")
    parser.add_argument("--set", metavar="A.B=C", action="append", default=[], dest="assignments", help="change one setting")


def command(arguments: Namespace) -> int:
    """Run ``eval``."""
    if arguments.steps is not None and arguments.steps < 1:
        raise InputError(f"--steps must be at least 1, but got {arguments.steps}.")
    config = run_config(arguments.run, arguments.assignments)
    recommender, about = load_about(arguments.run)
    recommender.model.bf16 = arguments.bf16
    with Console() as console:
        log, split = open_run(config, arguments.data, recommender, about, arguments.run, console)
        console.say(f"data     {log.summary()}".replace("\n", "\n         "))
        part, evaluation = getattr(split, arguments.split), config.evaluation
        depths = [arguments.steps] if arguments.steps else evaluation.depths(recommender.model.config.mean_depth)
        rows: list[dict[str, Any]] = []
        for name, baseline in (("popularity", popularity_ranks), ("markov", markov_ranks)):
            rows += [
                {"phase": name, "history": history, **metrics(rank, evaluation.ks)}
                for history, rank in baseline(log, split, part, partial(console.progress, name)).items()
            ]
        rows += bound_rows(log, part, evaluation)
        for depth in depths:
            ranks = model_ranks(
                recommender.model,
                log,
                part,
                key=evaluation_key(evaluation.noise_seed),
                num_steps=depth,
                batch_size=evaluation.batch_size,
                progress=partial(console.progress, f"{arguments.split} T={depth}"),
            )
            rows += [
                {"phase": arguments.split, "test_T": depth, "history": history, **metrics(rank, evaluation.ks)}
                for history, rank in ranks.items()
            ]
        if arguments.csv is not None:
            labels = {"split": arguments.split, "noise_seed": evaluation.noise_seed}
            write_text(arguments.csv, rows_csv([{**labels, **row} for row in rows]))
        console.say("\n" + results_text(rows, evaluation.ks))
        console.say("\n" + protocol_text(log, split, arguments.split, evaluation))
    return 0


def run_config(run: Path, assignments: list[str]) -> RunConfig:
    """The configuration of the run folder ``run`` under ``--set`` assignments."""
    if not (run / "config.yaml").is_file():
        raise InputError(f"{run / 'config.yaml'} does not exist: --run needs the folder of a run.")
    return settings.build(run / "config.yaml", assignments)


def open_run(
    config: RunConfig, path: str | None, recommender: Recommender, about: dict[str, str], run: Path, console: Console
) -> tuple[InteractionLog, Split]:
    """The log, from ``path`` if it has moved, and the split of ``run``; :class:`InputError` if the model knows others."""
    log = open_log(config.data, path, progress=partial(console.progress, "reading"))
    _require_order(log, recommender, run)
    split = split_log(config.data, log)
    _require_same(log_identity(log, split), about, log.name, run)
    return log, split


def _require_order(log: InteractionLog, recommender: Recommender, run: Path) -> None:
    """Raise :class:`InputError` unless the items of ``log`` are numbered as in the model."""
    # Through JSON, as the run wrote them.
    items = json.loads(json.dumps(log.item_ids[1:].tolist()))
    if items == recommender.item_ids:
        return
    if sorted(map(str, items)) == sorted(map(str, recommender.item_ids)):
        raise InputError(
            f"{log.name} has the items of the run in {run} in another order: sort its rows as they were, for string ids are "
            "numbered as they occur."
        )
    raise InputError(f"{log.name} has other items than the run in {run}: give --data with the log it was trained on.")


def _require_same(ours: dict[str, str], about: dict[str, str], log: str, run: Path) -> None:
    """Raise :class:`InputError` unless the log and the split are those that the model ``about`` was trained on."""
    if not about:
        notice(f"{run} is of an earlier version and does not say which log and split it was trained on: that is not checked.")
        return
    if ours["data"] != about["data"] or ours["events"] != about["events"]:
        raise InputError(
            f"{log} has other events than the log of the run in {run}, or the same in another order: rows to be ranked may "
            "have been trained on; give --data with the log it was trained on."
        )
    if ours["split"] != about["split"]:
        raise InputError(
            f"the run in {run} was trained on another split ({about['split']}) than this ({ours['split']}), so rows to be "
            "ranked may have been trained on, which would leak their targets: leave data.split and its fractions as they were."
        )
    if ours["rows"] != about["rows"]:
        raise InputError(f"{log} has other times than the log of the run in {run}: give --data with the log it was trained on.")
