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
    chunk.parameters.return_value = []
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


def random_states() -> list[bool]:
    """Plain states travel as they are; a tracker of generators gives tensors."""
    from megatron_tokedit.engine.cuda_graphs import plain_states, tracked_states

    generator = torch.Generator()
    generator.manual_seed(3)
    plain = plain_states({"a": generator, "b": torch.arange(3)})
    back = tracked_states({"b": plain["b"]}, {"b": torch.zeros(3)})
    return [
        torch.equal(plain["a"], generator.get_state()),
        torch.equal(plain["b"], torch.arange(3)),
        back["b"] is plain["b"],
    ]


def test_random_states_are_saved_as_tensors(ranks: Any) -> None:
    assert ranks.run(random_states, world_size=1) == [[True, True, True]]
