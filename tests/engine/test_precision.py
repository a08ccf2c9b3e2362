"""Recipes: what megatron-core is told, and that a model which would not compute so is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_tokedit.config.recipes import RECIPES
from megatron_tokedit.config.sections import ParallelConfig, PrecisionConfig
from megatron_tokedit.engine import machine, precision
from megatron_tokedit.testing.models import tiny_model

BF16 = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
EXPECTED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # TransformerConfig, OptimizerConfig, DistributedDataParallelConfig
    "fp32": (
        {"params_dtype": torch.float32, "pipeline_dtype": torch.float32},
        {"params_dtype": torch.float32},
        {},
    ),
    "bf16": (BF16, {"bf16": True, "params_dtype": torch.bfloat16}, {}),
    "fp8_tensorwise": (
        {**BF16, "fp8": "hybrid", "fp8_recipe": "tensorwise", "fp8_param": True},
        {"bf16": True, "params_dtype": torch.bfloat16, "fp8_recipe": "tensorwise"},
        {"fp8_param_gather": True},
    ),
    "fp8_delayed": (
        {
            **BF16,
            "fp8": "hybrid",
            "fp8_recipe": "delayed",
            "fp8_param": False,
            "fp8_amax_history_len": 1024,
            "fp8_amax_compute_algo": "max",
        },
        {"bf16": True, "params_dtype": torch.bfloat16, "fp8_recipe": "delayed"},
        {"fp8_param_gather": False},
    ),
    "fp8_blockwise": (
        {**BF16, "fp8": "e4m3", "fp8_recipe": "blockwise", "fp8_param": False},
        {"bf16": True, "params_dtype": torch.bfloat16, "fp8_recipe": "blockwise"},
        {"fp8_param_gather": False},
    ),
    "mxfp8": (
        {**BF16, "fp8": "e4m3", "fp8_recipe": "mxfp8", "fp8_param": False},
        {"bf16": True, "params_dtype": torch.bfloat16, "fp8_recipe": "mxfp8"},
        {"fp8_param_gather": False},
    ),
}  # fmt: skip


def fields(device: str = "cpu", parallel: dict[str, Any] | None = None, **settings: Any) -> Any:
    layout = ParallelConfig.model_validate(parallel or {})
    return precision.resolve(PrecisionConfig.model_validate(settings), torch.device(device), layout)


def test_every_recipe_is_in_the_table() -> None:
    assert EXPECTED.keys() == RECIPES.keys()
    assert all(f"``{name}``" in (precision.__doc__ or "") for name in RECIPES)


@pytest.mark.parametrize("recipe", EXPECTED)
def test_fields_of_a_recipe(recipe: str) -> None:
    transformer, optimizer, ddp = EXPECTED[recipe]
    found = fields(recipe=recipe)
    assert found.transformer == transformer
    assert found.optimizer == optimizer
    assert found.ddp == {"grad_reduce_in_fp32": True, **ddp}


def test_parameters_stay_in_bf16_without_the_distributed_optimizer() -> None:
    plain = fields(recipe="fp8_tensorwise", parallel={"use_distributed_optimizer": False})
    assert plain.transformer["fp8_param"] is False
    assert plain.ddp["fp8_param_gather"] is False
    asked = fields(recipe="fp8_blockwise", fp8_param_gather=True)
    assert asked.transformer["fp8_param"] is asked.ddp["fp8_param_gather"] is True


def test_first_and_last_layers() -> None:
    found = fields(recipe="fp8_tensorwise", num_layers_at_end_in_bf16=2).transformer
    assert found["first_last_layers_bf16"] is True
    assert (found["num_layers_at_start_in_bf16"], found["num_layers_at_end_in_bf16"]) == (0, 2)
    assert "first_last_layers_bf16" not in fields(recipe="fp8_tensorwise").transformer


def on(gpu: str, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """The probe finds this GPU."""
    import dataclasses

    found = dataclasses.replace(machine.assumed(gpu), **changes)
    monkeypatch.setattr(precision.preflight, "probe", lambda: found)


@pytest.mark.parametrize(
    ("engine", "settings", "expected"),
    [
        ("2.11.0", {}, (True, "te")),
        ("2.11.0", {"cross_entropy_fusion_impl": "native"}, (True, "native")),
        ("2.11.0", {"cross_entropy_loss_fusion": False}, (None, None)),
        (None, {}, (None, None)),
        (None, {"cross_entropy_loss_fusion": True}, (True, "native")),
    ],
)
def test_fused_loss(monkeypatch: Any, engine: str | None, settings: dict[str, Any], expected: Any) -> None:
    on("h100", monkeypatch, transformer_engine=engine)
    found = fields("cuda", **settings).transformer
    assert (found.get("cross_entropy_loss_fusion"), found.get("cross_entropy_fusion_impl")) == expected
    assert "cross_entropy_loss_fusion" not in fields("cpu", **settings).transformer


def test_cuda_graphs(monkeypatch: Any) -> None:
    on("h100", monkeypatch)
    found = fields("cuda", cuda_graph_impl="local").transformer
    assert (found["cuda_graph_impl"], found["cuda_graph_scope"]) == ("local", [])
    assert fields("cuda", cuda_graph_impl="local", cuda_graph_scope=["attn"]).transformer[
        "cuda_graph_scope"
    ] == ["attn"]
    assert "cuda_graph_impl" not in fields("cuda").transformer


# ----------------------------------------------------------------------------- what runs on a rank


def core_configs(recipes: list[str]) -> list[dict[str, Any]]:
    """megatron-core's own dataclasses, made as on an H100 or B200: its checks pass."""
    from unittest import mock

    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.optimizer import OptimizerConfig

    from megatron_tokedit.engine import model as engine_model

    made = []
    for recipe in recipes:
        probe = machine.assumed("b200" if recipe == "mxfp8" else "h100")
        settings = PrecisionConfig.model_validate(
            {"recipe": recipe, "cuda_graph_impl": "transformer_engine", "cuda_graph_scope": ["attn"]}
        )
        with (
            mock.patch.object(precision.preflight, "probe", return_value=probe),
            mock.patch.object(rope_utils, "fused_apply_rotary_pos_emb", mock.Mock()),
        ):
            config = engine_model.transformer_config(
                tiny_model("llama", hidden_size=64), settings, ParallelConfig(), torch.device("cuda")
            )
            rest = precision.resolve(settings, torch.device("cuda"), ParallelConfig())
        optimizer = OptimizerConfig(lr=1e-3, **rest.optimizer)
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, **rest.ddp)
        made.append(
            {
                "fp8": config.fp8,
                "fp8_recipe": config.fp8_recipe if config.fp8 else None,
                "fp8_param": config.fp8_param,
                "loss": config.cross_entropy_fusion_impl,
                "graphs": [scope.name for scope in config.cuda_graph_scope],
                "optimizer": optimizer.fp8_recipe,
                "gathered": ddp.fp8_param_gather,
            }
        )
    return made


