"""How one weight of megatron-core is made of published ones, and taken apart again.

megatron-core keeps the projections of queries, keys and values in one matrix, by group: the queries of a
group, its key, its value; gate and up projection stand one above the other. Invariant: ``split`` is the exact
inverse of ``join``: values are moved, never computed with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tokedit.config.model import ModelConfig

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a layout needs to know of a model: its section and its real vocabulary."""

    model: ModelConfig
    vocab_size: int


@dataclass(frozen=True, slots=True)
class Layout:
    """One way.

    Attributes:
        shapes: shape of ours -> shapes of theirs.
        join: theirs -> ours, of the shape given.
        split: ours -> theirs; of a padded vocabulary, with or without the padding.
        is_stacked: ours is theirs one above the other, so that rows of it can be read apart.
    """

    shapes: Callable[[Shape, Sizes], tuple[Shape, ...]]
    join: Callable[[Sequence[Tensor], Sizes, Shape], Tensor]
    split: Callable[[Tensor, Sizes], tuple[Tensor, ...]]
    is_stacked: bool = False


def _qkv_rows(sizes: Sizes) -> tuple[int, int, int]:
    """Rows of the queries, keys and values."""
    model = sizes.model
    keys = model.num_key_value_heads * model.head_size
    return model.num_attention_heads * model.head_size, keys, keys


def _join_qkv(parts: Sequence[Tensor], sizes: Sizes, shape: Shape) -> Tensor:
    groups = sizes.model.num_key_value_heads
    by_group = [part.reshape(groups, -1, *part.shape[1:]) for part in parts]
    return torch.cat(by_group, dim=1).flatten(0, 1)


def _split_qkv(ours: Tensor, sizes: Sizes) -> tuple[Tensor, ...]:
    groups = sizes.model.num_key_value_heads
    by_group = ours.reshape(groups, -1, *ours.shape[1:])
    rows = [rows // groups for rows in _qkv_rows(sizes)]
    return tuple(part.flatten(0, 1) for part in torch.split(by_group, rows, dim=1))


def _fill_vocabulary(parts: Sequence[Tensor], sizes: Sizes, shape: Shape) -> Tensor:
    (rows,) = parts
    if rows.size(0) == shape[0]:
        return rows
    return torch.cat([rows, rows.new_zeros(shape[0] - rows.size(0), *shape[1:])])


AS_IT_IS = Layout(
    shapes=lambda shape, sizes: (shape,),
    join=lambda parts, sizes, shape: parts[0],
    split=lambda ours, sizes: (ours,),
    is_stacked=True,
)
"""The same tensor."""

TRANSPOSED = Layout(
    shapes=lambda shape, sizes: (shape[::-1],),
    join=lambda parts, sizes, shape: parts[0].t(),
    split=lambda ours, sizes: (ours.t(),),
)
"""GPT-2's linear layers: ``[in, out]``."""

VOCABULARY = Layout(
    shapes=lambda shape, sizes: ((sizes.vocab_size, *shape[1:]),),
    join=_fill_vocabulary,
    split=lambda ours, sizes: (ours[: sizes.vocab_size],),
)
"""A row an id; ours has further rows of zeros, so that it divides among ranks."""

GATE_UP = Layout(
    shapes=lambda shape, sizes: ((shape[0] // 2, *shape[1:]),) * 2,
    join=lambda parts, sizes, shape: torch.cat(list(parts)),
    split=lambda ours, sizes: tuple(ours.chunk(2)),
    is_stacked=True,
)
"""The gate above the up projection."""

QKV = Layout(
    shapes=lambda shape, sizes: tuple((rows, *shape[1:]) for rows in _qkv_rows(sizes)),
    join=_join_qkv,
    split=_split_qkv,
)
"""Queries, keys, values; weights or biases."""

FUSED_QKV = Layout(
    shapes=lambda shape, sizes: (shape[::-1],),
    join=lambda parts, sizes, shape: _join_qkv(
        torch.split(parts[0].t(), list(_qkv_rows(sizes))), sizes, shape
    ),
    split=lambda ours, sizes: (torch.cat(_split_qkv(ours, sizes)).t(),),
)
"""GPT-2's: one transposed matrix, or one bias, of all queries, then all keys, then all values."""
