"""Train LARES on a CSV log, print its results next to two baselines, and recommend items to three users.

Without ``--csv`` the script first writes a small synthetic log. A log needs a column each for the user, the item and the time.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path

import torch

import lares_fast
from lares_fast.data import leave_one_out, read_log, synthetic_log
from lares_fast.train import EvalConfig, RPTConfig, RunConfig, SPTConfig, Trainer

STEPS = 2
MODEL = {
    "max_len": 10,
    "hidden_size": 32,
    "inner_size": 64,
    "n_pre_layers": 1,
    "n_core_layers": 1,
    "dropout": 0.0,
    "mean_depth": STEPS,
}


def write_synthetic_csv(path: Path, users: int, items: int) -> None:
    """Write a log with the columns user, product and when (seconds since 1970) to ``path``."""
    log = synthetic_log(n_users=users, n_items=items, n_brands=items // 10)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user", "product", "when"])
        for user in range(log.n_users):
            start, end = log.offsets[user], log.offsets[user + 1]
            events = zip(log.item_ids[log.items[start:end]], log.times[start:end], strict=True)
            writer.writerows([log.user_ids[user], item, time] for item, time in events)


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path, help="a CSV file of your own")
    parser.add_argument(
        "--columns",
        nargs=3,
        metavar=("USER", "ITEM", "TIME"),
        default=["user", "product", "when"],
        help="names of the columns (default: user product when)",
    )
    parser.add_argument("--users", type=int, default=400, help="number of users in the synthetic log (default: 400)")
    parser.add_argument("--items", type=int, default=100, help="number of items in it, a multiple of 10 (default: 100)")
    parser.add_argument("--epochs", type=int, default=4, help="number of epochs of phase 1 (default: 4)")
    parser.add_argument("--out", type=Path, help="folder of the run (default: a temporary folder)")
    arguments = parser.parse_args()
    # For such a small model a second thread costs more than it gains. Leave this line out for a larger model.
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as scratch:
        path = arguments.csv or Path(scratch) / "log.csv"
        if arguments.csv is None:
            write_synthetic_csv(path, arguments.users, arguments.items)
        out = arguments.out or Path(scratch) / "run"

        # 1. Read the log and split it: the last item of each user is for the test, the item before it for validation.
        log = read_log(path, columns=dict(zip(("user", "item", "time"), arguments.columns, strict=True)))
        split = leave_one_out(log)
        print(f"{log.n_users:,} users, {log.n_items - 1:,} items, {log.n_events:,} events\n{split.summary()}")

        # 2. Train both phases. All settings that are not given here have their published values.
        config = RunConfig(
            model=MODEL,
            spt=SPTConfig(batch_size=64, lr=5e-3, epochs=arguments.epochs, alpha=0.02, gamma=0.1),
            rpt=RPTConfig(batch_size=128, lr=3e-4, epochs=1, dropout=0.0, filter_top=50, filter_passes=1),
            evaluation=EvalConfig(ks=(5, 10), depth_ratios=(1.0,)),
        )
        rows = Trainer(config, log, split, out).run(("spt", "rpt"))

        # 3. Print the test results at the T of the model.
        print("\ntest rows, history masked   recall@10    ndcg@10")
        for row in rows:
            if row["split"] == "test" and row["history"] == "masked" and row.get("test_T", STEPS) == STEPS:
                print(f"{row['phase']:25}{row['recall@10']:12.4f}{row['ndcg@10']:11.4f}")

        # 4. Load the best model from the folder of the run, and recommend.
        recommender = lares_fast.load(out)
        users = range(min(3, log.n_users))
        histories = [log.item_ids[log.history(user)].tolist() for user in users]
        answer = recommender.recommend(histories, k=5)
        print("\nrecommendations")
        for user in users:
            print(f"{log.user_ids[user]}: {', '.join(map(str, answer.ids[user]))}")


if __name__ == "__main__":
    main()
