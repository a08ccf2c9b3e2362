"""A checkpoint that continues texts: rows of ids that grow, with the keys and values of all positions kept.

The layers are megatron-core's; only what stands in for their core attention during a pass is of here. Why
none of megatron-core's inference contexts (0.16.1) is used: ``StaticInferenceContext`` has one
``sequence_len_offset`` for all rows, so that shorter rows would need padding in front of them, and no row
could join or leave. Its steps ask for ``AttnMaskType.no_mask`` without a mask, which our core attention takes
for as many queries as keys (it raises) and which lets Transformer Engine's attend to the padding; masks of
our own make the former right, the latter ignores them. It keeps keys before rotation and rotates all of a
row's keys anew for every token and layer. ``DynamicInferenceContext`` asserts flash-attn, which there is for
GPUs only.

Invariant: the hidden state of a row is that of a forward pass over its ids (up to float rounding), whatever
other rows stand beside it; a position is computed once.

Legend: b rows, s positions, n query heads, g key/value heads, d size of a head, C positions there is room
for, B rows as a dimension, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_tokedit.engine.inference import LanguageModel
from megatron_tokedit.errors import ConfigError

_GROWTH_POSITIONS = 64


class CachedDecoder:
    """Rows that a language model continues; there are none at first.

    Under tensor parallelism every rank makes the same calls and gets the same logits.

    Args:
        model: stays as it is for others, between the calls.

    Attributes:
        vocab_size: real vocabulary.
        max_positions: ids of a row that can be put in.
        num_rows: rows there are; they are numbered in the order in which they came.
        can_join: rows may be added while others are there.

    Raises:
        ConfigError: an FP8 recipe, whose products take no single tokens, or a layout with parts of a model
            behind one another, or with sequences cut in parts.
    """

    can_join = True

    def __init__(self, model: LanguageModel) -> None:
        if model.precision.is_fp8:
            raise ConfigError(
                f"precision.recipe: {model.precision.recipe} multiplies many tokens at a time, and text is "
                "written one by one; generate in bf16 or fp32"
            )
        gpt = model.gpt
        if model.ctx.pp_size > 1 or gpt.config.sequence_parallel:
            raise ConfigError(
                "parallel: text is generated with pipeline_model_parallel_size 1 and without "
                "sequence_parallel (which experts need under tensor parallelism)"
            )
        self.vocab_size = model.vocab_size
        self.max_positions = model.max_context_tokens
        self.num_rows = 0
        self._model, self._gpt, self._device = model, gpt, model.device
        layers = gpt.decoder.layers
        self._attentions = [_CachedAttention(layer.self_attention.core_attention) for layer in layers]
        self._positions_b = torch.zeros(0, dtype=torch.int64, device=self._device)
        self._room = 0
        self._angles_Cd: Tensor | None = None

    @torch.inference_mode()
    def add(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Put rows behind those that are there.

        Args:
            prompts: one or more ids each, at most :attr:`max_positions`.

        Returns:
            Logits of what follows each, float32 ``[B, V]``.
        """
        first, self.num_rows = self.num_rows, self.num_rows + len(prompts)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self._device)
        longest = max(len(prompt) for prompt in prompts)
        ids_BT = torch.tensor([[*p, *[p[-1]] * (longest - len(p))] for p in prompts], device=self._device)
        self._positions_b = torch.cat([self._positions_b, lengths])
        self._make_room(longest)
        for attention in self._attentions:
            attention.begin_rows(first)
        positions_BT = torch.arange(longest, device=self._device).expand_as(ids_BT)
        hidden_TBH = self._forward(ids_BT, positions_BT)
        return self._logits(hidden_TBH[lengths - 1, torch.arange(len(prompts), device=self._device)])

    @torch.inference_mode()
    def step(self, ids: Sequence[int]) -> Tensor:
        """Put one id behind every row.

        Args:
            ids: one a row.

        Returns:
            Logits of what follows, float32 ``[B, V]``.
        """
        assert len(ids) == self.num_rows
        longest = int(self._positions_b.max()) + 1
        self._make_room(longest)
        ids_B1 = torch.tensor(ids, device=self._device)[:, None]
        places_C = torch.arange(longest, device=self._device)
        is_seen_b11C = (places_C <= self._positions_b[:, None])[:, None, None]
        for attention in self._attentions:
            attention.begin_step(self._positions_b, is_seen_b11C)
        hidden_1BH = self._forward(ids_B1, self._positions_b[:, None])
        self._positions_b = self._positions_b + 1
        return self._logits(hidden_1BH[0])

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, which are numbered anew in this order.

        Args:
            rows: each either stays in its place or comes from behind all that remain.
        """
        assert all(new == old or old >= len(rows) for new, old in enumerate(rows))
        moves = [(new, old) for new, old in enumerate(rows) if new != old]
        for attention in self._attentions:
            for new, old in moves:
                attention.move(new, old)
        self.num_rows = len(rows)
        self._positions_b = self._positions_b[torch.tensor(rows, dtype=torch.int64, device=self._device)]

    def _make_room(self, positions: int) -> None:
        """Have memory for every row and for so many positions; it grows by halves and never shrinks."""
        assert positions <= self.max_positions
        if positions > self._room:
            grown = max(positions, self._room * 3 // 2)
            self._room = min(-(-grown // _GROWTH_POSITIONS) * _GROWTH_POSITIONS, self.max_positions)
            if self._gpt.position_embedding_type == "rope":
                self._angles_Cd = self._gpt.rotary_pos_emb.get_emb(self._room)[:, 0, 0]
        for attention in self._attentions:
            attention.make_room(self.num_rows, self._room)

    def _forward(self, ids_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """Final hidden states ``[s, b, h]``."""
        hidden = self._gpt.embedding(input_ids=ids_BT, position_ids=positions_BT)
        angles = None  # [s, b, 1, d]: unlike those of GPTModel.forward, each row's own
        if self._angles_Cd is not None:
            angles = self._angles_Cd[positions_BT.transpose(0, 1)].unsqueeze(2)
        with self._attending():
            final: Tensor = self._gpt.decoder(
                hidden_states=hidden, attention_mask=None, rotary_pos_emb=angles
            )
        return final

    @contextlib.contextmanager
    def _attending(self) -> Iterator[None]:
        """Let the layers attend to what is kept."""
        layers, config = self._gpt.decoder.layers, self._gpt.config
        is_fused, config.apply_rope_fusion = config.apply_rope_fusion, False  # its kernel has no rows' angles
        for layer, attention in zip(layers, self._attentions, strict=True):
            layer.self_attention.core_attention = attention
        try:
            yield
        finally:
            config.apply_rope_fusion = is_fused
            for layer, attention in zip(layers, self._attentions, strict=True):
                layer.self_attention.core_attention = attention.original[0]

    def _logits(self, hidden_BH: Tensor) -> Tensor:
        """float32 ``[B, V]``; collective over the tensor-parallel ranks."""
        logits_BV = F.linear(hidden_BH, self._model.output_weight).float()
        if self._model.ctx.tp_size > 1:
            from megatron.core import parallel_state

            parts = [torch.empty_like(logits_BV) for _ in range(self._model.ctx.tp_size)]
            group = parallel_state.get_tensor_model_parallel_group()
            dist.all_gather(parts, logits_BV.contiguous(), group=group)
            logits_BV = torch.cat(parts, dim=1)
        return logits_BV[:, : self.vocab_size]


class _CachedAttention(torch.nn.Module):
    """Stands in for the core attention of one layer during a pass, and keeps its keys and values.

    New rows attend by the layer's own core attention, to nothing but themselves; a step attends to what is
    kept.
    """

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.original = (original,)  # in a tuple: not a part of this module
        self._keys: Tensor | None = None  # [rows there is room for, g, C, d]
        self._values: Tensor | None = None
        self._size = (0, 0)
        self._first_new_row: int | None = None

    def make_room(self, num_rows: int, positions: int) -> None:
        """Have memory for so many rows and positions; made at the first pass, which knows the shapes."""
        rows, room = self._size
        self._size = (max(rows, num_rows), max(room, positions))
        if self._keys is not None and self._values is not None and self._size != (rows, room):
            self._keys, self._values = self._grown(self._keys), self._grown(self._values)

    def _grown(self, old: Tensor) -> Tensor:
        rows, room = self._size
        new = old.new_zeros(rows, old.size(1), room, old.size(3))
        new[: old.size(0), :, : old.size(2)] = old
        return new

    def begin_rows(self, first_new_row: int) -> None:
        """The next pass is over new rows."""
        self._first_new_row = first_new_row

    def begin_step(self, positions_b: Tensor, is_seen_b11C: Tensor) -> None:
        """The next pass is over one more position of every row: which, and what it attends to."""
        self._first_new_row = None
        self._positions_b, self._is_seen_b11C = positions_b, is_seen_b11C

    def move(self, new: int, old: int) -> None:
        """Put the keys and values of a row in the place of another's."""
        assert self._keys is not None
        assert self._values is not None
        self._keys[new], self._values[new] = self._keys[old], self._values[old]

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[s, b, n, d]``, ``[s, b, g, d]``, ``[s, b, g, d]`` -> ``[s, b, n * d]``; further arguments are
        for the layer's own core attention.
        """
        if self._keys is None or self._values is None:
            (rows, room), (_, _, groups, size) = self._size, key.shape
            self._keys = key.new_zeros(rows, groups, room, size)
            self._values = value.new_zeros(rows, groups, room, value.size(3))
        if self._first_new_row is not None:
            new_rows = slice(self._first_new_row, self._first_new_row + key.size(1))
            self._keys[new_rows, :, : key.size(0)] = key.permute(1, 2, 0, 3)
            self._values[new_rows, :, : value.size(0)] = value.permute(1, 2, 0, 3)
            attended: Tensor = self.original[0](query, key, value, *args, **kwargs)
            return attended
        _, num_rows, groups, size = key.shape
        rows_b = torch.arange(num_rows, device=key.device)
        self._keys[rows_b, :, self._positions_b] = key[0]
        self._values[rows_b, :, self._positions_b] = value[0]
        length = self._is_seen_b11C.size(-1)
        context = F.scaled_dot_product_attention(  # the query heads of a group as so many queries
            query.reshape(num_rows, groups, -1, size),
            self._keys[:num_rows, :, :length],
            self._values[:num_rows, :, :length],
            attn_mask=self._is_seen_b11C,
            scale=getattr(self.original[0], "softmax_scale", None),
        )
        return context.reshape(1, num_rows, -1)
