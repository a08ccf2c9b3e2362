"""Several sequences in one row: from position ids to megatron-core's packed sequence parameters.

Invariant: a sequence begins wherever a position id is 0, and nowhere else, so that the borders need no place
of their own in a batch. Padding is such a sequence too: every position belongs to one, since what attention
kernels leave in positions that belong to none is not defined.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams

_LENGTH_STEP = 64
"""On a GPU the longest length is rounded up to a multiple, as Transformer Engine does where it is not told:
it plans its kernels by it."""


@dataclass
class PackedRow(PackedSeqParams):
    """megatron-core's parameters in the ``thd`` layout, and the lengths on the host.

    Transformer Engine's attention is handed the fields of the base class only.
    """

    lengths: tuple[int, ...] = ()
    """Of the sequences, in order; what our own attention goes by."""


def flat_rows(
    batch: Mapping[str, torch.Tensor], device: torch.device
) -> tuple[dict[str, torch.Tensor], PackedRow]:
    """The rows of a microbatch behind one another in a single row, and where its sequences are.

    Args:
        batch: ``[B, T]`` tensors on the host; ``position_ids`` are 0 where a sequence begins.
        device: of the model.
    """
    row_length = batch["position_ids"].size(-1)
    flat = {key: value.reshape(1, -1) for key, value in batch.items() if value.dim() == 2}
    return flat, packed_row(flat["position_ids"][0], device, longest=row_length)


def packed_row(position_ids: torch.Tensor, device: torch.device, *, longest: int) -> PackedRow:
    """Where the sequences of one long row are.

    Args:
        position_ids: ``[T]`` on the host, beginning with 0.
        device: of the model.
        longest: no sequence is longer.
    """
    starts = (position_ids == 0).nonzero().flatten()
    assert position_ids[0] == 0, "a packed row begins with position 0"
    borders = torch.cat((starts, torch.tensor([position_ids.numel()])))
    lengths = borders.diff()
    most = int(lengths.max())
    if device.type == "cuda":
        most = min(-(-most // _LENGTH_STEP) * _LENGTH_STEP, longest)
    cu_seqlens = borders.to(device=device, dtype=torch.int32, non_blocking=True)
    return PackedRow(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=most,
        max_seqlen_kv=most,
        lengths=tuple(lengths.tolist()),
    )
