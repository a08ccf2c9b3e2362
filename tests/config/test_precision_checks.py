# ruff: noqa: E501 - tables of messages read better unbroken
"""What Transformer Engine or megatron-core would find out about a recipe in the first step is refused before
launch, with the arithmetic; no machine is asked."""

from __future__ import annotations

from typing import Any

import pytest
from config_cases import run_config

from megatron_tokedit.config.recipes import RECIPES
from megatron_tokedit.config.validate import validate
from megatron_tokedit.errors import ConfigError

TP2 = {"parallel__tensor_model_parallel_size": 2}
SP2 = {**TP2, "parallel__sequence_parallel": True}
CP2 = {"parallel__context_parallel_size": 2}
FULL = {
    "parallel__recompute_granularity": "full",
    "parallel__recompute_method": "uniform",
    "parallel__recompute_num_layers": 1,
}
NORMS = {"parallel__recompute_granularity": "selective", "parallel__recompute_modules": ["layernorm"]}
EXPERTS = {"model__family": "mixtral", "model__num_moe_experts": 4}
LOCAL = {"precision__cuda_graph_impl": "local"}
TE_GRAPHS = {"precision__cuda_graph_impl": "transformer_engine"}
SELECTIVE = {"parallel__recompute_granularity": "selective"}


@pytest.mark.parametrize(
    ("recipe", "changes", "expected"),
    [
        # sizes: 64 hidden, 4 heads of 16, ffn 192
        ("fp8_tensorwise", {"model__hidden_size": 72, "model__kv_channels": 16}, "model.hidden_size: 72 is no multiple of 16, as fp8_tensorwise needs of both sizes of a matrix; for the size try 64 or 80"),
        ("fp8_delayed", {"model__ffn_hidden_size": 200}, "model.ffn_hidden_size: 200 is no multiple of 16"),
        ("fp8_delayed", {"model__ffn_hidden_size": 208, **TP2}, "model.ffn_hidden_size: 208 over tensor_model_parallel_size = 2 ranks is 104, which is no multiple of 16, as fp8_delayed needs of both sizes of a matrix; for the size try 192 or 224"),
        ("fp8_tensorwise", {"model__kv_channels": 10}, "model.num_attention_heads: num_attention_heads x kv_channels = 4 x 10 = 40 is no multiple of 16"),
        ("fp8_tensorwise", {"model__kv_channels": 4, "model__num_query_groups": 1}, "model.num_query_groups: (num_attention_heads + 2 x num_query_groups) x kv_channels = (4 + 2 x 1) x 4 = 24 is no multiple of 16"),
        ("mxfp8", {"model__ffn_hidden_size": 176}, "model.ffn_hidden_size: 176 is no multiple of 32, as mxfp8 needs"),
        ("fp8_blockwise", SP2, "model.hidden_size: 64 is no multiple of 128, as fp8_blockwise needs"),
        # tokens: micro-batch x sequence, cut by context and sequence parallelism
        ("fp8_tensorwise", {"model__seq_length": 40}, "model.seq_length: seq_length x training.micro_batch_size = 40 x 1 makes 40 tokens a product, no multiple of 16 as fp8_tensorwise needs; for seq_length x micro_batch_size try 32 or 48"),
        ("fp8_tensorwise", {"model__seq_length": 48, **CP2}, "seq_length x training.micro_batch_size = 48 x 1 / context_parallel_size = 2 makes 24 tokens a product, no multiple of 16 as fp8_tensorwise needs; for seq_length x micro_batch_size try 32 or 64"),
        ("fp8_tensorwise", {"model__seq_length": 48, "parallel__tensor_model_parallel_size": 4, "parallel__sequence_parallel": True}, "48 x 1 / tensor_model_parallel_size = 4 (sequence_parallel) makes 12 tokens a product, no multiple of 8 as fp8_tensorwise needs; for seq_length x micro_batch_size try 32 or 64"),
        ("fp8_blockwise", {"model__hidden_size": 128, "model__seq_length": 128, **SP2}, "makes 64 tokens a product, no multiple of 128 as fp8_blockwise needs; for seq_length x micro_batch_size try 256"),
        ("mxfp8", {"model__seq_length": 48}, "makes 48 tokens a product, no multiple of 32 as mxfp8 needs"),
        # layers in bfloat16
        ("fp8_delayed", {"precision__num_layers_at_start_in_bf16": 1}, "precision.num_layers_at_start_in_bf16: 1: fp8_delayed scales all layers together and cannot leave some in bfloat16; set it to 0, or use one of fp8_tensorwise, fp8_blockwise, mxfp8"),
        ("bf16", {"precision__num_layers_at_end_in_bf16": 1}, "precision.num_layers_at_end_in_bf16: 1 has no effect under recipe bf16"),
        ("fp8_tensorwise", {"precision__num_layers_at_end_in_bf16": 3, "parallel__pipeline_model_parallel_size": 2}, "3 is more than the 2 layers of a stage (model.num_layers = 4 / 2)"),
        ("fp8_tensorwise", {"precision__num_layers_at_start_in_bf16": 2, "precision__num_layers_at_end_in_bf16": 2}, "2 first and 2 last layers are all of model.num_layers = 4: no layer would be in FP8"),
        # parameters in FP8
        ("bf16", {"precision__fp8_param_gather": True}, "precision.fp8_param_gather: true has no effect under recipe bf16"),
        ("mxfp8", {"precision__fp8_param_gather": True}, "precision.fp8_param_gather: true: parameters are not kept in the format of mxfp8 here"),
        ("fp8_tensorwise", {"precision__fp8_param_gather": True, "parallel__use_distributed_optimizer": False}, "parameters are gathered only under parallel.use_distributed_optimizer: true"),
        # delayed scaling
        ("fp8_tensorwise", {"precision__fp8_amax_history_len": 16}, "precision.fp8_amax_history_len: 16: recipe fp8_tensorwise keeps no history of largest values"),
        ("bf16", {"precision__fp8_amax_compute_algo": "max"}, "precision.fp8_amax_compute_algo: max: recipe bf16 keeps no history"),
        ("fp8_delayed", NORMS, "parallel.recompute_modules: layernorm cannot be recomputed under fp8_delayed"),
        # kernels
        ("bf16", {"precision__cross_entropy_loss_fusion": False, "precision__cross_entropy_fusion_impl": "te"}, "precision.cross_entropy_fusion_impl: te has no effect with cross_entropy_loss_fusion: false"),
        ("fp8_tensorwise", {"runtime__device": "cpu"}, "precision.recipe: fp8_tensorwise needs a GPU, and runtime.device is cpu; use bf16"),
        ("bf16", {"runtime__device": "cpu", "precision__cross_entropy_loss_fusion": True}, "precision.cross_entropy_loss_fusion: true needs a GPU, and runtime.device is cpu"),
        ("bf16", {"runtime__device": "cpu", **LOCAL}, "precision.cuda_graph_impl: local needs a GPU, and runtime.device is cpu"),
        ("bf16", {"parallel__tp_comm_overlap": True}, "parallel.tp_comm_overlap: true needs sequence_parallel: true and tensor_model_parallel_size of at least 2"),
        ("fp32", {"parallel__tp_comm_overlap": True, **SP2}, "parallel.tp_comm_overlap: true has no buffers for recipe fp32"),
        ("fp8_blockwise", {"parallel__tp_comm_overlap": True, **SP2}, "Transformer Engine's user buffers do not hold fp8_blockwise"),
        # CUDA graphs
        ("bf16", {"precision__cuda_graph_scope": ["attn"]}, "precision.cuda_graph_scope: has no effect under cuda_graph_impl: none"),
        ("bf16", {**LOCAL, "training__rampup_batch_size": [4, 2, 64]}, "precision.cuda_graph_impl: local graphs hold as many microbatches as the first step has"),
        ("bf16", {**LOCAL, "data__reset_attention_mask": True}, "local graphs do not take data.reset_attention_mask's masks"),
        ("bf16", {**LOCAL, **FULL}, "local graphs cannot hold layers under parallel.recompute_granularity: full"),
        ("bf16", {**LOCAL, "model__hidden_dropout": 0.1}, "local graphs would keep dropout in validation"),
        ("bf16", {"precision__cuda_graph_impl": "transformer_engine", "model__attention_dropout": 0.1, "parallel__recompute_granularity": "selective", "parallel__recompute_modules": ["core_attn"]}, "a recomputed core_attn with model.attention_dropout does not fit into a graph"),
        ("bf16", {**TE_GRAPHS, "model__hidden_dropout": 0.1, **SELECTIVE, "parallel__recompute_modules": ["mlp"]}, "a recomputed mlp with model.hidden_dropout does not fit into a graph"),
        ("bf16", {**TE_GRAPHS, **EXPERTS, **SELECTIVE, "parallel__recompute_modules": ["moe"], "precision__cuda_graph_scope": ["attn", "moe_router"]}, "transformer_engine graphs of the moe_router do not go with a recomputed moe"),
        ("fp32", TE_GRAPHS, "transformer_engine graphs take bfloat16 layers only, not recipe fp32; use local"),
        ("bf16", {**LOCAL, **EXPERTS}, "experts get other numbers of tokens in every step"),
        ("bf16", {**LOCAL, "precision__cuda_graph_scope": ["moe_router"]}, "a layer of family llama has no moe_router"),
    ],
)  # fmt: skip
def test_refusals(recipe: str, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(run_config(**{"precision__recipe": recipe, **changes}))
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        *((recipe, {}) for recipe in RECIPES),
        ("fp8_tensorwise", {"model__seq_length": 8, "training__micro_batch_size": 2}),
        ("fp8_tensorwise", {"model__ffn_hidden_size": 224, **SP2}),
        ("fp8_tensorwise", {"model__vocab_size": 1001}),  # the output layer is not in FP8
        ("fp8_tensorwise", {"precision__num_layers_at_start_in_bf16": 1, "precision__num_layers_at_end_in_bf16": 1}),
        ("fp8_tensorwise", {"precision__fp8_param_gather": False, "parallel__use_distributed_optimizer": False}),
        ("fp8_tensorwise", {"parallel__use_distributed_optimizer": False}),  # the default gives way
        ("fp8_tensorwise", {**EXPERTS, "model__seq_length": 48}),
        ("fp8_delayed", {"precision__fp8_amax_history_len": 16, "precision__fp8_amax_compute_algo": "most_recent"}),
        ("fp8_blockwise", {"model__hidden_size": 256, "model__seq_length": 256, **SP2}),
        ("bf16", {"model__hidden_size": 56, "model__seq_length": 31}),  # no FP8, no demands
        ("bf16", {**LOCAL, **EXPERTS, "precision__cuda_graph_scope": ["attn", "moe_router"]}),
        ("bf16", {"parallel__tp_comm_overlap": True, **SP2}),
        ("bf16", {**TE_GRAPHS, "model__hidden_dropout": 0.1, **SELECTIVE, "parallel__recompute_modules": ["mlp"], "precision__cuda_graph_scope": ["attn"]}),
        ("fp32", LOCAL),
    ],
)  # fmt: skip
def test_what_fits(recipe: str, changes: dict[str, Any]) -> None:
    validate(run_config(**{"precision__recipe": recipe, **changes}))


