"""The log on the device of the model."""

from __future__ import annotations

import torch

from lares_fast._transfer import to_device
from lares_fast.data import InteractionLog
from lares_fast.data.batch import Inputs, Places
from lares_fast.ops._pack import pack

# The share of the free memory of a GPU that the log may take. A larger log stays in the memory of the host.
SHARE = 0.25


class DeviceLog:
    """The items of ``log`` on ``device``, if they take at most the share :data:`SHARE` of ``free`` bytes."""

    def __init__(self, log: InteractionLog, device: torch.device, free: int) -> None:
        self._log = log
        self._items = to_device(torch.from_numpy(log.items), device) if self.size(log, free) else None

    @staticmethod
    def size(log: InteractionLog, free: int) -> int:
        """Return the bytes that the items take on the device: 0 if they stay on the host."""
        return log.items.nbytes if log.items.nbytes <= SHARE * free else 0

    def before(self, places: Places) -> Places | Inputs:
        """Return what is sent to the device for sequences at ``places``."""
        return places.inputs(self._log) if self._items is None else places

    def after(self, sent: Places | Inputs) -> Inputs:
        """Return the inputs, on the device, for what was sent."""
        if isinstance(sent, Inputs):
            return sent
        assert self._items is not None
        items, target = pack(self._items, sent.starts, sent.offsets, sent.n_tokens, sent.n_targets)
        return Inputs(items, sent.offsets, target)
