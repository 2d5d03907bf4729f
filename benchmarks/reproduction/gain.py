"""How sure the gain of one run over another is: NDCG@10 user by user, and a paired bootstrap over the users.

``python -m benchmarks.reproduction.gain RUN RIVAL [--data LOG]`` ranks the validation and the test rows by the models of
two run folders of the same log. The interval holds 95 % of 2,000 resamples of the users; what it leaves out is the spread
of training seeds.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np

from lares_fast.cli.console import Console
from lares_fast.cli.evaluate import open_run, run_config
from lares_fast.reference import ranking_reward
from lares_fast.serve import load_about
from lares_fast.train import model_ranks
from lares_fast.train.keys import evaluation_key

SPLITS, K = ("valid", "test"), 10
_RESAMPLES = 2_000


def ndcg(run: Path, data: str | None, console: Console) -> dict[tuple[str, str], np.ndarray]:
    """NDCG@10 of each row, [R] fp64, by split and history, ranked as the run's own evaluation does."""
    config, (recommender, about) = run_config(run, []), load_about(run)
    (log, split), found = open_run(config, data, recommender, about, run, console), {}
    for part in SPLITS:
        ranks = model_ranks(
            recommender.model,
            log,
            getattr(split, part),
            key=evaluation_key(config.evaluation.noise_seed),
            progress=partial(console.progress, f"{run.name} {part}"),
        )
        for history, rank in ranks.items():
            found[part, history] = ranking_reward(rank, K, "ndcg").double().numpy()
    return found


def interval(ours: np.ndarray, theirs: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """(gain, low, high) in percent of ``theirs``: of the mean, and between the 2.5th and 97.5th percentile of resamples."""
    draw, n = np.random.default_rng(seed), len(ours)
    ratios = np.empty(_RESAMPLES)
    for i in range(_RESAMPLES):
        chosen = draw.integers(n, size=n)
        ratios[i] = ours[chosen].sum() / theirs[chosen].sum()
    shown = (ours.sum() / theirs.sum(), *np.percentile(ratios, [2.5, 97.5]))
    value, low, high = (100 * (float(ratio) - 1) for ratio in shown)
    return value, low, high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder whose gain is asked for")
    parser.add_argument("rival", type=Path, help="run folder it is compared with")
    parser.add_argument("--data", metavar="LOG", help="the log, if it is no longer where the runs found it")
    arguments = parser.parse_args()
    with Console() as console:
        ours, theirs = (ndcg(run, arguments.data, console) for run in (arguments.run, arguments.rival))
        for (part, history), own in ours.items():
            rival = theirs[part, history]
            if len(own) != len(rival):
                sys.exit(
                    f"{arguments.run} has {len(own)} {part} rows and {arguments.rival} {len(rival)}: compare runs of one log."
                )
            value, low, high = interval(own, rival)
            means = f"{own.mean():.5f} against {rival.mean():.5f}"
            console.say(f"{part:5} {history:10} NDCG@{K} {means}, {value:+.1f} % ({low:+.1f} to {high:+.1f})")


if __name__ == "__main__":
    main()