def test_all_faults_are_in_one_message() -> None:
    changes: dict[str, Any] = {
        "model__seq_length": 40,
        "model__ffn_hidden_size": 200,
        "precision__fp8_amax_history_len": 16,
        "parallel__use_distributed_optimizer": False,
        "precision__fp8_param_gather": True,
    }
    with pytest.raises(ConfigError) as caught:
        validate(run_config(precision__recipe="fp8_tensorwise", **changes))
    named = (
        "4 problems",
        "model.seq_length",
        "model.ffn_hidden_size",
        "fp8_amax_history_len",
        "fp8_param_gather",
    )
    text = str(caught.value)
    assert all(name in text for name in named), text


def test_a_record_spells_out_the_recipe() -> None:
    """What depends on another setting is filled in, and what was asked for stays."""
    from megatron_tokedit.config.record import resolve

    def recorded(recipe: str, **changes: Any) -> dict[str, Any]:
        config = resolve(run_config(precision__recipe=recipe, **changes), vocab_size=10)
        return config.precision.model_dump()

    assert recorded("fp8_tensorwise")["fp8_param_gather"] is True
    assert recorded("fp8_tensorwise", parallel__use_distributed_optimizer=False)["fp8_param_gather"] is False
    assert recorded("mxfp8")["fp8_param_gather"] is False
    assert recorded("bf16")["fp8_param_gather"] is None
    delayed = recorded("fp8_delayed", precision__fp8_amax_history_len=4)
    assert (delayed["fp8_amax_history_len"], delayed["fp8_amax_compute_algo"]) == (4, "max")
    assert recorded("fp8_delayed")["fp8_amax_history_len"] == 1024
