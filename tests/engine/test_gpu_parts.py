"""What of a GPU run lies outside of the layers: weight gradients, gathered FP8 weights, user buffers, CUDA
graphs and their random states, with stand-ins for Transformer Engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_tokedit.config.sections import ParallelConfig, PrecisionConfig
from megatron_tokedit.testing.models import tiny_model


def fused_layers() -> tuple[int, list[bool]]:
    """Layers that have the attribute, as Transformer Engine's have."""
    from megatron_tokedit.engine.layers import fuse_weight_gradients

    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    module[1].fuse_wgrad_accumulation = False  # type: ignore[assignment]
    count = fuse_weight_gradients(module)
    return count, [bool(getattr(layer, "fuse_wgrad_accumulation", False)) for layer in module]


def test_weight_gradients_are_fused_in_the_layers_that_can() -> None:
    assert fused_layers() == (1, [False, True])


def says_that_gradients_are_fused() -> list[bool]:
    """The field that megatron-core's graphs ask, of a model whose layers fuse: without graphs, and with."""
    from unittest import mock

    from megatron_tokedit.engine import model
    from megatron_tokedit.engine.initialize import initialize

    ctx = initialize(ParallelConfig(), seed=1, device="cpu")
    said = []
    for impl in ("none", "local"):
        built = tiny_model("llama", num_layers=1)
        config = model.transformer_config(built, PrecisionConfig(), ParallelConfig(), ctx.device)
        module = model._gpt_model(built, config, ctx, 16, False, 0)
        with mock.patch.object(model, "fuse_weight_gradients", return_value=3):
            precision = PrecisionConfig(cuda_graph_impl=impl)
            model._wrap_with_ddp([module], config, precision, ParallelConfig(), ctx)
        said.append(config.gradient_accumulation_fusion)
    return said


def test_graphs_know_of_fused_weight_gradients(ranks: Any) -> None:
    """Else the stand-in for a gradient, memory that nobody wrote to, would be added to the buffer."""
    assert ranks.run(says_that_gradients_are_fused, world_size=1) == [[False, True]]


def gathered(in_fp8: bool) -> list[str]:
    """What is done to a chunk whose parameters are gathered out of turn, with overlap and without."""
    from unittest import mock

    from megatron.core import fp8_utils

    from megatron_tokedit.engine.model import gather_parameters

    done: list[str] = []
    chunk = torch.nn.Linear(2, 2)
    chunk.start_param_sync = lambda force_sync: done.append(f"gather {force_sync}")  # type: ignore[assignment]
    with (
        mock.patch.object(fp8_utils, "is_float8tensor", lambda parameter: in_fp8 and parameter.ndim == 2),
        mock.patch.object(
            fp8_utils, "post_all_gather_processing", lambda found: done.append(f"{len(found)}")
        ),
    ):
        gather_parameters([chunk])
        chunk.use_forward_hook = True  # type: ignore[assignment]
        gather_parameters([chunk])
    return done


def test_fp8_weights_gathered_out_of_turn_are_transposed_again(ranks: Any) -> None:
    """megatron-core 0.16.1 does it only where it ends a gather of its own."""
    assert ranks.run(gathered, True, world_size=1) == [["gather True", "1"]]
    assert ranks.run(gathered, False, world_size=1) == [["gather True", "0"]]


class Buffers:
    """Transformer Engine's module ``base``, as far as user buffers go."""

    class UserBufferQuantizationMode:
        NONE, FP8 = "none", "fp8"

    def __init__(self, error: Exception | None = None) -> None:
        self.made: list[dict[str, Any]] = []
        self.error = error

    def initialize_ub(self, **arguments: Any) -> None:
        if self.error is not None:
            raise self.error
        self.made.append(arguments)


@pytest.fixture
def buffers(monkeypatch: pytest.MonkeyPatch) -> Buffers:
    import sys
    import types

    base = Buffers()
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    module = types.SimpleNamespace(base=base)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.module", module)
    return base


