"""Compare two runs by NDCG@10 and give an interval for the gain, by a paired bootstrap over the users.

``python -m benchmarks.reproduction.gain RUN OTHER [--data LOG]`` ranks the validation rows and the test rows with the models of
two run folders of the same log. The interval contains 95 % of 2,000 resamples of the users. It does not include the spread
between training seeds.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np

from lares_fast.cli import settings
from lares_fast.cli.console import Console
from lares_fast.cli.evaluation import open_run
from lares_fast.reference import ranking_reward
from lares_fast.serve import load_about
from lares_fast.train import model_ranks
from lares_fast.train.keys import evaluation_key

SPLITS, K = ("valid", "test"), 10
_RESAMPLES = 2_000


def ndcg(run: Path, data: str | None, console: Console) -> dict[tuple[str, str], np.ndarray]:
    """Return {(split, history): NDCG@10 of each row, [R] fp64}, ranked as in the run's own evaluation."""
    config, (recommender, about) = settings.of_run(run, [f"data.path={data}"] if data else []), load_about(run)
    (log, split), found = open_run(config, recommender, about, run, console), {}
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
    """Return (gain of the mean, 2.5th percentile, 97.5th percentile) over the resamples, in percent of ``theirs``."""
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
    parser.add_argument("run", type=Path, help="run folder whose gain is computed")
    parser.add_argument("other", type=Path, help="run folder to compare with")
    parser.add_argument("--data", metavar="LOG", help="the log, if it has moved since the runs were made")
    arguments = parser.parse_args()
    with Console() as console:
        ours, theirs = (ndcg(run, arguments.data, console) for run in (arguments.run, arguments.other))
        for (part, history), own in ours.items():
            other = theirs[part, history]
            if len(own) != len(other):
                sys.exit(
                    f"{arguments.run} has {len(own)} {part} rows and {arguments.other} {len(other)}: compare runs of one log."
                )
            value, low, high = interval(own, other)
            means = f"{own.mean():.5f} against {other.mean():.5f}"
            console.say(f"{part:5} {history:10} NDCG@{K} {means}, {value:+.1f} % ({low:+.1f} to {high:+.1f})")


if __name__ == "__main__":
    main()
