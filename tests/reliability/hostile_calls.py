"""Call every function of the native module with hostile arguments: ``python -m tests.reliability.hostile_calls SEED CALLS``.

A call starts from valid arguments in memory of exactly their size. Then some arguments become another type, a number out of
range, a null address, or a wrong value in an array, and some are left out or added. The module trusts its caller about
addresses and the memory behind them, and checks everything else. So a size becomes smaller, or larger than the limits of the
native code. The program ends with an error if memory around an array changes, if a refused call writes, or if an error has an
unexpected type. Call number i depends on SEED and i alone, and is written to the file ``--at`` before it is made.
"""

from __future__ import annotations

import argparse
import mmap
import random
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from lares_fast import _native
from tests.reliability.hostile_values import REFUSED, hostile, wrong_number

GUARD = 64
Arguments = dict[str, Any]


class Memory:
    """The arrays of one call. Each lies between two guards."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.arrays: dict[int, np.ndarray] = {}
        self.written: list[tuple[np.ndarray, bytes]] = []

    def array(self, values: Any, dtype: str) -> tuple[int, np.ndarray]:
        """Return the address and the array of ``values``."""
        values = np.asarray(values, dtype)
        whole = np.full(values.nbytes + 2 * GUARD, 0xA5, np.uint8)
        inner = whole[GUARD : GUARD + values.nbytes].view(values.dtype)
        inner[:] = values
        address = int(whole.ctypes.data) + GUARD
        self.arrays[address] = whole
        return address, inner

    def floats(self, count: int, dtype: str = "f4") -> int:
        """Return the address of ``count`` numbers, some of which may not be finite."""
        values = np.random.default_rng(self.rng.getrandbits(32)).standard_normal(count)
        if count and self.rng.random() < 0.1:
            values[self.rng.randrange(count)] = self.rng.choice([np.nan, np.inf, -np.inf, 1e30])
        return self.array(values, dtype)[0]

    def ids(self, count: int, limit: int, wrong: float = 0.05) -> int:
        """Return the address of ``count`` integers in [0, limit), one of which is wrong in a share ``wrong`` of the cases."""
        values = [self.rng.randrange(limit) if limit > 0 else 0 for _ in range(count)]
        if count and self.rng.random() < wrong:
            values[self.rng.randrange(count)] = wrong_number(self.rng)
        return self.array(values, "i8")[0]

    def out(self, count: int, dtype: str) -> int:
        """Return the address of an output of ``count`` elements."""
        address, inner = self.array(np.zeros(count), dtype)
        self.written.append((inner, inner.tobytes()))
        return address

    def check(self, refused: bool) -> None:
        """Raise :class:`AssertionError` if a guard has changed, or an output of a refused call."""
        for whole in self.arrays.values():
            guards = np.concatenate([whole[:GUARD], whole[len(whole) - GUARD :]])
            assert (guards == 0xA5).all(), "memory beside an array changed"
        if refused:
            assert all(inner.tobytes() == before for inner, before in self.written), "a refused call wrote an output"


def catalog(m: Memory) -> Arguments:
    """Return what the catalog functions share."""
    B, N, D = m.rng.randint(0, 4), m.rng.randint(0, 60), m.rng.choice([0, 1, 3, 8, 17])
    call = {"query": m.floats(B * D), "items": m.floats(N * D), "bias": m.rng.choice([0, m.floats(N)]), "B": B, "N": N, "D": D}
    cuts = [0, *np.cumsum([m.rng.randint(0, 3) if N else 0 for _ in range(B)]).tolist()]
    lists = {"exclude_offsets": m.array(cuts, "i8")[0], "exclude_ids": m.ids(cuts[-1], N)}
    if m.rng.random() < 0.05 and B:
        # Smaller offsets stay within the ids.
        cuts[m.rng.randrange(len(cuts))] = m.rng.choice([-1, -(2**63), 0, cuts[-1]])
        lists["exclude_offsets"] = m.array(cuts, "i8")[0]
    return {**call, **(lists if m.rng.random() < 0.6 else dict.fromkeys(lists, 0)), "threads": m.rng.randint(1, 3)}


def tables(m: Memory, N: int, D: int) -> Arguments:
    """Return the tables of an index of N items of width D."""
    panel, panels, coded_panel, coded_panels, code_bytes, lane_bytes = _native.load().index_shape(N=N, D=D)
    codes = coded_panels * coded_panel
    return {
        "centre": m.array(np.zeros(D), "f4")[0],
        "scale": m.array(np.ones(D), "f4")[0],
        "panels": m.out(panels * D * panel, "f4"),
        "codes": m.out(codes * code_bytes, "i1") if codes else 0,
        "start": m.out(codes * lane_bytes, "i1") if codes else 0,
        "bounds": m.out(coded_panels * 4, "f4") if codes else 0,
    }


def topk(m: Memory) -> Arguments:
    """Return a call of ``topk``, sometimes with an index."""
    call, k = catalog(m), m.rng.randint(1, 9)
    B, N, D = call["B"], call["N"], call["D"]
    if m.rng.random() < 0.2:
        index = tables(m, N, D)
        _native.load().build_index(items=call["items"], N=N, D=D, threads=1, **index)
        m.written.clear()
        call |= {f"index_{name}": address for name, address in index.items()}
    return {**call, "k": k, "scores": m.out(B * k, "f4"), "ids": m.out(B * k, "i8")}


def build_index(m: Memory) -> Arguments:
    """Return a call of ``build_index``, sometimes with codes."""
    N, D = m.rng.choice([0, 1, 25, 60, 60, 60, 33000 if m.rng.random() < 0.05 else 24]), m.rng.choice([0, 1, 3, 17])
    return {"items": m.floats(N * D), "N": N, "D": D, "threads": m.rng.randint(1, 3), **tables(m, N, D)}


def target_rank(m: Memory) -> Arguments:
    """Return a call of ``target_rank``."""
    call = catalog(m)
    outputs = {"rank": m.out(call["B"], "i8"), "rank_of_all": m.out(call["B"], "i8")}
    return {**call, "target": m.ids(call["B"], call["N"]), **outputs, "ties_by_id": m.rng.random() < 0.5}


def softmax(m: Memory) -> Arguments:
    """Return what both directions of the cross entropy share."""
    M, N, D = m.rng.randint(0, 5), m.rng.randint(1, 60), m.rng.choice([0, 1, 3, 8, 17])
    rows = {"hidden": m.floats(M * D), "items": m.floats(N * D), "target": m.ids(M, N), "M": M, "N": N, "D": D}
    scale = m.rng.choice([1.0, 1 / 0.07, 0.0, -1.0, float("nan"), float("inf"), 1e300])
    return {**rows, "scale": scale if m.rng.random() < 0.2 else 1.0, "skip_pad": False, "threads": m.rng.randint(1, 3)}


def target_logprob(m: Memory) -> Arguments:
    """Return a call of ``target_logprob``."""
    call = softmax(m)
    M = call["M"]
    rank = m.rng.choice([0, m.out(M, "i8")])
    return {**call, "logprob": m.out(M, "f4"), "lse": m.out(2 * M, "f8"), "rank": rank, "ties_by_id": True}


def target_logprob_backward(m: Memory) -> Arguments:
    """Return a call of ``target_logprob_backward``."""
    call = softmax(m)
    M, N, D = call["M"], call["N"], call["D"]
    outputs = {"d_hidden": m.out(M * D, "f4"), "d_items": m.out(N * D, "f4")}
    return {**call, "grad": m.floats(M), "lse": m.floats(2 * M, "f8"), **outputs}


ADAPTERS = {"none": [], "add": [16, 16], "linear": [1, 16, 16], "concat": [512, 16, 16, 16]}
LAYER = [256, 16] * 4 + [16, 16, 256, 16, 256, 16, 16, 16]


def recurrence(m: Memory) -> Arguments:
    """Return what both directions of the recurrence share. The outputs suffice for each kind of output."""
    B, layers = m.rng.randint(0, 3), m.rng.randint(1, 2)
    offsets = np.concatenate([[0], np.cumsum([m.rng.randint(1, 5) for _ in range(B)])]).astype(np.int64)
    depth = [m.rng.randint(1, 2) for _ in range(B)]
    P = int(offsets[-1])
    if B and m.rng.random() < 0.1:
        offsets[m.rng.randrange(B + 1)] = m.rng.choice([-1, -(2**63), 0])
    if B and m.rng.random() < 0.1:
        depth[m.rng.randrange(B)] = m.rng.choice([0, -1, 65536, 2**63 - 1, -(2**63)])
    adapter = m.rng.choice(list(ADAPTERS))
    return {
        "adapter": adapter, "output": m.rng.choice(["last", "steps", "tokens"]), "key": (m.rng.getrandbits(32), 7),
        "hidden_threshold": m.rng.choice([0, 6554]), "attention_threshold": m.rng.choice([0, 6554]), "first_step": 1,
        "width": 16, "n_heads": m.rng.choice([1, 2, 16]), "inner_size": 16, "n_layers": layers, "eps": 1e-12,
        "h": m.floats(P * 16), "pre": m.floats(P * 16), "offsets": m.array(offsets, "i8")[0],
        "depth": m.array(depth, "i8")[0], "rows": m.ids(B, 2**32), "batch": B, "bf16": False, "threads": m.rng.randint(1, 3),
        "tape": m.floats(2 * P * layers * 34), "weights": [m.floats(size) for size in ADAPTERS[adapter] + LAYER * layers],
    }  # fmt: skip


def recurrence_forward(m: Memory) -> Arguments:
    """Return a call of ``recurrence_forward``."""
    call = recurrence(m)
    bf16 = m.rng.random() < 0.2
    return {**call, "tape": 0 if bf16 else call["tape"], "bf16": bf16, "out": m.out(2 * 3 * 5 * 16, "f4")}


def recurrence_backward(m: Memory) -> Arguments:
    """Return a call of ``recurrence_backward``."""
    call = recurrence(m)
    sizes = ADAPTERS[call["adapter"]] + LAYER * call["n_layers"]
    outputs = {"h_grad": m.out(3 * 5 * 16, "f4"), "pre_grad": m.out(3 * 5 * 16, "f4")}
    return {**call, **outputs, "out_grad": m.floats(2 * 3 * 5 * 16), "weight_grads": [m.out(size, "f4") for size in sizes]}


def keep_hidden(m: Memory) -> Arguments:
    """Return a call of ``keep_hidden``."""
    P, D = m.rng.randint(0, 4), m.rng.choice([0, 1, 64, 65])
    where = {"threshold": 6554, "step": 3, "layer": 1, "site": 2, "rows": m.ids(P, 2**32), "positions": m.ids(P, 2**32)}
    return {"key": (1, 2), **where, "P": P, "D": D, "keep": m.out(P * D, "u1")}


def state_uniforms(m: Memory) -> Arguments:
    """Return a call of ``state_uniforms``."""
    P, D = m.rng.randint(0, 4), m.rng.choice([0, 1, 64, 65])
    return {
        "key": (1, 2), "rows": m.ids(P, 2**32), "positions": m.ids(P, 2**32), "P": P, "D": D, "uniforms": m.out(P * D, "f8"),
    }  # fmt: skip


def keep_attention(m: Memory) -> Arguments:
    """Return a call of ``keep_attention``."""
    B, H, L = m.rng.randint(0, 3), m.rng.randint(0, 2), m.rng.choice([0, 1, 17])
    where = {"threshold": 6554, "step": 3, "layer": 1, "rows": m.ids(B, 2**32)}
    return {"key": (1, 2), **where, "B": B, "H": H, "L": L, "keep": m.out(B * H * L * L, "u1")}


LIMITS = (132, 232448, 233472)
# Each function, and how its arguments are made. The functions of CUDA devices are left out: they read device memory.
CALLS: dict[str, Callable[[Memory], Arguments]] = {
    "topk": topk, "build_index": build_index, "target_rank": target_rank, "target_logprob": target_logprob,
    "target_logprob_backward": target_logprob_backward, "recurrence_forward": recurrence_forward,
    "recurrence_backward": recurrence_backward, "keep_hidden": keep_hidden, "state_uniforms": state_uniforms,
    "keep_attention": keep_attention,
    "index_shape": lambda m: {"N": m.rng.choice([0, 5, 2**20]), "D": m.rng.choice([0, 5, 512])},
    "plan_topk": lambda m: {"B": 5, "N": m.rng.choice([0, 2**20]), "D": 64, "k": 10, "limits": LIMITS},
    "plan_target_rank": lambda m: {"B": 5, "N": m.rng.choice([0, 2**20]), "D": 64, "limits": LIMITS},
    "philox": lambda m: {"counter": (1, 2, 3, 4), "key": (1, 2)},
    "use_level": lambda m: {"name": m.rng.choice(["auto", "generic", "avx2", "avx512", "amx", "sse"])},
    "level": lambda m: {}, "has_bf16": lambda m: {}, "build_info": lambda m: {},
}  # fmt: skip


def one_call(seed: str, plant: str = "") -> str:
    """Make the call that ``seed`` describes, and return its function and whether it was accepted."""
    rng = random.Random(seed)
    memory, name = Memory(rng), rng.choice(list(CALLS))
    arguments = CALLS[name](memory)
    if rng.random() < 0.7:
        hostile(rng, arguments)
    refused = False
    try:
        getattr(_native.load(), name)(**arguments)
    except REFUSED:
        refused = True
    if plant == "write":
        whole = next(iter(memory.arrays.values()), np.zeros(GUARD, np.uint8))
        whole[GUARD - 1] = 0
    memory.check(refused)
    return f"{name} {'refused' if refused else 'accepted'}"


def main() -> None:
    """Make the calls, and print how many each function has accepted and refused."""
    parser = argparse.ArgumentParser()
    parser.add_argument("seed")
    parser.add_argument("calls", type=int)
    parser.add_argument("--first", type=int, default=0, help="the number of the first call")
    parser.add_argument("--at", help="the file to which the number of the call is written")
    parser.add_argument("--plant", choices=["crash", "write"], default="", help="a fault that must be noticed")
    given = parser.parse_args()
    place = None
    if given.at:
        with open(given.at, "w+b") as file:
            file.write(bytes(8))
            file.flush()
            place = mmap.mmap(file.fileno(), 8)
    total: Counter[str] = Counter()
    for i in range(given.first, given.first + given.calls):
        if place is not None:
            place[:] = i.to_bytes(8, "little")
        if given.plant == "crash" and i == given.first + given.calls - 1:
            # An address without memory, which the module cannot notice.
            _native.load().state_uniforms(key=(1, 2), rows=8, positions=8, P=1, D=1, uniforms=8)
        total[one_call(f"{given.seed}/{i}", given.plant)] += 1
    for what, count in sorted(total.items()):
        print(what, count)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
