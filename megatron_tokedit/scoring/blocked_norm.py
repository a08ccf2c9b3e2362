"""Root-mean-square norms of a CPU prior, some positions at a time.

torch's ``RMSNorm`` and those of Hugging Face's models are chains of element-wise passes on a CPU, each of
which writes as many float32 numbers as there are hidden ones in the batch. Those of a few positions stay in
the second-level cache, and take no new memory. In a Llama 2048 wide they were half of a bfloat16 pass.

Invariant: every position gets the same bits as before.
"""

from __future__ import annotations

import torch
from torch import nn

_BLOCK_ELEMENTS = 1 << 17
"""In float32 half a megabyte a pass."""


class BlockedNorm(nn.Module):
    """A norm over the last dimension, applied to some positions at a time.

    Args:
        norm: maps ``[..., H]`` to ``[..., H]`` in the same dtype, position by position.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self._norm = norm

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., H]`` -> ``[..., H]``, contiguous."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        outputs = torch.empty(rows.shape, dtype=hidden.dtype)
        block_rows = max(1, _BLOCK_ELEMENTS // rows.shape[1])
        for block, target in zip(rows.split(block_rows), outputs.split(block_rows), strict=True):
            target.copy_(self._norm(block))
        return outputs.view(hidden.shape)


def block_norms(module: nn.Module, kinds: tuple[str, ...]) -> None:
    """Replace norms inside a module, in place.

    Args:
        module: on a CPU.
        kinds: names of their classes, or ends of names.
    """
    for block in list(module.modules()):
        for name, child in list(block.named_children()):
            if type(child).__name__.endswith(kinds):
                setattr(block, name, BlockedNorm(child))
