"""Time topk on the CPU against the fastest exact ways in PyTorch and faiss."""

import subprocess
import sys
import time

import pytest
import torch

from benchmarks import ROOT, harness
from lares_fast import ops

try:
    import faiss
except ImportError:
    faiss = None

D, K = 64, 100
CHUNK = 65_536
CHECK = "ids equal torch's in > 99.9 % of places; the index changes no bit"


def catalog(kind, N):
    """Return an item table that is easy (Gaussian) or hard for int8 screening."""
    items = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    if kind == "cone":
        items = items[0] + 0.05 * items
    elif kind.startswith("outlier dimension"):
        items[:, 0] *= 30
    elif kind == "ids sorted by score":
        items = items[(items @ items[0]).argsort()]
    return items.contiguous()


def queries(B, items, kind="Gaussian"):
    query = torch.randn(B, D, generator=torch.Generator().manual_seed(1))
    if kind == "outlier dimension, ignored":
        query[:, 0] = 0
    return items[0] + 0.1 * query if kind == "ids sorted by score" else query


def torch_full(query, items):
    return torch.topk(query @ items.T, K)


def torch_chunked(query, items):
    """Score 65,536 items at a time in one buffer, and merge the best items of the pieces at the end."""
    buffer = torch.empty(len(query), min(CHUNK, len(items)))
    values, ids = [], []
    for start in range(0, len(items), CHUNK):
        piece = items[start : start + CHUNK]
        out = buffer if len(piece) == buffer.shape[1] else torch.empty(len(query), len(piece))
        best = torch.topk(torch.mm(query, piece.T, out=out), min(K, len(piece)))
        values.append(best.values)
        ids.append(best.indices + start)
    best = torch.topk(torch.cat(values, 1), K)
    return best.values, torch.cat(ids, 1).gather(1, best.indices)


def faiss_settings(*values):
    names = ("blas_threshold", "blas_query_bs", "blas_database_bs", "min_k_reservoir")
    return {f"distance_compute_{name}": value for name, value in zip(names, values, strict=True)}


# The default settings, read before any is changed. They differ between versions of faiss.
FAISS_OWN = {} if faiss is None else {name: getattr(faiss.cvar, name) for name in faiss_settings(0, 0, 0, 0)}
# The defaults, BLAS with large blocks, BLAS with small blocks, and no BLAS.
FAISS_TRIED = (
    FAISS_OWN,
    faiss_settings(1, 4096, 1024, 100),
    faiss_settings(1, 256, 4096, 1),
    faiss_settings(2**30, 4096, 1024, 1),
)


def faiss_flat(items):
    """Return a function that searches an IndexFlatIP of ``items`` under given settings of faiss."""
    index = faiss.IndexFlatIP(D)
    index.add(items.numpy())

    def search(query, settings):
        faiss.omp_set_num_threads(torch.get_num_threads())
        for name, value in settings.items():
            setattr(faiss.cvar, name, value)
        return index.search(query.numpy(), K)

    return search


def fastest(search, query):
    """Return the settings of ``FAISS_TRIED`` under which ``search`` is fastest for ``query``."""
    seconds = [[] for _ in FAISS_TRIED]
    with harness.one_core():
        # The first round warms up and does not count.
        for _ in range(4):
            for settings, taken in zip(FAISS_TRIED, seconds, strict=True):
                began = time.process_time()
                search(query, settings)
                taken.append(time.process_time() - began)
    return FAISS_TRIED[min(range(len(seconds)), key=lambda number: min(seconds[number][1:]))]


def candidates(query, items, *, screened):
    """Return all candidates, after checking the result of each."""
    runs = {
        "torch mm + topk, chunks in a reused buffer": lambda: torch_chunked(query, items),
        "torch mm + topk": lambda: torch_full(query, items),
    }
    if faiss is not None:
        search = faiss_flat(items)
        tuned = fastest(search, query)
        runs["faiss IndexFlatIP"] = lambda: search(query, FAISS_OWN)
        runs["faiss IndexFlatIP, tuned"] = lambda: search(query, tuned)
    runs["native"] = lambda: ops.topk(query, items, K, backend="native")
    index = ops.CatalogIndex(items)
    if screened:
        runs["native, index"] = lambda: ops.topk(query, items, K, index=index, backend="native")
    expected = torch_full(query, items)[1]
    for name, run in runs.items():
        found = torch.as_tensor(run()[1])
        assert (found == expected).double().mean() > 0.999, name
    plain, indexed = ops.topk(query, items, K, backend="native"), ops.topk(query, items, K, index=index, backend="native")
    assert torch.equal(plain[0], indexed[0])
    assert torch.equal(plain[1], indexed[1])
    return runs


