"""Replay the launches of a training step from CUDA graphs, one graph for each size of batch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from lares_fast import _device
from lares_fast._dispatch import requested
from lares_fast.train.parcel import Parcel

# The most graphs that are kept. Each holds some memory on the GPU.
MOST_GRAPHS = 18

# Records the launches of a function without running them, and returns a function that runs them.
Capture = Callable[[Callable[[], None]], Callable[[], None]]


class CudaCapture:
    """Captures graphs on one GPU. They share their memory, because only one of them runs at a time."""

    # Graphs whose capture failed. PyTorch may still refer to them when it allocates memory.
    failed: ClassVar[list[torch.cuda.CUDAGraph]] = []

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool, self._stream = device, torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """Capture the launches of ``function``, and return their replay."""
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        try:
            with torch.cuda.device(self._device), torch.cuda.graph(graph, self._pool, self._stream):
                function()
        except RuntimeError:
            self.failed.append(graph)
            raise
        finally:
            # A capture that fails may leave its own stream as the current one.
            torch.cuda.set_stream(before)
        return graph.replay

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Run the launches of the ``with`` block on the stream of the captures, in order with the launches around the block.

        Autograd may keep the stream of a parameter's first gradient, and a capture must not wait for another stream. So the
        steps that run launch by launch need the same stream.
        """
        around = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(around)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            around.wait_stream(self._stream)


def capture_on(device: torch.device, backend: str | None) -> CudaCapture | None:
    """Return what captures graphs on ``device``, for a model with this ``backend``.

    It is ``None`` if the device is no GPU, if the kernels are not used, because other backends wait for the GPU, and after a
    capture that failed in this process.
    """
    possible = device.type == "cuda" and requested(backend) in ("auto", "triton") and not CudaCapture.failed
    return CudaCapture(device) if possible else None


class Graphs:
    """Runs ``step`` on the content of parcels.

    The first step of a key runs launch by launch: it also compiles and tests the kernels. The second one is captured and
    replayed, and all later ones are replayed. Replays give the bits that ``step`` gives. ``step`` must read nothing from the
    host that changes from parcel to parcel, except what :attr:`Parcel.key` has, and must leave no result in temporary memory.

    ``capture`` is ``None`` to run every step launch by launch. If a capture fails, all further steps run in this way, and
    ``tell`` is called with a sentence about it.
    """

    def __init__(
        self,
        step: Callable[[Any], None],
        device: torch.device,
        capture: Capture | None,
        tell: Callable[[str], object],
        most: int = MOST_GRAPHS,
    ) -> None:
        self._step, self._device, self._capture, self._tell, self._most = step, device, capture, tell, most
        self._seen: set[Hashable] = set()
        # Key -> (the buffer that the graph reads, its replay), the one that was used last at the end.
        self._known: OrderedDict[Hashable, tuple[Tensor, Callable[[], None]]] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of graphs."""
        return len(self._known)

    def run(self, parcel: Parcel[Any], *, captured: bool = True) -> None:
        """Do the step of ``parcel``. Without ``captured`` it runs launch by launch, and its key counts as new."""
        if self._capture is None or not captured or parcel.key not in self._seen:
            if captured:
                self._seen.add(parcel.key)
            self._step(parcel.opened(sent(parcel.host, self._device)))
            return
        if parcel.key not in self._known and not self._add(parcel, self._capture):
            self._step(parcel.opened(sent(parcel.host, self._device)))
            return
        buffer, replay = self._known[parcel.key]
        self._known.move_to_end(parcel.key)
        buffer.copy_(parcel.host, non_blocking=True)
        replay()

    def _add(self, parcel: Parcel[Any], capture: Capture) -> bool:
        """Capture the step of ``parcel``, and return whether this was possible."""
        if len(self._known) >= self._most:
            self._known.popitem(last=False)
        buffer = sent(parcel.host, self._device)
        try:
            replay = capture(lambda: self._step(parcel.opened(buffer)))
        except RuntimeError as error:
            # The end of a capture raises an error of its own if there was one within.
            first: BaseException = error
            while first.__context__ is not None:
                first = first.__context__
            if isinstance(first, RuntimeError) and _device.out_of_memory(first):
                raise first from None
            self._capture = None
            self._known.clear()
            text = " ".join(str(first).split())[:200].rstrip(". ")
            self._tell(f"the steps run launch by launch, which is slower, because a CUDA graph could not be captured: {text}.")
            return False
        self._known[parcel.key] = buffer, replay
        return True


def sent(host: Tensor, device: torch.device) -> Tensor:
    """Return a copy of ``host`` on ``device``. The host does not wait if its memory is page-locked."""
    return torch.empty_like(host, device=device).copy_(host, non_blocking=True)
