"""Which layers of a Hugging Face model are replaced by faster ones of the same mathematics.

Invariant: only architectures that a test has compared are touched, and the caller compares the model in hand
with what it said before.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.activations import GELUActivation, GELUTanh, NewGELUActivation
from transformers.pytorch_utils import Conv1D

from megatron_tokedit.scoring.blocked_norm import block_norms
from megatron_tokedit.scoring.packed import PackedLinear, RowBlocks, can_pack

_MODEL_TYPES = {"gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "olmo", "olmo2", "gemma", "gemma2"}
"""Architectures that treat their linear layers as functions only, tried one by one; others stay as they
are."""
_FUSED = (("c_fc", "act"), ("dense_h_to_4h", "act"), ("gate_proj", "act_fn"))
"""In a feed-forward block: the layer that the activation directly follows, and the activation."""


def speed_up(model: Any) -> None:
    """Make a Hugging Face model's forward pass cheaper, in place: GELU in one pass; on a CPU packed layers,
    blocked norms.

    Its output layer stays as it is. In float32 only layers with an activation behind them are packed: torch's
    own products are as fast.
    """
    for block in list(model.modules()):
        for name, child in list(block.named_children()):
            if type(child) is NewGELUActivation:  # eight passes
                setattr(block, name, nn.GELU(approximate="tanh"))
    is_known = model.config.model_type in _MODEL_TYPES
    is_float32 = model.dtype.itemsize == 4
    if model.device.type != "cpu" or not is_known:
        return
    block_norms(model.base_model, ("RMSNorm",))
    if can_pack(model.dtype):
        _pack_layers(model.base_model, everything=not is_float32)


def _pack_layers(base_model: Any, *, everything: bool) -> None:
    """Replace linear layers by packed ones, all or those with an activation behind them."""
    for block in list(base_model.modules()):
        fused = {
            linear: (name, activation)
            for linear, name in _FUSED
            if (activation := _onednn_name(getattr(block, name, None))) and hasattr(block, linear)
        }
        for name, child in list(block.named_children()):
            if type(child) in (nn.Linear, Conv1D) and (everything or name in fused):
                weight = child.weight.t() if type(child) is Conv1D else child.weight
                activation = fused[name][1] if name in fused else ("none", "")
                setattr(block, name, PackedLinear(weight, child.bias, activation))
        for name, _ in fused.values():
            setattr(block, name, nn.Identity())
        for name, child in list(block.named_children()):
            if type(child).__name__.endswith("MLP"):
                setattr(block, name, RowBlocks(child))


def _onednn_name(activation: Any) -> tuple[str, str] | None:
    """What oneDNN calls an activation; None: it has none like it."""
    if isinstance(activation, GELUTanh) or (
        isinstance(activation, nn.GELU) and activation.approximate == "tanh"
    ):
        return ("gelu", "tanh")
    if isinstance(activation, (GELUActivation, nn.GELU)):
        return ("gelu", "none")
    return ("swish", "") if type(activation).__name__ in ("SiLUActivation", "SiLU") else None
