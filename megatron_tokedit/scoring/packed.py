"""Linear layers of a CPU prior in oneDNN's own layout, activation included, and nothing else changed.

A third of a forward pass on a CPU is not matrix products: GELU as a chain of element-wise passes, weights
brought into the matrix unit's layout again and again. oneDNN does the activation while a product's block is
still in the cache, and packs a weight once. Measured on a GPT-2 of 124M parameters without its head, on one
AVX-512 core with the bfloat16 matrix unit: 36% of the machine's product rate before and 58% after in
bfloat16, 63% and 82% in float32.

oneDNN compiles a kernel for every number of rows that it meets and keeps it: a third of a megabyte each in
float32. Batches have all sizes, so a long job would grow by hundreds of megabytes; hence :class:`RowBlocks`,
and a smaller cache.

Invariant: the same mathematics in the same precision; the caller compares the model with what it said before.
"""

from __future__ import annotations

import os
import platform

import torch
from torch import nn

_BLOCK_ROWS = 384
"""Positions at a time in :class:`RowBlocks`; of 128 to 768 the best, by a tenth over all at once."""
_ROW_UNIT = 64
"""The last block is filled up to a multiple of this, so that there are six sizes of block in all."""

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")  # read at its first product


class PackedLinear(nn.Module):
    """``activation(x @ weight.T + bias)`` with the weight in oneDNN's layout.

    Args:
        weight: ``[outputs, inputs]``.
        bias: ``[outputs]`` or None.
        activation: oneDNN's name of what follows, and its variant.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, activation: tuple[str, str] = ("none", "")
    ) -> None:
        super().__init__()
        self._packed = pack(weight)
        self._bias = None if bias is None else bias.detach()
        self._activation = activation

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """``[..., inputs]`` -> ``[..., outputs]``."""
        return packed_linear(inputs, self._packed, self._bias, self._activation)


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this processor and this torch have packed products of a precision."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def pack(weight: torch.Tensor) -> torch.Tensor:
    """A copy of ``[outputs, inputs]`` in oneDNN's layout, for :func:`packed_linear` only."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
    return packed


def packed_linear(
    inputs: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    activation: tuple[str, str] = ("none", ""),
) -> torch.Tensor:
    """``activation(inputs @ weight.T + bias)``."""
    name, variant = activation
    outputs: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, packed, bias, name, [], variant)
    return outputs


class RowBlocks(nn.Module):
    """A module that treats every position alike, applied to some positions at a time.

    What stands between a feed-forward block's two products is four times as wide as what goes in and comes
    out; of a few hundred positions it stays in the cache. And there are few sizes of block; see above.

    Args:
        module: maps ``[..., H]`` to ``[..., H]``, row by row.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = module

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., H]`` -> ``[..., H]``."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        num_whole = len(rows) // _ROW_UNIT * _ROW_UNIT
        outputs = [self._module(block) for block in rows[:num_whole].split(_BLOCK_ROWS) if len(block)]
        if rest := len(rows) % _ROW_UNIT:
            filled = nn.functional.pad(rows[-rest:], (0, 0, 0, _ROW_UNIT - rest))
            outputs.append(self._module(filled)[:rest])
        return torch.cat(outputs).view(hidden.shape)
