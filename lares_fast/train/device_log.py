"""The log on the device of the model."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import torch

from lares_fast.data import InteractionLog
from lares_fast.data.batch import Inputs, Places
from lares_fast.ops._pack import pack
from lares_fast.train.rpt import RPTBatch
from lares_fast.train.spt import SPTBatch

# The share of the free memory of a GPU that the log may take. A larger log stays in the memory of the host.
SHARE = 0.25

B = TypeVar("B", SPTBatch, RPTBatch)


class DeviceLog:
    """The items of ``log`` on ``device``, if they take at most the share :data:`SHARE` of ``free`` bytes."""

    def __init__(self, log: InteractionLog, device: torch.device, free: int) -> None:
        self._log = log
        items = torch.from_numpy(log.items)
        self._items = items.to(device) if items.nbytes <= SHARE * free else None

    @property
    def on_device(self) -> bool:
        """Whether the device has the items."""
        return self._items is not None

    def before(self, batch: B) -> B:
        """Return ``batch``, whose inputs are :class:`Places` on the CPU, as it is sent to the device."""
        assert isinstance(batch.inputs, Places)
        return batch if self.on_device else replace(batch, inputs=batch.inputs.inputs(self._log))

    def after(self, batch: B) -> B:
        """Return ``batch``, which was sent to the device, with the items."""
        if self._items is None:
            return batch
        places = batch.inputs
        assert isinstance(places, Places)
        items, target = pack(self._items, places.starts, places.offsets, places.n_tokens, places.n_targets)
        return replace(batch, inputs=Inputs(items, places.offsets, target))
