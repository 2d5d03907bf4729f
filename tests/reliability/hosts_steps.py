"""Train twenty steps from one seed, ten of each phase, and print a hash of the weights after each phase.

This is a program of its own, so that it can run in another environment or under an emulator: ``python hosts_steps.py``.
"""

import copy
import hashlib
import json
import sys
import time

import torch

import lares_fast
from lares_fast._random import fold, root_key
from lares_fast.data import leave_one_out, synthetic_log
from lares_fast.train import RPT, SPT, RPTConfig, SPTConfig

SEED, STEPS = 7, 10


def weights_hash(model):
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def train(phase, name):
    """Make ten steps of Adam, as the trainer does on the CPU."""
    optimizer = torch.optim.Adam(phase.model.parameters(), lr=1e-3, weight_decay=1e-4)
    phase.train()
    rows = torch.arange(len(phase.rows))
    for step, index in enumerate(rows.split(phase.settings.batch_size)[:STEPS]):
        loss = phase(phase.batch(index, fold(root_key(SEED), name, 0, 1, step, 1)))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    assert step == STEPS - 1


def main(users=100, items=100, batch=8):
    log = synthetic_log(n_users=users, n_items=items, seed=SEED)
    split = leave_one_out(log)
    torch.manual_seed(SEED)
    config = lares_fast.LARESConfig(n_items=log.n_items, similarity="cos", tau=0.07, max_len=20)
    model = lares_fast.LARES(config)
    hashes = {"start": weights_hash(model)}
    began = time.process_time()
    for number, (kind, settings) in enumerate(((SPT, SPTConfig(batch_size=batch)), (RPT, RPTConfig(batch_size=batch))), 1):
        if kind is SPT:
            phase = SPT(model, log, split.train, settings)
        else:
            phase = RPT(model, copy.deepcopy(model), log, split.train, settings)
        train(phase, number)
        hashes[kind.name] = weights_hash(model)
    print(
        json.dumps(
            {
                "hashes": hashes,
                "seconds": round(time.process_time() - began, 2),
                "simd": lares_fast.build_info().get("simd"),
                "aten": torch.backends.cpu.get_cpu_capability(),
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
