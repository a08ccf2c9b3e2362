"""Copies between main memory and the prior's device that nobody waits for.

Invariant: on a GPU both directions go through pinned memory and are only queued; :meth:`Download.wait` waits
for its own copies and for what was queued before them, never for what was queued after.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch


def upload(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """The array as a tensor on the device."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class Download:
    """Tensors on their way to main memory.

    Args:
        tensors: on one device.
    """

    def __init__(self, *tensors: torch.Tensor) -> None:
        self._hosts = tensors
        self._event: torch.cuda.Event | None = None
        if tensors[0].device.type == "cuda":
            self._hosts = tuple(
                torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(
                    tensor, non_blocking=True
                )
                for tensor in tensors
            )
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> list[npt.NDArray[Any]]:
        """The arrays, in order."""
        if self._event is not None:
            self._event.synchronize()
        return [np.asarray(host) for host in self._hosts]
