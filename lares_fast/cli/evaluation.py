"""The work of ``lares-fast eval``: rank every item for the rows of a split, and print the results table."""

from __future__ import annotations

import json
from argparse import Namespace
from functools import partial
from pathlib import Path

from lares_fast._device import choose
from lares_fast._errors import InputError
from lares_fast._files import write_text
from lares_fast.cli.console import Console, device_text, indented, notice
from lares_fast.cli.inputs import open_log, split_log
from lares_fast.cli.tables import bound_rows, protocol_text, results_text
from lares_fast.data import InteractionLog, Rows, Split
from lares_fast.model import LARES
from lares_fast.serve import Recommender, load_about
from lares_fast.train import EvalConfig, RunConfig, model_ranks
from lares_fast.train.folder import foreign_model
from lares_fast.train.identity import log_identity
from lares_fast.train.keys import evaluation_key
from lares_fast.train.ranking import rows_csv
from lares_fast.train.results import BASELINES, Row, result_rows


def evaluate(arguments: Namespace, config: RunConfig) -> int:
    """Run ``eval`` with the settings ``config``."""
    choice = choose(arguments.device)
    recommender, about = load_about(arguments.run, choice.device, arguments.precision)
    if (text := foreign_model(arguments.run)) is not None:
        notice(text)
    with Console() as console:
        if (text := device_text(choice)) is not None:
            console.say(text)
        log, split = open_run(config, recommender, about, arguments.run, console)
        console.say(f"data     {indented(log.summary())}")
        rows = _rows(config.evaluation, recommender.model, log, split, arguments.split, arguments.steps, console)
        if arguments.csv is not None:
            labels = {"split": arguments.split, "noise_seed": config.evaluation.noise_seed}
            write_text(arguments.csv, rows_csv([{**labels, **row} for row in rows]))
        console.say("\n" + results_text(rows, config.evaluation.ks))
        console.say("\n" + protocol_text(log, split, arguments.split, config.evaluation))
    return 0


def _rows(
    evaluation: EvalConfig,
    model: LARES,
    log: InteractionLog,
    split: Split,
    part: str,
    steps: int | None,
    console: Console,
) -> list[Row]:
    """Return the rows of the baselines, of the best possible ranking, and of the model at ``steps`` or at all depths."""
    rows_of_part: Rows = getattr(split, part)
    rows: list[Row] = []
    for name, baseline in BASELINES.items():
        ranks = baseline(log, split, rows_of_part, partial(console.progress, name))
        rows += result_rows(ranks, evaluation.ks, phase=name)
    rows += bound_rows(log, rows_of_part, evaluation)
    for depth in [steps] if steps else evaluation.depths(model.config.mean_depth):
        ranks = model_ranks(
            model,
            log,
            rows_of_part,
            key=evaluation_key(evaluation.noise_seed),
            num_steps=depth,
            batch_size=evaluation.batch_size,
            progress=partial(console.progress, f"{part} T={depth}"),
        )
        rows += result_rows(ranks, evaluation.ks, phase=part, test_T=depth)
    return rows


def open_run(
    config: RunConfig, recommender: Recommender, about: dict[str, str], run: Path, console: Console
) -> tuple[InteractionLog, Split]:
    """Read the log of ``run``, and split it.

    Raises :class:`InputError` if the model was trained on another log or another split.
    """
    log = open_log(config.data, progress=partial(console.progress, "reading"))
    _require_order(log, recommender, run)
    split = split_log(config.data, log)
    _require_same(log_identity(log, split), about, log.name, run)
    return log, split


def _require_order(log: InteractionLog, recommender: Recommender, run: Path) -> None:
    """Raise :class:`InputError` unless the items of ``log`` are numbered as in the model."""
    # The run stored its ids as JSON, which turns some types into others.
    items = json.loads(json.dumps(log.item_ids[1:].tolist()))
    if items == recommender.item_ids:
        return
    if sorted(map(str, items)) == sorted(map(str, recommender.item_ids)):
        raise InputError(
            f"{log.name} has the items of the run in {run} in another order, and string ids are numbered as they occur: "
            "sort its rows into their earlier order."
        )
    raise InputError(f"{log.name} has other items than the run in {run}: give --data with the log it was trained on.")


def _require_same(ours: dict[str, str], about: dict[str, str], log: str, run: Path) -> None:
    """Raise :class:`InputError` unless the model was trained on this log and split.

    ``ours`` describes the log and the split at hand. ``about`` describes the log and the split of the model's training.
    """
    if "data" not in about:
        notice(f"the model in {run} does not name its log and split, so they were not checked: it may know the rows to rank.")
        return
    if ours["data"] != about["data"] or ours["events"] != about["events"]:
        raise InputError(
            f"{log} has other events than the log of the run in {run}, or has them in another order, so the model may have "
            "been trained on the rows to rank: give --data with the log it was trained on."
        )
    if ours["split"] != about["split"]:
        raise InputError(
            f"the run in {run} was trained on another split ({about['split']}) than this one ({ours['split']}), which may leak "
            "the targets of the rows to rank: give data.split, data.valid_fraction and data.test_fraction as in the training."
        )
    if ours["rows"] != about["rows"]:
        raise InputError(f"{log} has other times than the log of the run in {run}: give --data with the log it was trained on.")