def test_user_buffers(buffers: Buffers) -> None:
    from megatron_tokedit.engine import user_buffers
    from megatron_tokedit.errors import ConfigError

    model, plain = tiny_model("llama", hidden_size=64, seq_length=128), PrecisionConfig()
    overlap = ParallelConfig(tensor_model_parallel_size=4, context_parallel_size=2, tp_comm_overlap=True)
    user_buffers.make(model, ParallelConfig(), plain, micro_batch_size=3)
    assert buffers.made == []
    user_buffers.make(model, overlap, plain, micro_batch_size=3)
    mixed = PrecisionConfig(recipe="fp8_tensorwise", num_layers_at_start_in_bf16=1)
    user_buffers.make(model, overlap, mixed, micro_batch_size=3)
    common = {"shape": [192, 64], "tp_size": 4, "bootstrap_backend": "nccl"}
    assert buffers.made == [
        {**common, "quantization_modes": ["none"]},
        {**common, "quantization_modes": ["fp8", "none"]},
    ]
    buffers.error = AssertionError("no multicast")
    with pytest.raises(ConfigError, match=r"parallel\.tp_comm_overlap: .*no multicast.*set it to false"):
        user_buffers.make(model, overlap, plain, micro_batch_size=3)


def captured_graphs(overlaps: bool) -> list[list[str]]:
    """What happens before each of six steps, in a fake of megatron-core's helper."""
    from unittest import mock

    from megatron.core import utils
    from megatron.core.transformer import cuda_graphs as core_graphs

    from megatron_tokedit.engine.cuda_graphs import LayerGraphs

    done: list[str] = []
    helper = mock.Mock()
    helper.graphs_created.side_effect = lambda: "capture" in done
    helper.create_cudagraphs.side_effect = lambda: done.append("capture")
    helper.cuda_graph_set_manual_hooks.side_effect = lambda: done.append("hooks")
    chunk = mock.Mock(use_forward_hook=overlaps)
    chunk.parameters.return_value = chunk.modules.return_value = []
    chunk.start_param_sync.side_effect = lambda force_sync: done.append("gather")
    chunk.disable_forward_pre_hook.side_effect = lambda param_sync: done.append(f"off {param_sync}")
    chunk.enable_forward_pre_hook.side_effect = lambda: done.append("on")
    ctx, config = mock.Mock(rank=0, dp_size=2), mock.Mock(cuda_graph_warmup_steps=3)
    sizes = {"micro_batch_size": 2, "seq_length": 8, "global_batch_size": 8}
    with (
        mock.patch.object(core_graphs, "TECudaGraphHelper", return_value=helper),
        mock.patch.object(utils, "get_model_config", return_value=config),
    ):
        graphs = LayerGraphs(
            PrecisionConfig(cuda_graph_impl="transformer_engine"), [chunk], "o", ctx, **sizes
        )
        none = LayerGraphs(PrecisionConfig(cuda_graph_impl="local"), [chunk], "o", ctx, **sizes)
    steps = []
    for _ in range(6):
        none.before_step()
        graphs.before_step()
        steps.append(list(done))
    return steps


def test_layer_graphs_are_captured_once_after_the_warm_up(ranks: Any) -> None:
    (plain,) = ranks.run(captured_graphs, False, world_size=1)
    assert plain == [[], [], [], *[["capture"]] * 3]
    (overlapping,) = ranks.run(captured_graphs, True, world_size=1)
    assert overlapping == [[], [], [], *[["gather", "off False", "capture", "on", "hooks"]] * 3]


