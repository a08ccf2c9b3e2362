# ruff: noqa: E501 - tables of messages read better unbroken
"""Every layout that megatron-core would refuse, or misread, is refused before launch with the arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
from config_cases import run_config

from megatron_tokedit.config.validate import validate
from megatron_tokedit.errors import ConfigError

MIXTURE = {"model__family": "mixtral", "model__num_moe_experts": 4}
TP2 = {"parallel__tensor_model_parallel_size": 2}
PP2 = {"parallel__pipeline_model_parallel_size": 2}
VPP2 = {**PP2, "parallel__virtual_pipeline_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("changes", "world_size", "expected"),
    [
        ({"parallel__sequence_parallel": True}, None, "parallel.sequence_parallel: has no effect at tensor_model_parallel_size = 1"),
        ({"parallel__sequence_parallel": True, **TP2, "model__seq_length": 35}, None, "parallel.sequence_parallel: model.seq_length = 35 cannot be cut into 2 equal pieces (tensor_model_parallel_size = 2): 35 / 2 = 17.5; for the length try 34 or 36"),
        ({"parallel__context_parallel_size": 8}, None, "model.seq_length = 36 cannot be cut into 16 equal pieces (2 x context_parallel_size = 2 x 8): 36 / 16 = 2.25; for the length try 32 or 48"),
        ({"parallel__context_parallel_size": 2, "runtime__device": "cpu"}, None, "parallel.context_parallel_size: 2 needs Transformer Engine's attention on a GPU, and runtime.device is cpu"),
        ({"parallel__context_parallel_size": 2, "data__reset_attention_mask": True}, None, "data.reset_attention_mask: an attention mask cannot be split over context_parallel_size = 2"),
        ({"parallel__context_parallel_size": 3, **TP2}, 8, "tensor_model_parallel_size x pipeline_model_parallel_size x context_parallel_size = 2 x 1 x 3 = 6 ranks each"),
        ({"parallel__virtual_pipeline_model_parallel_size": 2}, None, "2 chunks a stage need more than one stage"),
        ({**VPP2, "parallel__virtual_pipeline_model_parallel_size": 3}, None, "3 does not divide the 2 layers of a stage (model.num_layers / pipeline_model_parallel_size = 4 / 2); sizes that do: 1, 2"),
        ({**VPP2, "training__global_batch_size": 9}, 2, "9 makes 9 / 1 = 9 microbatches a rank; interleaved stages need a multiple of pipeline_model_parallel_size = 2; try 8 or 10"),
        ({**VPP2, "training__rampup_batch_size": [2, 1, 100]}, 2, "training.rampup_batch_size: 1 makes 1 / 1 = 1 microbatches a rank; interleaved stages need a multiple of pipeline_model_parallel_size = 2; try 2"),
        ({"parallel__expert_model_parallel_size": 2}, None, "family llama has no experts to spread"),
        ({**MIXTURE, "parallel__expert_model_parallel_size": 3}, None, "3 does not divide model.num_moe_experts = 4; sizes that do: 1, 2, 4"),
        ({**MIXTURE, "parallel__expert_model_parallel_size": 4}, 2, "parallel.expert_model_parallel_size: 4 does not divide the 2 ranks that would share the experts (data-parallel x context-parallel size = 2 x 1, of 2 ranks)"),
        ({**MIXTURE, **TP2}, None, "experts under tensor_model_parallel_size = 2 need it"),
        ({"model__family": "mixtral"}, None, "model.num_moe_experts: family mixtral needs it"),
        ({"model__num_moe_experts": 8}, None, "model.num_moe_experts: family llama has no experts"),
        ({**MIXTURE, "model__moe_router_topk": 5}, None, "5 is not between 2 and num_moe_experts = 4"),
        ({"model__family": "gpt2", "model__rope_scaling": True}, None, "family gpt2 has learned positions"),
        ({"model__rope_scaling_factor": 2.0}, None, "has no effect without rope_scaling"),
        ({"parallel__overlap_param_gather": True}, None, "needs overlap_grad_reduce: true, which is none"),
        ({"parallel__overlap_param_gather": True, "parallel__overlap_grad_reduce": True, "parallel__use_distributed_optimizer": False}, None, "parameters are gathered only under use_distributed_optimizer: true"),
        ({"parallel__recompute_method": "uniform"}, None, "parallel.recompute_method: has no effect under recompute_granularity: null"),
        ({"parallel__recompute_granularity": "selective", "parallel__recompute_num_layers": 2}, None, "parallel.recompute_num_layers: has no effect under recompute_granularity: selective"),
        ({"parallel__recompute_granularity": "full"}, None, "parallel.recompute_num_layers: recompute_granularity: full needs it"),
        ({"parallel__recompute_granularity": "full", "parallel__recompute_method": "block", "parallel__recompute_num_layers": 3, **PP2}, None, "3 is more than the 2 layers of a stage (model.num_layers = 4 / 2)"),
        ({"parallel__recompute_granularity": "selective", "parallel__recompute_modules": ["moe"]}, None, "a layer of family llama has no moe"),
        ({"model__family": "gpt2", "parallel__recompute_granularity": "selective", "parallel__recompute_modules": ["mlp"]}, None, "megatron-core cannot recompute an mlp with biases"),
    ],
)  # fmt: skip
def test_refusals(changes: dict[str, Any], world_size: int | None, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(run_config(36, **changes), world_size)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "world_size"),
    [
        ({**TP2, "parallel__sequence_parallel": True}, 2),
        ({**VPP2}, 4),
        ({"parallel__context_parallel_size": 2}, 4),
        ({**MIXTURE, "parallel__expert_model_parallel_size": 4}, 4),
        ({**MIXTURE, "parallel__expert_model_parallel_size": 2, "parallel__context_parallel_size": 2}, 2),
        ({"parallel__recompute_granularity": "selective"}, 1),
    ],
)
def test_layouts_that_fit(changes: dict[str, Any], world_size: int) -> None:
    validate(run_config(36, **changes), world_size)
