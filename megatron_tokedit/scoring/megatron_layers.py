"""Which parts of a Megatron model are replaced by faster ones of the same mathematics where a CPU scores.

megatron-core writes the whole middle of a feed-forward block and passes over it four times; here it stays in
the cache, as in ``packed``. It adds biases in passes of their own, into new memory; here products do. Norms
are blocked (``blocked_norm``), and nothing is kept for a backward pass.

Invariant: the same mathematics in the same precision, under every layout; GPUs have kernels of their own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_tokedit.engine.inference import LanguageModel
from megatron_tokedit.scoring.blocked_norm import block_norms
from megatron_tokedit.scoring.packed import PackedLinear, RowBlocks, can_pack


def speed_up(model: LanguageModel) -> None:
    """Make a loaded model's forward pass cheaper, in place; its parameters are gone from where they were."""
    if model.device.type != "cpu":
        return
    group = model.tensor_parallel_group if model.ctx.tp_size > 1 else None
    block_norms(model.gpt, ("RMSNorm",))
    for layer in model.layers:
        attention = layer.self_attention
        attention.core_attention.keeps_probabilities = False
        if not can_pack(model.dtype):
            continue
        if type(layer.mlp).__name__ == "MLP":  # experts stay as they are
            layer.mlp = _FeedForward(layer.mlp, group)
        if not attention.config.sequence_parallel:
            attention.linear_qkv = _Projection(attention.linear_qkv, None)
            attention.linear_proj = _Projection(attention.linear_proj, group)


class _Projection(nn.Module):
    """A linear layer of megatron-core's; with a group one whose ranks have a part of the inputs each."""

    def __init__(self, linear: Any, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        bias = None if linear.bias is None else linear.bias.detach()
        # a sum over ranks has it once, so it is somebody else's to add
        self._late_bias: torch.Tensor | None = None if group is None else bias
        self._linear = _linear(linear.weight.detach(), bias if group is None else None)
        self._group = group

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``[s, b, inputs]`` -> ``[s, b, outputs]``, and the bias where it is somebody else's to add."""
        outputs: torch.Tensor = self._linear(inputs)
        if self._group is not None:
            dist.all_reduce(outputs, group=self._group)
        return outputs, self._late_bias


class _FeedForward(nn.Module):
    """megatron-core's ``MLP`` in blocks of rows; GELU (tanh), or SiLU times a second product."""

    def __init__(self, mlp: Any, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self._group = group
        first, last = mlp.linear_fc1, mlp.linear_fc2
        bias = None if last.bias is None else last.bias.detach()
        self._late_bias: torch.Tensor | None = None if group is None else bias
        kind = _Gated if mlp.config.gated_linear_unit else _Plain
        output = _linear(last.weight.detach(), bias if group is None else None)
        self._rows = RowBlocks(kind(first.weight.detach(), first.bias, output))

    def forward(
        self, hidden: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``[s, b, H]`` -> the same, and the last bias where it is somebody else's to add."""
        outputs: torch.Tensor = self._rows(hidden)
        if self._group is not None:
            dist.all_reduce(outputs, group=self._group)
        return outputs, self._late_bias


class _Plain(nn.Sequential):
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, last: nn.Module) -> None:
        super().__init__(PackedLinear(weight, bias, ("gelu", "tanh")), last)


class _Gated(nn.Module):
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, last: nn.Module) -> None:
        super().__init__()
        gate, up = weight.chunk(2)
        gate_bias, up_bias = (None, None) if bias is None else bias.detach().chunk(2)
        self._gate, self._up = PackedLinear(gate, gate_bias, ("swish", "")), _linear(up, up_bias)
        self._last = last

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self._last(self._gate(rows).mul_(self._up(rows)))
        return outputs


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    """A product without an activation. In float32 torch's own are as fast, and 3% to 7% faster with the
    weight lying transposed than as megatron-core has it.
    """
    if weight.dtype != torch.float32:
        return PackedLinear(weight, bias)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.t().contiguous().t(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer
