"""Find the exact top-K of a large catalog: PyTorch, ``topk``, and ``topk`` with a ``CatalogIndex``.

The script draws random queries and items, checks that all three ways agree, and prints their times. With an index, the answer
has the same bits as without one. The index is built once for a catalog and used in many calls.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lares_fast import build_info, ops

Answer = tuple[Tensor, Tensor]


def measure(run: Callable[[], Answer], repeats: int) -> tuple[float, Answer]:
    """Return the shortest of ``repeats`` times in milliseconds, and the answer."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        answer = run()
        times.append(time.perf_counter() - began)
    return 1e3 * min(times), answer


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=100_000, help="number of items in the catalog (default: 100,000)")
    parser.add_argument("--queries", type=int, default=128, help="number of queries in a call (default: 128)")
    parser.add_argument("--width", type=int, default=64, help="width of the embeddings (default: 64)")
    parser.add_argument("--k", type=int, default=100, help="number of items in an answer (default: 100)")
    parser.add_argument("--repeats", type=int, default=5, help="number of timed calls of each way (default: 5)")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    items = torch.randn(arguments.items, arguments.width)
    query = torch.randn(arguments.queries, arguments.width)
    k = arguments.k
    ways: dict[str, Callable[[], Answer]] = {
        "torch, all scores": lambda: torch.topk(query @ items.T, k),
        "topk": lambda: ops.topk(query, items, k),
    }
    if build_info()["native"]:
        began = time.perf_counter()
        index = ops.CatalogIndex(items)
        print(f"built {index} in {1e3 * (time.perf_counter() - began):.0f} ms")
        ways["topk with an index"] = lambda: ops.topk(query, items, k, index=index)
    else:
        print(f"no CatalogIndex: {build_info()['reason']}")

    answers = {}
    print(f"\n{'way':20}        ms")
    for name, run in ways.items():
        milliseconds, answers[name] = measure(run, arguments.repeats)
        print(f"{name:20}{milliseconds:10.1f}")

    scores, ids = answers["topk"]
    # PyTorch sums in another order, so two scores that differ only by rounding may change places.
    torch.testing.assert_close(scores, answers["torch, all scores"][0])
    if "topk with an index" in answers:
        with_index = answers["topk with an index"]
        assert torch.equal(scores, with_index[0]) and torch.equal(ids, with_index[1]), "the index changed the answer"
    print(f"\nall ways agree; best item of the first query: {ids[0, 0]} with score {scores[0, 0]:.3f}")

    # An exclusion list keeps items out of the answer. Here it holds the best item of every query.
    offsets = torch.arange(len(query) + 1)
    _, without_best = ops.topk(query, items, k, exclude=(offsets, ids[:, 0].contiguous()))
    print(f"best item of the first query without item {ids[0, 0]}: {without_best[0, 0]}")


if __name__ == "__main__":
    main()
