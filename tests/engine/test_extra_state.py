"""Checkpoints that move between kinds of layers and between precision recipes."""

from __future__ import annotations

import logging
from unittest.mock import patch

import engine_cases
import pytest

from megatron_tokedit.config.sections import PrecisionConfig
from megatron_tokedit.testing.models import tiny_llama, tiny_model

FAMILIES = ("llama", "gpt2", "qwen2", "qwen3", "olmo", "mixtral")


def steps_from_either(folder, model, layout):
    """Losses of steps 3 to 5 in both kinds of layers, from checkpoints of both kinds, and all keys."""
    import te_layers

    results, keys = {}, {}
    for saved_by_te in (False, True):
        with te_layers.te_layers(saved_by_te):
            first = engine_cases.start(model, **layout)
        first.steps(2)
        first.save(folder / f"{saved_by_te}", 2)
        first.ctx.destroy()
        for loaded_by_te in (False, True):
            with te_layers.te_layers(loaded_by_te):
                second = engine_cases.start(model, seed=99, **layout)
            second.load(folder / f"{saved_by_te}")
            second.skip_batches(2)
            results[saved_by_te, loaded_by_te] = second.steps(3)
            keys[saved_by_te, loaded_by_te] = num_loads(second.model)
            second.ctx.destroy()
    return results, keys


def num_loads(model):
    import te_layers

    return {name: state.num_loads for name, state in te_layers.states(model).items()}


@pytest.mark.parametrize(
    ("family", "world_size", "layout"),
    [
        *((family, 1, {}) for family in FAMILIES),
        ("llama", 2, {"tp": 2, "layout": {"sequence_parallel": True}}),
        ("gpt2", 2, {"pp": 2}),
        ("mixtral", 2, {"layout": {"expert_model_parallel_size": 2}}),
    ],
)
def test_checkpoints_move_between_kinds_of_layers(ranks, tmp_path, family, world_size, layout):
    model = tiny_model(family)
    with_state = set()
    for results, loads in ranks.run(steps_from_either, tmp_path, model, layout, world_size=world_size):
        straight = results[False, False]
        assert len({loss for loss, _ in straight}) == 3
        for steps in results.values():
            assert sum(steps, ()) == pytest.approx(sum(straight, ()), rel=1e-5)
        for (_, loaded_by_te), counts in loads.items():
            assert bool(counts) == loaded_by_te
        linear = {name for name in loads[False, True] if ".linear_" in name}
        assert len(linear) >= 4 * model.num_layers // layout.get("pp", 1)
        with_state |= loads[False, True].keys()
    assert any("layernorm" in name for name in with_state) == (family != "olmo")


def save_with_histories(folder, model, layout, recipe):
    """Every layer's history says which layer it is."""
    import te_layers

    with te_layers.te_layers():
        run = engine_cases.start(model, **layout)
    for name, state in te_layers.states(run.model).items():
        state.history = [float(sum(map(ord, name))), 2.0]
    run.precision = PrecisionConfig(recipe=recipe)
    run.save(folder, 1)


def histories_loaded(folder, model, layout, recipe):
    """What the layers have after a load, and what was said."""
    import te_layers

    from megatron_tokedit.engine import extra_state

    with te_layers.te_layers():
        run = engine_cases.start(model, seed=99, **layout)
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    level = extra_state.logger.level
    extra_state.logger.addHandler(handler)
    extra_state.logger.setLevel(logging.INFO)
    try:
        with patch.object(extra_state, "recipe_of", lambda config: recipe):
            run.load(folder)
    finally:
        extra_state.logger.removeHandler(handler)
        extra_state.logger.setLevel(level)
    return {name: state.history for name, state in te_layers.states(run.model).items()}, " ".join(said)


def expected_history(name):
    return None if name.endswith("core_attention") else [float(sum(map(ord, name))), 2.0]


