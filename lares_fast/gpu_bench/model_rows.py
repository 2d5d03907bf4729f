"""Rows of the whole model without gradients: ``encode``, and the evaluation of a split."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lares_fast import LARES, LARESConfig, reference
from lares_fast._random import Draw
from lares_fast.data import leave_one_out, make_batch
from lares_fast.gpu_bench import cases, official, packed_model
from lares_fast.gpu_bench.candidates import BF16, BOUND, FP32, NOT_EXACT, OURS, Candidates, Result, near
from lares_fast.gpu_bench.machine import Call, Machine
from lares_fast.sequences import Sequences, unpad
from lares_fast.train import model_ranks
from lares_fast.train.keys import evaluation_key

T, L = 4, 20
# Modes of torch.compile that are tried. Without gradients a captured mode is always faster than the default mode.
_MODES = ("reduce-overhead", "max-autotune")
# Rows of an evaluation that are compared with fp64, and the rows that are ranked at once.
_CHECKED, _BATCH = 256, 2048


def encode_flops(config: LARESConfig, tokens: int, layers: int) -> int:
    """Return the operations of ``layers`` layers on ``tokens`` packed tokens, forward and without attention scores."""
    return tokens * layers * 2 * (4 * config.hidden_size**2 + 2 * config.hidden_size * config.inner_size)


@torch.no_grad()
def encode(machine: Machine, B: int, dtype: torch.dtype) -> Result:
    """Time the encoding of B sequences with the lengths of Instruments, 2+2 layers. Only lares_fast draws h0 in its time."""
    dtype, device, B = FP32 if machine.rehearse else dtype, machine.device, machine.batch(B)
    config = LARESConfig(n_items=cases.N)
    torch.manual_seed(0)
    exact = reference.LARES(config).eval()
    ours = LARES(config, bf16=dtype == BF16)
    eager, packed = official.OfficialLARES(config), packed_model.PackedLARES(config, sdpa=True)
    for model in (ours, eager, packed):
        model.load_state_dict(exact.state_dict())
        model.eval().to(device)
    padded = cases.sequences("instruments", B, L)
    state = exact.initial_state(exact._default_draw(B), L)
    sequences, on_device = Sequences.from_padded(*padded), (padded[0].to(device), padded[1].to(device))
    before, given = packed_model.pack(*padded, device=device), (unpad(state, sequences.offsets).to(device), state.to(device))
    check = near([exact.double().to(device).encode(*on_device, num_steps=T)], 2 * BOUND[dtype])

    def rounded(call: Call) -> Call:
        def run() -> Tensor:
            with torch.autocast(device.type, BF16, enabled=dtype == BF16):
                torch.compiler.cudagraph_mark_step_begin()
                states: Tensor = call()[:, -1]
                return states

        return run

    row = Candidates(machine)
    row.add("official way", rounded(partial(eager.encode, *on_device, T, given[1])), check)
    row.add_captured("official way", check)
    row.add("packed torch, SDPA", rounded(partial(packed.encode_packed, before, T, given[0])), check)
    row.add_captured("packed torch, SDPA", check)
    for mode in () if machine.rehearse else _MODES:
        compiled = official.OfficialLARES(config).eval().to(device)
        compiled.load_state_dict(eager.state_dict())
        official.compile_parts(compiled, mode)
        row.add(f"official way, compiled ({mode})", rounded(partial(compiled.encode, *on_device, T, given[1])), check)
    # Offsets on the CPU spare a wait for the GPU.
    row.add(OURS, partial(ours.encode, sequences.items.to(device), sequences.offsets, num_steps=T), check)
    # A graph needs offsets, depths and random addresses on the device.
    items, offsets = (x.to(device) for x in sequences)
    draw, depth = exact._default_draw(B), torch.full((1, B), T, device=device)
    draw = Draw(draw.seed(device), draw.rows.to(device))
    row.add_captured(OURS, check, lambda: ours.trajectories(items, offsets, depth, draw=draw, deepest=T)[T - 1 :: T])
    tokens, bytes_each = len(sequences.items), 2 if dtype == BF16 else 4
    flops = encode_flops(config, tokens, config.n_pre_layers + T * config.n_core_layers)
    moved = bytes_each * config.hidden_size * (2 * tokens + B)
    return row.result({"bf16" if dtype == BF16 else "fp32": flops, "bytes": moved}, rows=B)


@torch.no_grad()
def evaluation(machine: Machine) -> Result:
    """Time the ranking of all validation rows of a log with the size of Instruments among all items, in fp32."""
    log = cases.instruments_log(60, 300) if machine.rehearse else cases.instruments_log()
    device, config, rows = machine.device, LARESConfig(n_items=log.n_items), leave_one_out(log).valid
    torch.manual_seed(0)
    exact, key = reference.LARES(config).eval(), evaluation_key(0)
    ours, eager = LARES(config), official.OfficialLARES(config)
    for model in (ours, eager):
        model.load_state_dict(exact.state_dict())
        model.eval().to(device)
    everything = make_batch(log, rows, torch.arange(len(rows)), L)
    items, lengths = (x.to(device) for x in everything.sequences.padded(L))
    target, sample = everything.target.to(device), torch.arange(0, len(rows), max(1, len(rows) // _CHECKED))
    draw = Draw(key, sample)
    state = exact.initial_state(draw, L).to(device)
    exact = exact.double().to(device)
    hidden = exact.encode(items[sample.to(device)], lengths[sample.to(device)], num_steps=T, draw=draw)
    truth = _ranks(hidden, exact.item_embedding.weight, target[sample.to(device)])

    def check(found: Tensor) -> list[str]:
        # Scores that are nearly equal in fp32 may change a rank.
        off = int((found.to(device) - truth).abs().max())
        return [] if off <= 2 + 1e-4 * log.n_items else [f"ranks are wrong by up to {off}"]

    def official_ranks(index: Tensor, state: Tensor | None = None, *, bf16: bool = False) -> Tensor:
        ranks = []
        with torch.autocast(device.type, BF16, enabled=bf16):
            for part in index.split(_BATCH):
                hidden = eager.encode(items[part], lengths[part], T, state)[:, -1]
                ranks.append(_ranks(hidden, eager.item_embedding.weight, target[part]))
        return torch.cat(ranks)

    def our_ranks() -> Tensor:
        found = model_ranks(ours, log, rows, key=key, num_steps=T, batch_size=_BATCH)
        return found["not masked"][sample]

    row, every = Candidates(machine), torch.arange(len(rows), device=device)
    sampled = partial(official_ranks, sample.to(device), state)
    row.add("official way", partial(official_ranks, every), check, sampled)
    row.add(f"official way, autocast bf16 {NOT_EXACT}", partial(official_ranks, every, bf16=True), check, sampled)
    row.add(OURS, our_ranks, check)
    tokens = len(everything.items)
    flops = encode_flops(config, tokens, config.n_pre_layers + T * config.n_core_layers)
    return row.result({"fp32": flops, "tf32": 6 * len(rows) * log.n_items * config.hidden_size}, rows=len(rows))


def _ranks(hidden: Tensor, items: Tensor, target: Tensor) -> Tensor:
    """Return the rank of each target among all items but PAD."""
    scores = hidden @ items.T
    scores[:, 0] = -torch.inf
    return (scores > scores.gather(1, target[:, None])).sum(1)
