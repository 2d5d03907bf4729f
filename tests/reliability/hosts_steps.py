"""Train twenty steps from one seed, ten of each phase, and print a hash of the weights after each phase.

This is a program of its own, so that it can run in another environment or under an emulator: ``python hosts_steps.py``.
"""

import copy
import hashlib
import json
import sys
import time
from pathlib import Path

import torch

import lares_fast
from lares_fast._random import fold, root_key
from lares_fast.data import leave_one_out, synthetic_log
from lares_fast.train import RPT, SPT, RPTConfig, SPTConfig
from lares_fast.train.optimizer import adam

SEED, STEPS = 7, 10


def weights_hash(model):
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def train(phase, number):
    """Make ten steps of Adam, as the trainer does on the CPU. Return the CPU seconds of the last nine."""
    optimizer = adam(phase.model, phase.settings, None, Path())
    phase.train()
    rows = torch.arange(STEPS * phase.settings.batch_size)
    for step, index in enumerate(rows.split(phase.settings.batch_size)):
        if step == 1:
            began = time.process_time()
        loss = phase(phase.batch(index, fold(root_key(SEED), number, 0, 1, step, 1)))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return time.process_time() - began


def main(users=100, items=100, batch=4, width=32):
    log = synthetic_log(n_users=users, n_items=items, seed=SEED)
    split = leave_one_out(log)
    torch.manual_seed(SEED)
    config = lares_fast.LARESConfig(n_items=log.n_items, hidden_size=width, inner_size=4 * width, similarity="cos", tau=0.07)
    model = lares_fast.LARES(config)
    hashes = {"start": weights_hash(model)}
    phase = SPT(model, log, split.train, SPTConfig(batch_size=batch, lr=1e-3))
    seconds = train(phase, 1)
    hashes["spt"] = weights_hash(model)
    phase = RPT(model, copy.deepcopy(model), log, split.train, RPTConfig(batch_size=batch, group_size=4, lr=1e-3))
    seconds += train(phase, 2)
    hashes["rpt"] = weights_hash(model)
    found = {"hashes": hashes, "seconds": seconds, "simd": lares_fast.build_info().get("simd"), "torch": torch.__version__}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
