"""Choose the device of a model, and turn errors of a GPU into one sentence. Nothing here touches a GPU before it is asked."""

from __future__ import annotations

import difflib
import re
import warnings
from typing import Any, NamedTuple

import torch

from lares_fast import _dispatch
from lares_fast._errors import InputError
from lares_fast._memory import as_size, free_bytes
from lares_fast.ops import _triton

_CUDA = re.compile("cuda(:[0-9]{1,9})?")
# The calls whose kernels decide whether a GPU is taken: an encoder of the published size without gradients, and the softmax
# over the items. A call with other sizes has a self-test of its own before its first use.
_PROBES: dict[str, dict[str, Any]] = {
    "recurrence": {
        "width": 64, "heads": 2, "inner": 256, "adapter": "add", "output": "last", "drop": False, "long": False, "bf16": False,
        "train": False,
    },
    "linear_cross_entropy": {"width": 64, "bf16": False, "train": False},
}  # fmt: skip


class Choice(NamedTuple):
    """A device, and why it was taken, as a clause. ``refused``: there is a GPU, but ``auto`` had to take the CPU."""

    device: torch.device
    reason: str
    refused: bool = False


def resolve(name: str | torch.device) -> torch.device:
    """Return the device that ``name`` asks for: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``. A GPU gets its number.

    ``auto`` is the first GPU whose kernels pass their self-test, else the CPU. ``cuda`` is PyTorch's current GPU. The first
    question for a GPU compiles the kernels of the self-test, which takes some seconds; the result is stored.

    A backend that is requested by name, other than ``auto`` and ``triton``, runs without these kernels. Then they are not
    tested, and with the backend ``native`` the device of ``auto`` is the CPU.

    Raises :class:`InputError` for an unknown name, and for a GPU that is missing, cannot be used, or cannot run the kernels.
    """
    return choose(name).device


def choose(name: str | torch.device) -> Choice:
    """Return the device of :func:`resolve`, and why it was taken. Raises the errors of :func:`resolve`."""
    name = str(name)
    if name == "auto":
        return _automatic()
    if name == "cpu":
        return Choice(torch.device("cpu"), "it was requested")
    if not _CUDA.fullmatch(name):
        raise InputError(f"device must be auto, cpu, cuda or cuda:N, but got {name!r:.40}{_hint(name)}")
    if (why := _no_gpu()) is not None:
        raise InputError(f"the device {name!r} cannot be used, because {why}, or choose the device 'cpu'.")
    count = torch.cuda.device_count()
    number = int(name.partition(":")[2] or torch.cuda.current_device())
    if number >= count:
        there = "1 GPU, cuda:0" if count == 1 else f"{count} GPUs, cuda:0 to cuda:{count - 1}"
        raise InputError(f"the device {name!r} does not exist: PyTorch sees {there}.")
    device = torch.device("cuda", number)
    if (why := _refusal(device)) is not None:
        raise InputError(f"the device {name!r} cannot be used, because {why}, or choose the device 'cpu'.")
    return Choice(device, f"it was requested, and {_passed(device)}")


def _hint(name: str) -> str:
    """Return the end of the sentence about the unknown device ``name``: the nearest known name, if one is near."""
    meant = name.lower().replace("gpu", "cuda")
    near = [meant] if _CUDA.fullmatch(meant) else difflib.get_close_matches(meant, ("auto", "cpu", "cuda", "cuda:0"), 1, 0.5)
    return f"; did you mean {near[0]!r}?" if near else "."


def _automatic() -> Choice:
    cpu = torch.device("cpu")
    if _dispatch.requested(None) == "native":
        return Choice(cpu, "the backend 'native' is requested, and it runs on the CPU")
    if (why := _no_gpu()) is not None:
        return Choice(cpu, why)
    refusals = []
    for number in range(torch.cuda.device_count()):
        device = torch.device("cuda", number)
        if (why := _refusal(device)) is None:
            return Choice(device, _passed(device))
        refusals.append(f"{device} cannot be used, because {why}")
    return Choice(cpu, "; ".join(refusals), refused=True)


