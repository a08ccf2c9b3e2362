from __future__ import annotations

import engine_cases
import pytest

from megatron_tokedit.config.sections import ParallelConfig, PrecisionConfig
from megatron_tokedit.engine import layers
from megatron_tokedit.engine import model as engine_model
from megatron_tokedit.errors import ConfigError
from megatron_tokedit.testing.models import tiny_llama


def test_flops_follow_the_six_n_rule_plus_attention():
    model = tiny_llama()
    matrices = engine_model.num_parameters(model, 90) - 90 * 32 - 9 * 32  # no input embedding, no norms
    attention = 3 * 4 * (2 * 2 * 32 * 33 / 2)
    assert engine_model.flops_per_token(model, 90) == pytest.approx(6 * matrices + attention)


def test_padding_does_not_depend_on_the_tensor_parallel_size():
    assert {engine_model.padded_vocab_size(1100, 128, tp) for tp in (1, 2, 4, 8)} == {1152}
    assert engine_model.padded_vocab_size(1100, 128, 3) == 1152
    assert engine_model.padded_vocab_size(1000, 128, 6) % 6 == 0


def test_sizes_that_do_not_divide_are_all_named():
    import torch

    model = tiny_llama(num_layers=3, num_query_groups=1)
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    with pytest.raises(ConfigError) as caught:
        engine_model.transformer_config(model, PrecisionConfig(recipe="fp32"), parallel, torch.device("cpu"))
    message = str(caught.value)
    assert "parallel.tensor_model_parallel_size: 2 does not divide model.num_query_groups = 1" in message
    assert "parallel.pipeline_model_parallel_size: 2 does not divide model.num_layers = 3" in message


def specs_of_a_gpu():
    """The mask types of Transformer Engine's spec, with the local one standing in for it."""
    from unittest import mock

    import torch
    from megatron.core.models.gpt import gpt_layer_specs

    probe = mock.Mock(transformer_engine="2.11")
    te_spec = mock.patch.object(
        gpt_layer_specs,
        "get_gpt_layer_with_transformer_engine_spec",
        gpt_layer_specs.get_gpt_layer_local_spec,
    )
    config = mock.Mock(
        num_moe_experts=None, moe_grouped_gemm=False, qk_layernorm=False, recompute_modules=["core_attn"]
    )
    with te_spec, mock.patch.object(layers.preflight, "probe", return_value=probe):
        specs = [
            layers.layer_spec(config, torch.device("cuda"), documents_masked=masked)
            for masked in (False, True)
        ]
        config.recompute_modules = ["layernorm"]
        with pytest.raises(ConfigError, match="layernorm has no effect"):
            layers.layer_spec(config, torch.device("cuda"))
    return [spec.submodules.self_attention.params["attn_mask_type"].name for spec in specs]


def test_transformer_engine_is_told_of_document_masks(ranks):
    """Under its own mask type, ``causal``, it would ignore them without a word."""
    assert ranks.run(specs_of_a_gpu, world_size=1) == [["causal", "arbitrary"]]


def launch_order(tp):
    import os

    before = os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)
    engine_cases.start(tiny_llama(), tp=tp)
    found = os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)
    os.environ.update({"CUDA_DEVICE_MAX_CONNECTIONS": before} if before else {})
    return found


def test_tensor_parallel_kernels_run_in_launch_order(ranks):
    assert ranks.run(launch_order, 2, world_size=2) == ["1", "1"]
    assert ranks.run(launch_order, 1, world_size=2) == [None, None]


def world_does_not_fit():
    try:
        engine_cases.start(tiny_llama(), tp=2)
    except ConfigError as error:
        return str(error)
    return "started"


def test_world_size_that_does_not_fit(ranks):
    (message,) = ranks.run(world_does_not_fit, world_size=1)
    assert (
        "1 ranks cannot be split into tensor_model_parallel_size=2 x pipeline_model_parallel_size=1"
        in message
    )


def rates():
    from megatron_tokedit.engine.optimizer import learning_rate

    run = engine_cases.start(tiny_llama(), lr=1e-2, min_lr=1e-3)
    seen = []
    for _ in range(21):
        seen.append(learning_rate(run.optimizer))
        run.scheduler.step(1)
    return seen


def test_schedule_warms_up_and_decays_by_cosine(ranks):
    import math

    (seen,) = ranks.run(rates, world_size=1)
    assert seen[:3] == pytest.approx([0.0, 5e-3, 1e-2])
    want = [1e-3 + 9e-3 * 0.5 * (1 + math.cos(math.pi * (step - 2) / 18)) for step in range(2, 21)]
    assert seen[2:] == pytest.approx(want)
