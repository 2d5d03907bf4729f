"""Call the ops of the native module once each, and print the SIMD level and a hash of each result as JSON.

This is a program of its own that needs neither torch nor NumPy, so that it can run under an emulator of a very old CPU.
"""

import hashlib
import json
import random
from array import array

from lares_fast import _native

SEED = 11
# Numbers after each result, which must stay as they are.
GUARD = [7] * 16


class Case:
    """Numbers for one call of each op, and arrays for the results."""

    def __init__(self):
        self._random = random.Random(SEED)
        self._arrays = {}

    def normal(self, name, n, deviation=1.0, mean=0.0):
        """Return the address of ``n`` new floats. Sums of integers have the same bits on every CPU."""
        numbers = (sum(self._random.getrandbits(16) for _ in range(4)) - 131070 for _ in range(n))
        return self._keep(name, array("f", [mean + deviation * x / 32768.0 for x in numbers]))

    def integers(self, name, values):
        return self._keep(name, array("q", values))

    def out(self, name, n, kind="f"):
        return self._keep(name, array(kind, [0] * n + GUARD))

    def hash(self, *names):
        digest = hashlib.sha256()
        for name in names:
            values = self._arrays[name]
            if values[-len(GUARD) :].tolist() != GUARD:
                raise SystemExit(f"a call has written beyond its result {name}")
            digest.update(values.tobytes())
        return digest.hexdigest()[:16]

    def _keep(self, name, values):
        self._arrays[name] = values
        return values.buffer_info()[0]


def catalog(module, hashes, M=37, N=1300, D=64, k=20):
    case = Case()
    hidden, items = case.normal("hidden", M * D, 0.3), case.normal("items", N * D, 0.3)
    target = case.integers("target", [1 + 31 * m % (N - 1) for m in range(M)])
    softmax = {"hidden": hidden, "items": items, "target": target, "M": M, "N": N, "D": D, "scale": 1 / 0.07, "skip_pad": True}
    lse = case.out("lse", 2 * M, "d")
    module.target_logprob(
        **softmax, logprob=case.out("logprob", M), lse=lse, rank=case.out("rank", M, "q"), ties_by_id=True, threads=1
    )
    out = {"d_hidden": case.out("d_hidden", M * D), "d_items": case.out("d_items", N * D)}
    module.target_logprob_backward(**softmax, grad=case.normal("grad", M), lse=lse, **out, threads=1)
    hashes["linear_cross_entropy"] = case.hash("logprob", "lse", "rank")
    hashes["linear_cross_entropy_backward"] = case.hash("d_hidden", "d_items")
    rows = {"query": hidden, "items": items, "bias": 0, "exclude_offsets": 0, "exclude_ids": 0, "B": M, "N": N, "D": D}
    module.topk(**rows, k=k, scores=case.out("scores", M * k), ids=case.out("ids", M * k, "q"), threads=1)
    hashes["topk"] = case.hash("scores", "ids")
    rank = {"rank": case.out("ranks", M, "q"), "rank_of_all": case.out("all", M, "q")}
    module.target_rank(**rows, target=target, ties_by_id=True, **rank, threads=1)
    hashes["target_rank"] = case.hash("ranks", "all")


def recurrence(module, hashes, D=64, inner=128, heads=2, layers=2):
    case, lengths, depth = Case(), (1, 5, 20, 17, 8), (3, 1, 2, 3, 3)
    offsets = [sum(lengths[:b]) for b in range(len(lengths) + 1)]
    shapes = [(D, 1.0), (D, 0.0)]
    for _ in range(layers):
        square = [(D * D, None), (D, 0.0)]
        shapes += [
            *square * 4,
            (D, 1.0),
            (D, 0.0),
            (inner * D, None),
            (inner, 0.0),
            (D * inner, None),
            (D, 0.0),
            (D, 1.0),
            (D, 0.0),
        ]
    weights = [case.normal(f"w{i}", n, 0.1, 0.0 if mean is None else mean) for i, (n, mean) in enumerate(shapes)]
    P, steps = offsets[-1], sum(depth)
    rows = sum(length * t * layers - (length - 1) for length, t in zip(lengths, depth, strict=True))
    call = {
        "adapter": "add", "output": "steps", "key": (5, 6), "hidden_threshold": 6554, "attention_threshold": 6554,
        "first_step": 1, "width": D, "n_heads": heads, "inner_size": inner, "n_layers": layers, "eps": 1e-12,
        "h": case.normal("h", P * D), "pre": case.normal("pre", P * D), "offsets": case.integers("offsets", offsets),
        "depth": case.integers("depth", depth), "rows": case.integers("rows", range(len(depth))), "batch": len(depth),
        "tape": case.out("tape", rows * (2 * D + 2)), "bf16": False, "threads": 1, "weights": weights,
    }  # fmt: skip
    module.recurrence_forward(**call, out=case.out("out", steps * D))
    grads = [case.out(f"g{i}", n) for i, (n, _) in enumerate(shapes)]
    gradient = {"h_grad": case.out("h_grad", P * D), "pre_grad": case.out("pre_grad", P * D), "weight_grads": grads}
    module.recurrence_backward(**call, out_grad=case.normal("out_grad", steps * D), **gradient)
    hashes["recurrence"] = case.hash("out")
    hashes["recurrence_backward"] = case.hash("h_grad", "pre_grad", *(f"g{i}" for i in range(len(shapes))))


if __name__ == "__main__":
    module, found = _native.load(), {}
    catalog(module, found)
    recurrence(module, found)
    print(json.dumps({"level": module.level(), "hashes": found}))