def _passed(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device)
    if _needs_kernels():
        return f"the kernels passed their self-test on {name}"
    return f"the backend {_dispatch.requested(None)!r} runs on {name} without a self-test"


def _no_gpu() -> str | None:
    """Return why PyTorch has no GPU, as a clause with the remedy, or ``None``."""
    with warnings.catch_warnings():
        # With an old driver PyTorch warns here. The error of init says the same.
        warnings.simplefilter("ignore")
        if torch.cuda.is_available() and torch.cuda.device_count():
            return None
    if torch.version.cuda is None and torch.version.hip is None:
        return "this PyTorch was built for the CPU only: install a build with CUDA (https://pytorch.org)"
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return _unusable(error)
    return "no GPU is visible to PyTorch: check nvidia-smi and CUDA_VISIBLE_DEVICES"


def _refusal(device: torch.device) -> str | None:
    """Return why the model cannot run on ``device``, as a clause with the remedy, or ``None``."""
    try:
        probe = _probe(device)
        for op, variant in _PROBES.items() if _needs_kernels() else ():
            if (why := _triton.refusal(op, probe, **variant)) is not None:
                remedy = "set LARES_FAST_BACKEND=reference to run PyTorch's operations, which are slower"
                if "triton is not installed" in why:
                    remedy = f'run pip install "lares_fast[triton]", {remedy}'
                return f"the backend 'triton' cannot run {op} on it ({why}): {remedy}"
    except RuntimeError as error:
        return _unusable(error)
    return None


def _probe(device: torch.device) -> torch.Tensor:
    """Return a tensor on ``device``. The first one needs some memory, and the consent of the driver."""
    return torch.empty(1, device=device)


def _needs_kernels() -> bool:
    return _dispatch.requested(None) in ("auto", "triton")


def _unusable(error: RuntimeError) -> str:
    """Return the ``error`` of a GPU that cannot be used, as a clause with the remedy."""
    text = " ".join(str(error).split())
    if "too old" in text:
        found = re.search(r"found version (\d+)", text)
        version = f" (it supports CUDA {int(found[1]) // 1000}.{int(found[1]) % 1000 // 10})" if found else ""
        return (
            f"the NVIDIA driver is too old{version} for this PyTorch, which was built for CUDA {torch.version.cuda}: "
            "update the driver, install a PyTorch for an older CUDA"
        )
    if "forked" in text:
        return "CUDA was used before this process was forked: start processes with the method 'spawn'"
    if "busy or unavailable" in text:
        return (
            "another process holds the GPU for itself (exclusive mode): wait until it ends, or let processes share the GPU "
            "with nvidia-smi -c DEFAULT"
        )
    if out_of_memory(error):
        return "its memory is in use by other processes: end one of them (nvidia-smi lists them)"
    if "NVIDIA driver" in text:
        return "there is no NVIDIA driver on this machine: install it"
    if "No CUDA GPUs" in text:
        return "no GPU is visible to PyTorch: check nvidia-smi and CUDA_VISIBLE_DEVICES"
    return f"CUDA cannot be used here ({text[:200].rstrip('. ')}): check nvidia-smi"


def out_of_memory(error: RuntimeError) -> bool:
    """Return whether ``error`` says that the memory of a GPU is not enough."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in str(error)


def require_memory(device: torch.device, needed: int, what: str) -> None:
    """Raise :class:`InputError` if the memory of ``device`` that is free is less than ``needed`` bytes, for ``what``."""
    if (free := free_bytes(device)) < needed:
        where, others = ("", "other programs") if device.type == "cpu" else (f" on {device}", "other processes on this GPU")
        raise InputError(
            f"{what} needs {as_size(needed)}{where}, where {as_size(free)} are free: end {others}, or choose another device."
        )
