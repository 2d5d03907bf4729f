"""Train LARES with your own loop: phase 1 with ``spt_loss``, then phase 2 with ``rpt_loss``.

The script makes a synthetic log, trains both phases and prints NDCG@10 on the validation rows after every epoch. The
trainer of ``lares_fast.train`` does more: it stops early, resumes, filters rows for phase 2 and evaluates several T.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator

import torch

import lares_fast
from lares_fast.data import Batch, InteractionLog, Rows, SameTargetIndex, epoch_order, leave_one_out, make_batch, synthetic_log
from lares_fast.reference import Pass, rpt_loss, sample_depth, spt_loss
from lares_fast.train import metrics, model_ranks


def batches(log: InteractionLog, rows: Rows, size: int, epoch: int, max_len: int) -> Iterator[Batch]:
    """Yield every row once, in an order that depends on ``epoch``."""
    for index in epoch_order(len(rows), (0, epoch)).split(size):
        yield make_batch(log, rows, index, max_len)


def ndcg(model: lares_fast.LARES, log: InteractionLog, rows: Rows) -> float:
    """Return NDCG@10 on ``rows``, ranking all items except the history."""
    return metrics(model_ranks(model, log, rows, key=(0, 0))["masked"], (10,))["ndcg@10"]


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=600, help="number of users in the synthetic log (default: 600)")
    parser.add_argument("--items", type=int, default=100, help="number of items in it, a multiple of 10 (default: 100)")
    parser.add_argument("--epochs", type=int, default=3, help="number of epochs of phase 1 (default: 3)")
    parser.add_argument("--batch", type=int, default=64, help="number of rows in a batch (default: 64)")
    arguments = parser.parse_args()
    # For such a small model a second thread costs more than it gains. Leave this line out for a larger model.
    torch.set_num_threads(1)

    log = synthetic_log(n_users=arguments.users, n_items=arguments.items, n_brands=arguments.items // 10)
    split = leave_one_out(log)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    config = lares_fast.LARESConfig(
        n_items=log.n_items,
        max_len=10,
        hidden_size=32,
        inner_size=64,
        n_pre_layers=1,
        n_core_layers=1,
        dropout=0.1,
        mean_depth=2,
    )
    model = lares_fast.LARES(config)
    print("phase   epoch     loss   NDCG@10   seconds")

    # Phase 1: cross entropy, and two alignments with a partner that has the same target.
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    partners = SameTargetIndex(log, split.train)
    for epoch in range(1, arguments.epochs + 1):
        began, losses = time.monotonic(), []
        model.train()
        for batch in batches(log, split.train, arguments.batch, epoch, config.max_len):
            partner = make_batch(log, split.train, partners.sample(batch.rows, generator), config.max_len)
            first, second = sample_depth(config, 2, generator).tolist()
            loss = spt_loss(
                model,
                batch.sequences,
                batch.target,
                partner.sequences,
                # The passes for the cross entropy, the anchor and the partner. Each pass draws its own dropout and h0.
                (Pass(first), Pass(second), Pass(second)),
                step_index=int(torch.randint(second, (), generator=generator)),
                alpha=0.02,
                gamma=0.1,
            )
            optimizer.zero_grad(set_to_none=True)
            loss.total.backward()
            optimizer.step()
            losses.append(loss.total.item())
        print_row("spt", epoch, losses, ndcg(model, log, split.valid), began)

    # Phase 2: G trajectories for each sequence, compared with each other and with the frozen model of phase 1.
    frozen = copy.deepcopy(model).requires_grad_(False)
    # The frozen model uses no dropout. It stays in training mode, because it then draws a new h0 for every trajectory.
    frozen.set_dropout(0.0)
    model.set_dropout(0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    group, began, losses = 4, time.monotonic(), []
    model.train()
    for batch in batches(log, split.train, 2 * arguments.batch, epoch=0, max_len=config.max_len):
        depth = sample_depth(config, group, generator)[:, None].expand(group, len(batch))
        loss = rpt_loss(model, frozen, batch.sequences, batch.target, Pass(depth), Pass(depth), k=10, beta=1.0, reward="ndcg")
        optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        optimizer.step()
        losses.append(loss.total.item())
    print_row("rpt", 1, losses, ndcg(model, log, split.valid), began)


def print_row(phase: str, epoch: int, losses: list[float], value: float, began: float) -> None:
    """Print one line of the table."""
    print(f"{phase:7}{epoch:6}{sum(losses) / len(losses):9.4f}{value:10.4f}{time.monotonic() - began:10.1f}", flush=True)


if __name__ == "__main__":
    main()
