"""What a published architecture is, as data, and the mapping of weights that follows from it.

A family's file names its tensors and the settings of its ``config.json``; everything that computes is here
and in ``layouts``. Invariant: the mapping is one to one, so surplus and missing tensors are known by name
before any weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_tokedit.config.families import FAMILIES, FamilyName
from megatron_tokedit.config.model import ModelConfig
from megatron_tokedit.conversion.layouts import AS_IT_IS, Layout, Shape, Sizes

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"
"""Not there where the embedding is tied to it."""
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
"""Transformer Engine's names of norms that are part of the linear layer behind them -> megatron-core's."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One weight, or one of every layer and expert.

    Attributes:
        ours: megatron-core's name, with ``{layer}`` and ``{expert}``.
        theirs: the published names.
        layout: how they make ours.
    """

    ours: str
    theirs: tuple[str, ...]
    layout: Layout = AS_IT_IS


@dataclass(frozen=True, slots=True)
class Entry:
    """A rule for one weight of one model."""

    ours: str
    theirs: tuple[str, ...]
    layout: Layout


@dataclass(frozen=True, slots=True)
class Architecture:
    """A published architecture.

    Attributes:
        family: of this package.
        model_types: in ``config.json``; the first is written.
        class_name: the model with its output layer.
        prefix: of the names inside the base model, which some folders leave out.
        fields: setting of ``config.json`` -> field of the model section.
        computed: setting -> values that this package computes; the first is written.
        ours_computed: field of the model section -> the only value that the published code computes.
        head_size_name: setting of the size of a head; None where it follows from the others.
        states_head_size: the published ``config.json`` always has it.
        rules: of the weights.
        ignored: pattern of tensors that old folders hold and that are no weights.
        check: further faults of a model section that the published code could not compute.
    """

    family: FamilyName
    model_types: tuple[str, ...]
    class_name: str
    fields: Mapping[str, str]
    rules: tuple[Rule, ...]
    prefix: str = "model."
    computed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ours_computed: Mapping[str, Any] = field(default_factory=dict)
    head_size_name: str | None = "head_dim"
    states_head_size: bool = True
    ignored: str = r".*\.rotary_emb\.inv_freq"
    check: Callable[[ModelConfig], list[str]] = lambda model: []

    @property
    def uses_rope(self) -> bool:
        """Rotary positions."""
        return FAMILIES[self.family].uses_rope

    def entries(self, model: ModelConfig) -> tuple[Entry, ...]:
        """The weights of a model, in the order of its layers."""
        return tuple(
            Entry(rule.ours.format(**place), tuple(name.format(**place) for name in rule.theirs), rule.layout)
            for layer in (None, *range(model.num_layers))
            for rule in self.rules
            for place in _places(rule, layer, model)
            if rule.ours != OUTPUT_LAYER or not model.ties_embeddings
        )

    def is_ignored(self, name: str) -> bool:
        """Whether a tensor is a buffer of an old folder."""
        return re.fullmatch(self.ignored, name) is not None

    def tied_name(self, model: ModelConfig) -> str | None:
        """Published name of the output layer where it is the embedding; some folders hold it all the same."""
        if not model.ties_embeddings:
            return None
        return next(rule.theirs[0] for rule in self.rules if rule.ours == OUTPUT_LAYER)


def _places(rule: Rule, layer: int | None, model: ModelConfig) -> list[dict[str, int]]:
    """Values of the placeholders of a rule in one layer, or outside of all (None)."""
    if ("{layer}" in rule.ours) != (layer is not None):
        return []
    if layer is None:
        return [{}]
    if "{expert}" in rule.ours:
        return [{"layer": layer, "expert": expert} for expert in range(model.num_moe_experts or 0)]
    return [{"layer": layer}]


def to_ours(
    architecture: Architecture,
    sizes: Sizes,
    theirs: Mapping[str, Tensor],
    *,
    padded_vocab_size: int | None = None,
) -> dict[str, Tensor]:
    """Published weights under megatron-core's names, all in memory.

    Args:
        architecture: of the weights.
        sizes: of the model.
        theirs: published name -> tensor.
        padded_vocab_size: rows of the embedding; default: no padding.
    """
    rows = padded_vocab_size or sizes.vocab_size
    ours = {}
    for entry in architecture.entries(sizes.model):
        parts = [theirs[name] for name in entry.theirs]
        ours[entry.ours] = entry.layout.join(parts, sizes, (rows, *parts[0].shape[1:]))
    return ours


def to_theirs(architecture: Architecture, sizes: Sizes, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """megatron-core's weights under the published names, all in memory, without the vocabulary's padding.

    Args:
        architecture: to write.
        sizes: of the model.
        ours: name of a parameter -> tensor; of local or of Transformer Engine's layers.
    """
    plain = {_plain_name(name): tensor for name, tensor in ours.items()}
    theirs: dict[str, Tensor] = {}
    for entry in architecture.entries(sizes.model):
        parts = entry.layout.split(plain[entry.ours], sizes)
        theirs |= {name: part.contiguous() for name, part in zip(entry.theirs, parts, strict=True)}
    return theirs


def _plain_name(name: str) -> str:
    for fused, plain in _FUSED_NORMS.items():
        name = name.replace(fused, plain)
    return name


def join_rows(
    entry: Entry,
    sizes: Sizes,
    shape: Shape,
    rows: range,
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """Some rows of one of our weights, reading no more of theirs than it takes.

    Args:
        entry: the weight.
        sizes: of the model.
        shape: of the whole weight.
        rows: which.
        read: gives a published tensor.
        dtype: of the result.
    """
    if not entry.layout.is_stacked:
        parts = [read(name).to(dtype) for name in entry.theirs]
        return entry.layout.join(parts, sizes, shape)[rows.start : rows.stop]
    pieces, first = [], 0
    for name, part in zip(entry.theirs, entry.layout.shapes(shape, sizes), strict=True):
        start, stop = max(rows.start, first), min(rows.stop, first + part[0])
        if start < stop:
            pieces.append(read(name)[start - first : stop - first].to(dtype))
        first += part[0]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