def layers_that_cache(recipe: str) -> list[bool]:
    """Whether a layer of Transformer Engine's and a plain one are told of first microbatches, in graphs."""
    from unittest import mock

    from megatron.core import utils
    from megatron.core.transformer import cuda_graphs as core_graphs

    from megatron_tokedit.engine.cuda_graphs import LayerGraphs

    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].disable_parameter_transpose_cache = False  # type: ignore[assignment]
    precision = PrecisionConfig.model_validate({"recipe": recipe, "cuda_graph_impl": "transformer_engine"})
    sizes = {"micro_batch_size": 2, "seq_length": 8, "global_batch_size": 8}
    with mock.patch.object(core_graphs, "TECudaGraphHelper"), mock.patch.object(utils, "get_model_config"):
        LayerGraphs(precision, [model], "o", mock.Mock(rank=0, dp_size=2), **sizes)
    return [getattr(layer, "disable_parameter_transpose_cache", None) for layer in model]


def test_no_graph_writes_over_the_gradients_of_earlier_microbatches(ranks: Any) -> None:
    """A captured layer takes every microbatch for the first unless it caches FP8 weights, or nothing."""
    assert ranks.run(layers_that_cache, "bf16", world_size=1) == [[True, None]]
    assert ranks.run(layers_that_cache, "fp8_tensorwise", world_size=1) == [[False, None]]


def random_states() -> list[bool]:
    """Plain states travel as they are; a tracker of generators gives tensors, and keeps its generators."""
    from megatron_tokedit.engine.cuda_graphs import plain_states, tracked_states

    generator = torch.Generator()
    generator.manual_seed(3)
    plain = plain_states({"a": generator, "b": torch.arange(3)})
    back = tracked_states({"b": plain["b"]}, {"b": torch.zeros(3)})
    registered = torch.Generator()
    kept = tracked_states({"a": plain["a"]}, {"a": registered})
    return [
        kept["a"] is registered,
        torch.equal(registered.get_state(), plain["a"]),
        torch.equal(plain["a"], generator.get_state()),
        torch.equal(plain["b"], torch.arange(3)),
        back["b"] is plain["b"],
    ]


def test_random_states_are_saved_as_tensors(ranks: Any) -> None:
    assert ranks.run(random_states, world_size=1) == [[True] * 5]


def trackers() -> list[bool]:
    """Whether Transformer Engine's tracker is asked for: with it and without it, with graphs and without."""
    from unittest import mock

    from megatron.core import tensor_parallel

    from megatron_tokedit.engine import preflight
    from megatron_tokedit.engine.initialize import seed_everything

    asked = []
    for version in ("2.11.0", None):
        for graphs in (True, False):
            with (
                mock.patch.object(preflight, "probe", return_value=mock.Mock(transformer_engine=version)),
                mock.patch.object(tensor_parallel, "model_parallel_cuda_manual_seed") as seeded,
            ):
                seed_everything(3, 0, cuda_graphs=graphs)
            asked.append(seeded.call_args.kwargs["te_rng_tracker"])
            assert seeded.call_args.kwargs["use_cudagraphable_rng"] is graphs
    return asked


def test_graphs_know_the_random_states_of_transformer_engines_tracker(ranks: Any) -> None:
    """Its attention fails with "Unsupported RNG states tracker." in a capture under any other."""
    assert ranks.run(trackers, world_size=1) == [[True, False, False, False]]


def optimizer_beside_transformer_engine() -> str:
    """What comes of a training on a CPU in an environment made for GPUs."""
    import dataclasses
    from unittest import mock

    import engine_cases

    from megatron_tokedit.engine import preflight
    from megatron_tokedit.errors import ConfigError

    found = dataclasses.replace(preflight.probe(), transformer_engine="2.11.0")
    with mock.patch.object(preflight, "probe", return_value=found):
        try:
            run = engine_cases.start(tiny_model("llama"))
        except ConfigError as error:
            return str(error)
    return f"trained with {run.optimizer}"


def test_a_cpu_run_is_not_given_the_optimizer_of_a_gpu(ranks: Any) -> None:
    (message,) = ranks.run(optimizer_beside_transformer_engine, world_size=1)
    assert message.startswith("runtime.device: this run is on a CPU, but Transformer Engine is installed")