@pytest.mark.parametrize(
    ("saved", "loaded", "world_size"),
    [({}, {}, 1), ({"tp": 2}, {"pp": 2}, 2), ({"pp": 2}, {"tp": 2}, 2)],
    ids=["one", "tp-to-pp", "pp-to-tp"],
)
def test_amax_histories_go_on_under_any_layout(ranks, tmp_path, saved, loaded, world_size):
    model = tiny_llama()
    ranks.run(save_with_histories, tmp_path, model, saved, "fp8_delayed", world_size=world_size)
    results = ranks.run(histories_loaded, tmp_path, model, loaded, "fp8_delayed", world_size=world_size)
    names = set()
    for histories, said in results:
        assert histories == {name: expected_history(name) for name in histories}
        assert said == ""
        names |= histories.keys()
    assert {name.split(".")[2] for name in names if ".layers." in name} == {"1", "2", "3", "4"}


@pytest.mark.parametrize(
    ("saved", "loaded", "words"),
    [
        ("fp8_delayed", "fp8_tensorwise", "amax histories are left behind: fp8_tensorwise has none"),
        ("fp8_delayed", "bf16", "amax histories are left behind: bf16 has none"),
        ("fp8_tensorwise", "fp8_delayed", "amax histories start empty"),
        ("bf16", "fp8_delayed", "amax histories start empty"),
        ("fp8_tensorwise", "fp8_blockwise", "recipe fp8_tensorwise, this run goes on under fp8_blockwise"),
        ("fp8_tensorwise", "fp8_tensorwise", ""),
    ],
)
def test_histories_stay_behind_where_the_recipe_changes(ranks, tmp_path, saved, loaded, words):
    model = tiny_llama(num_layers=1)
    ranks.run(save_with_histories, tmp_path, model, {}, saved, world_size=1)
    ((histories, said),) = ranks.run(histories_loaded, tmp_path, model, {}, loaded, world_size=1)
    assert histories == dict.fromkeys(histories)
    assert words in said
    assert bool(said) == bool(words)


def test_a_delayed_run_goes_on_from_local_layers(ranks, tmp_path):
    """Recorded as fp8_delayed, but without any history: nothing to read is no error."""
    model = tiny_llama(num_layers=1)
    ranks.run(save_local_as, tmp_path, model, "fp8_delayed", world_size=1)
    ((histories, _),) = ranks.run(histories_loaded, tmp_path, model, {}, "fp8_delayed", world_size=1)
    assert histories == dict.fromkeys(histories)


def save_local_as(folder, model, recipe):
    run = engine_cases.start(model)
    run.precision = PrecisionConfig(recipe=recipe)
    run.save(folder, 1)


def fake_quantized():
    """A class of FP8 weights: ordinary values here, but recognised, and no file may hold one."""
    import torch

    class Quantized(torch.Tensor):
        def dequantize(self):
            return self.as_subclass(torch.Tensor) * 1.0

        def __reduce_ex__(self, protocol):
            raise AssertionError("a checkpoint must not hold FP8 tensors")

    return Quantized


def save_and_load_quantized(folder, model):
    """Weights of a model that has them in FP8, and of two that loaded its checkpoint: in FP8 and plain."""
    import torch
    from megatron.core import fp8_utils

    from megatron_tokedit.engine import checkpoint
    from megatron_tokedit.engine.model import build_model, unwrap

    quantized = fake_quantized()

    def build(seed, as_fp8):
        run = engine_cases.start(model, seed=seed, recipe="bf16")
        run.model = build_model(
            model, run.precision, run.ctx, 90, parallel=engine_cases.ParallelConfig(), wrap_with_ddp=False
        )
        gpt = unwrap(run.model[0])
        for layer in gpt.decoder.layers if as_fp8 else ():
            for linear in (layer.self_attention.linear_qkv, layer.mlp.linear_fc1):
                linear.weight = torch.nn.Parameter(linear.weight.detach().as_subclass(quantized))
        return run, gpt

    def weights(gpt):
        return {name: p.detach().as_subclass(torch.Tensor).float() for name, p in gpt.named_parameters()}

    with (
        patch.object(fp8_utils, "HAVE_TE_FP8_TENSOR_CLASS", True),
        patch.object(fp8_utils, "FP8_TENSOR_CLASS", quantized),
        patch.object(fp8_utils, "dequantize_fp8_tensor", lambda tensor: tensor.dequantize()),
    ):
        run, first = build(7, as_fp8=True)
        with patch.object(run.optimizer, "sharded_state_dict", lambda *args, **kwargs: {}):
            run.save(folder, 1)
        assert isinstance(first.decoder.layers[0].mlp.linear_fc1.weight, quantized)
        results = [weights(first)]
        run.ctx.destroy()
        for as_fp8 in (True, False):
            other, gpt = build(99, as_fp8=as_fp8)
            checkpoint.load(folder, model=other.model, optimizer=None, scheduler=None, ctx=other.ctx)
            results.append(weights(gpt))
            other.ctx.destroy()
    return [{name: tensor.numpy() for name, tensor in result.items()} for result in results]