def test_megatron_core_takes_every_recipe(ranks: Any) -> None:
    made = ranks.run(core_configs, list(RECIPES), world_size=1)[0]
    for recipe, found in zip(RECIPES.values(), made, strict=True):
        keeps = bool(recipe.param_gather)
        assert found == {
            "fp8": recipe.fp8,
            "fp8_recipe": recipe.fp8_recipe,
            "fp8_param": keeps,
            "loss": "te",
            "graphs": ["attn"],
            "optimizer": recipe.fp8_recipe,
            "gathered": keeps,
        }


def refusals() -> list[str]:
    """What is said of an FP8 run on this machine, of a model of plain layers, and of the ways to lose FP8."""
    import sys
    import types
    from unittest import mock

    import engine_cases
    from megatron.core import fp8_utils

    from megatron_tokedit.engine.initialize import initialize
    from megatron_tokedit.engine.model import build_model
    from megatron_tokedit.errors import ConfigError
    from megatron_tokedit.testing.models import tiny_llama

    settings, model = PrecisionConfig(recipe="fp8_tensorwise"), tiny_llama(hidden_size=64)
    ctx = initialize(ParallelConfig(), seed=1, device="cpu")
    said = []

    def note(function: Any, *args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
            said.append("passed")
        except ConfigError as error:
            said.append(str(error))

    note(build_model, model, settings, ctx, 96, parallel=ParallelConfig(), wrap_with_ddp=False)
    ctx.destroy()
    run = engine_cases.Run(
        tiny_llama(), ParallelConfig(), PrecisionConfig(), engine_cases.OptimizerConfig(lr=1e-3)
    )
    config = mock.Mock(fp8="hybrid", fp8_param=True, first_last_layers_bf16=False, num_layers=4)
    note(precision.check_model, settings, config, run.model)

    layer = torch.nn.Module()
    layer.self_attention, layer.layer_number = None, 1  # type: ignore[assignment]
    layer.linear_fc1 = torch.nn.Linear(2, 2)
    layer.linear_fc1.fp8_meta = {}  # type: ignore[assignment]
    state = types.SimpleNamespace(FP8GlobalStateManager=types.SimpleNamespace(is_fp8_enabled=lambda: True))
    packages = {
        "transformer_engine": types.ModuleType("transformer_engine"),
        "transformer_engine.pytorch": types.ModuleType("transformer_engine.pytorch"),
        "transformer_engine.pytorch.fp8": state,
    }
    with (
        mock.patch.dict(sys.modules, packages),
        mock.patch.object(fp8_utils, "get_fp8_recipe", return_value="a recipe"),
        mock.patch.object(fp8_utils, "is_float8tensor", lambda tensor: tensor.ndim == 2) as _,
    ):
        note(precision.check_model, settings, config, [layer])
        with mock.patch.object(fp8_utils, "is_float8tensor", return_value=False):
            note(precision.check_model, settings, config, [layer])
            config.first_last_layers_bf16, config.num_layers_at_start_in_bf16 = True, 1
            config.num_layers_at_end_in_bf16 = 0
            note(precision.check_model, settings, config, [layer])  # the stage has no layer in FP8
        state.FP8GlobalStateManager.is_fp8_enabled = lambda: False
        note(precision.check_model, settings, config, [layer])
    note(precision.check_model, PrecisionConfig(), mock.Mock(), run.model)
    run.ctx.destroy()
    return said


def test_a_model_without_fp8_is_refused(ranks: Any) -> None:
    here, plain, sound, in_bf16, all_in_bf16, no_context, no_fp8 = ranks.run(refusals, world_size=1)[0]
    assert "precision.recipe: fp8_tensorwise needs a GPU of compute capability 8.9" in here
    assert "16 linear layers do not know FP8, such as" in plain
    assert "decoder.layers.0.self_attention.linear_" in plain
    assert "megatron-core runs its layers outside of an FP8 context" in plain
    assert "tools/doctor.py" in plain
    assert sound == "passed"
    assert "none of its parameters is kept in FP8" in in_bf16
    assert all_in_bf16 == "passed"
    assert "outside of an FP8 context" in no_context
    assert no_fp8 == "passed"
