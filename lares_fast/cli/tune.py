"""``lares-fast tune``: benchmark launch settings of the Triton kernels on this GPU, and store the fastest."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

import torch

from lares_fast._errors import InputError
from lares_fast.cli.console import notice
from lares_fast.cli.settings import build
from lares_fast.config import LARESConfig
from lares_fast.train.config import RunConfig
from lares_fast.verify import launch_search, tuning
from lares_fast.verify.comparison import DTYPES


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``tune``."""
    parser.add_argument("--config", metavar="FILE", help="YAML file or preset with the model and the batch size to measure")
    parser.add_argument("--hidden-size", type=int, metavar="D", help="override hidden_size")
    parser.add_argument("--heads", type=int, metavar="H", help="override n_heads")
    parser.add_argument("--longest", type=int, metavar="L", help="override max_len, the number of items of a sequence")
    parser.add_argument(
        "--op", action="append", choices=list(tuning.KERNELS), help="tune only this op; repeatable (default: all)"
    )
    parser.add_argument(
        "--dtype", action="append", choices=list(DTYPES), help="tune this dtype; repeatable (default: float32 and bfloat16)"
    )
    parser.add_argument("--clear", action="store_true", help="remove all stored settings, so that the shipped ones apply")


def command(arguments: Namespace) -> int:
    """Run ``tune``."""
    if arguments.clear:
        print("removed the stored launch settings" if tuning.clear() else "no launch settings were stored")
        return 0
    if not torch.cuda.is_available():
        raise InputError("tune needs a GPU, but no GPU is visible to torch: run it on the machine that has the GPU.")
    config = RunConfig() if arguments.config is None else build(arguments.config)
    flags = {"hidden_size": arguments.hidden_size, "n_heads": arguments.heads, "max_len": arguments.longest}
    given = {name: value for name, value in flags.items() if value is not None}
    model = LARESConfig.preview(**{**config.model, **given})
    device = torch.device("cuda", torch.cuda.current_device())
    for op in arguments.op or tuning.KERNELS:
        for dtype in arguments.dtype or ["float32", "bfloat16"]:
            result = launch_search.tune(op, DTYPES[dtype], device, model, config.spt.batch_size, notice)
            print(f"{op} {dtype}: {result}", flush=True)
    return 0