def test_fp8_weights_are_saved_as_plain_ones(ranks, tmp_path):
    ((saved, in_fp8, plain),) = ranks.run(save_and_load_quantized, tmp_path, tiny_llama(), world_size=1)
    for loaded in (in_fp8, plain):
        for name, weight in saved.items():
            assert (loaded[name] == weight).all(), name


def main_parameters_and_weights(folder, model, layout):
    """Do weights loaded alone reach the main parameters, and loaded main parameters the weights?"""
    import torch

    from megatron_tokedit.engine import checkpoint
    from megatron_tokedit.engine.main_parameters import refresh_weights

    first = engine_cases.start(model, recipe="bf16", **layout)
    first.steps(2)
    first.save(folder, 2)
    want = [parameter.detach().clone() for parameter in first.model[0].parameters()]
    first.ctx.destroy()
    other = engine_cases.start(model, seed=99, recipe="bf16", **layout)
    checkpoint.load(
        folder,
        model=other.model,
        optimizer=None,
        scheduler=None,
        ctx=other.ctx,
        main_parameters_of=other.optimizer,
    )
    equal = []
    for _ in range(2):
        for parameter in other.model[0].parameters():
            parameter.data.zero_()
        refresh_weights(other.optimizer, other.model)
        got = list(other.model[0].parameters())
        equal.append(all(torch.equal(a, b) for a, b in zip(got, want, strict=True)))
        other.steps(1)  # moves away from the checkpoint
        other.load(folder)
    return equal


@pytest.mark.parametrize(
    ("world_size", "layout", "family"),
    [
        (2, {}, "llama"),
        (1, {"distributed": False}, "llama"),
        (2, {"layout": {"expert_model_parallel_size": 2}}, "mixtral"),
    ],
)
def test_main_parameters_and_weights_are_made_equal(ranks, tmp_path, world_size, layout, family):
    model = tiny_model(family)
    for equal in ranks.run(main_parameters_and_weights, tmp_path, model, layout, world_size=world_size):
        assert equal == [True, True]


def continue_in(folder, model, recipe, layout):
    """Whether the weights are those of the main parameters after a load, their dtypes, and two steps."""
    import torch

    from megatron_tokedit.engine.main_parameters import refresh_weights

    run = engine_cases.start(model, seed=99, recipe=recipe, **layout)
    run.load(folder)
    loaded = [parameter.detach().clone() for parameter in run.model[0].parameters()]
    refresh_weights(run.optimizer, run.model)
    run.skip_batches(3)
    same = all(torch.equal(a, b) for a, b in zip(loaded, run.model[0].parameters(), strict=True))
    return same, {str(tensor.dtype) for tensor in loaded}, run.steps(2)


@pytest.mark.parametrize(("saved", "loaded"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_a_run_goes_on_in_another_precision(ranks, tmp_path, saved, loaded):
    model = tiny_llama()
    ranks.run(engine_cases.train_and_save, tmp_path, model, 3, recipe=saved, world_size=2)
    straight = ranks.run(engine_cases.train_straight, model, 5, recipe=saved, world_size=2)[0]
    dtype = {"bf16": "torch.bfloat16", "fp32": "torch.float32"}[loaded]
    for same, dtypes, steps in ranks.run(continue_in, tmp_path, model, loaded, {}, world_size=2):
        assert same
        assert dtypes == {dtype}
        assert [loss for loss, _ in steps] == pytest.approx([loss for loss, _ in straight[3:]], abs=0.02)
