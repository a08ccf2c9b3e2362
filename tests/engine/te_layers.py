"""Layers that leave a checkpoint as Transformer Engine's do, made of megatron-core's local ones.

What is Transformer Engine's (2.11, ``module/base.py``, ``ops/op.py``): parameter names of the fused norm and
linear layer; ``_extra_state`` of every linear layer and norm, bytes of a pickle or none at all, and
strictness about its key; attention with an extra state that its sharded state leaves out. The real specs are
made around them: only the provider of their classes is replaced.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from megatron.core.extensions import transformer_engine as te_extension
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import transformer_block
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP

from megatron_tokedit.engine import layers
from megatron_tokedit.engine import model as _model  # noqa: F401 - before the patches, for what it takes from layers
from megatron_tokedit.engine.attention import SdpaCoreAttention


class TeState:
    """The extra state; ``history`` stands for scales and amax histories, None before a forward in FP8."""

    history: list[float] | None = None
    num_loads = 0

    def get_extra_state(self) -> torch.Tensor:
        if self.history is None:
            return torch.empty(0, dtype=torch.uint8)
        state = {"recipe": "delayed", "amax_history_fwd": torch.tensor(self.history)}
        return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        self.num_loads += 1
        if state is None or state.numel() == 0:
            return
        self.history = pickle.loads(state.numpy().tobytes())["amax_history_fwd"].tolist()


class TeColumnLinear(TeState, ColumnParallelLinear):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._load_state_dict_pre_hooks.clear()  # the local layer's, which forgives a missing extra state


class TeRowLinear(TeState, RowParallelLinear):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._load_state_dict_pre_hooks.clear()


class TeNormColumnLinear(TeColumnLinear):
    def __init__(self, input_size, output_size, *, config, **kwargs):
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size))
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel
        if config.normalization == "LayerNorm":
            self.layer_norm_bias = torch.nn.Parameter(torch.zeros(input_size))
            self.layer_norm_bias.sequence_parallel = config.sequence_parallel

    def forward(self, hidden, *args, **kwargs):
        size, eps = (hidden.size(-1),), self.config.layernorm_epsilon
        if self.config.normalization == "LayerNorm":
            hidden = torch.nn.functional.layer_norm(
                hidden, size, self.layer_norm_weight, self.layer_norm_bias, eps
            )
        else:
            hidden = torch.nn.functional.rms_norm(hidden, size, self.layer_norm_weight, eps)
        return super().forward(hidden, *args, **kwargs)


class _TeRmsNorm(TeState, torch.nn.RMSNorm):
    pass


class _TeLayerNorm(TeState, torch.nn.LayerNorm):
    pass


class TeNorm:
    def __new__(cls, config, hidden_size, eps=1e-5, **kwargs):
        norm = {"RMSNorm": _TeRmsNorm, "LayerNorm": _TeLayerNorm}[config.normalization](hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


class TeAttention(TeState, SdpaCoreAttention):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)

        def forgive(module, incompatible_keys):
            for key in list(incompatible_keys.missing_keys):
                if "core_attention._extra_state" in key:
                    incompatible_keys.missing_keys.remove(key)

        self.register_load_state_dict_post_hook(forgive)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        return {}


class TeProvider(TESpecProvider):
    def column_parallel_linear(self):
        return TeColumnLinear

    def row_parallel_linear(self):
        return TeRowLinear

    def column_parallel_layer_norm_linear(self):
        return TeNormColumnLinear

    def layer_norm(self, rms_norm=False, for_qk=False):
        return TeNorm

    def core_attention(self):
        return TeAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm, moe_use_legacy_grouped_gemm):
        return SequentialMLP, MLPSubmodules(linear_fc1=TeColumnLinear, linear_fc2=TeRowLinear)


@contextmanager
def te_layers(wanted: bool = True) -> Iterator[None]:
    """Models that are built meanwhile have these layers."""
    with ExitStack() as stack:
        if wanted:
            for target, name, value in (
                (gpt_layer_specs, "TESpecProvider", TeProvider),
                (transformer_block, "LayerNormImpl", TeNorm),
                (te_extension, "TEColumnParallelLinear", TeColumnLinear),
                (layers, "uses_transformer_engine", lambda device: True),
            ):
                stack.enter_context(patch.object(target, name, value, create=True))
        yield


def states(model) -> dict[str, TeState]:
    """Modules with an extra state, by their name with the number of the layer in the whole model."""
    from megatron_tokedit.engine.model import unwrap

    found = {}
    for chunk in model:
        gpt = unwrap(chunk)
        numbers = {str(index): str(layer.layer_number) for index, layer in enumerate(gpt.decoder.layers)}
        for name, module in gpt.named_modules():
            if isinstance(module, TeState):
                parts = name.split(".")
                if "layers" in parts:
                    place = parts.index("layers") + 1
                    parts[place] = numbers[parts[place]]
                found[".".join(parts)] = module
    return found