@pytest.mark.parametrize(("B", "N"), [(256, 12_101), (256, 100_000), (1, 100_000)])
def test_small(compare, B, N):
    items = catalog("Gaussian", N)
    compare("topk", f"B{B} N{N} D{D} K{K}", candidates(queries(B, items), items, screened=N >= 65_536), CHECK, rounds=7)


@pytest.mark.large
@pytest.mark.parametrize("B", [256, 1])
def test_large(compare, B):
    items = catalog("Gaussian", 1_000_000)
    compare("topk", f"B{B} N1000000 D{D} K{K}", candidates(queries(B, items), items, screened=True), CHECK, rounds=7)


@pytest.mark.large
def test_threads(compare):
    items = catalog("Gaussian", 1_000_000)
    query = queries(256, items)

    def on(threads):
        torch.set_num_threads(threads)
        try:
            return ops.topk(query, items, K, backend="native")
        finally:
            torch.set_num_threads(1)

    assert all(torch.equal(a, b) for a, b in zip(on(1), on(2), strict=True))
    runs = {"native, 1 thread": lambda: on(1), "native, 2 threads": lambda: on(2)}
    check = "both give the same bits"
    compare("topk, wall time", f"B256 N1000000 D{D} K{K}", runs, check, rounds=7, clock=time.perf_counter)


@pytest.mark.large
@pytest.mark.parametrize("N", [12_101, 1_000_000])
def test_share_of_peak(note, N):
    items = catalog("Gaussian", N)
    query = queries(256, items)
    run = lambda: ops.topk(query, items, K, backend="native")  # noqa: E731
    note(harness.share_of_peak("topk", f"B256 N{N} D{D} K{K}", run, 2 * 256 * N * D))


@pytest.mark.large
@pytest.mark.parametrize("kind", ["cone", "outlier dimension", "outlier dimension, ignored", "ids sorted by score"])
def test_hard_catalogs(compare, kind):
    items = catalog(kind, 1_000_000)
    query, index = queries(256, items, kind), ops.CatalogIndex(items)
    runs = {
        "native": lambda: ops.topk(query, items, K, backend="native"),
        "native, index": lambda: ops.topk(query, items, K, index=index, backend="native"),
    }
    plain, indexed = (run() for run in runs.values())
    assert torch.equal(plain[0], indexed[0])
    assert torch.equal(plain[1], indexed[1])
    compare("topk, hard", f"{kind}, B256 N1000000 D{D} K{K}", runs, "the index changes no bit", rounds=7)


_MEMORY = """
import sys, time
from benchmarks.memory import extra_mib
import torch
from lares_fast import ops
torch.set_num_threads(1)
N = int(sys.argv[1])
query, items = torch.randn(256, {D}), torch.randn(N, {D})
ops.topk(query[:1], items[:1000], {K}, backend="native")
began = time.process_time()
extra = extra_mib(lambda: ops.topk(query, items, {K}, backend="native"))
print(extra, time.process_time() - began)
"""


@pytest.mark.large
@pytest.mark.parametrize("N", [1_000_000, 10_000_000])
def test_memory(note, N):
    """Measure the peak memory of one call in its own process, without the inputs."""
    code = _MEMORY.format(D=D, K=K)
    run = subprocess.run([sys.executable, "-c", code, str(N)], capture_output=True, text=True, check=True, cwd=ROOT)
    extra, seconds = map(float, run.stdout.split())
    assert extra <= 32, f"{extra:.1f} MiB"
    shape = f"B256 N{N} D{D} K{K}"
    note([harness.Fact("topk", shape, "peak extra MiB", extra), harness.Fact("topk", shape, "CPU s", seconds)])
