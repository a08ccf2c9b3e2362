"""The memory estimate against what ranks really hold."""

from __future__ import annotations

import engine_cases
import pytest

from megatron_tokedit.config.sections import RunConfig
from megatron_tokedit.testing.models import tiny_model
from megatron_tokedit.training.estimate import estimate_memory

SMALL = {"hidden_size": 64, "ffn_hidden_size": 256, "seq_length": 32}


def bytes_held(model, layout):
    """Bytes of parameters, gradients and optimizer state of this rank."""
    run = engine_cases.start(model, vocab_size=96, recipe="bf16", **layout)
    run.steps(1)
    parameters = [parameter for chunk in run.model for parameter in chunk.parameters()]
    states = [
        tensor
        for part in run.optimizer.chained_optimizers
        for main, state in part.optimizer.state.items()
        for tensor in (main, state["exp_avg"], state["exp_avg_sq"])
    ]
    return (
        sum(p.numel() * p.element_size() for p in parameters),
        sum(p.main_grad.numel() * p.main_grad.element_size() for p in parameters),
        sum(tensor.numel() * tensor.element_size() for tensor in states),
    )


def run_config(model, layout, **parallel):
    names = {"tp": "tensor_model_parallel_size", "pp": "pipeline_model_parallel_size"}
    sizes = {names[key]: layout[key] for key in names if key in layout}
    return RunConfig.model_validate(
        {
            "run_dir": "x",
            "tokenizer": {"type": "SentencePieceTokenizer", "model": "x"},
            "model": model.resolved(96).model_dump(),
            "parallel": {**sizes, **layout.get("layout", {}), **parallel},
            "optimizer": {"lr": 1e-3},
            "training": {"train_steps": 1, "global_batch_size": 8},
            "data": {"train": [{"name": "a", "prefix": "x"}]},
        }
    )


@pytest.mark.parametrize(
    ("family", "layout", "world_size"),
    [
        ("llama", {}, 1),
        ("gpt2", {"tp": 2}, 4),
        ("llama", {"pp": 2, "layout": {"virtual_pipeline_model_parallel_size": 2}}, 4),
        ("mixtral", {"layout": {"expert_model_parallel_size": 2}}, 4),
        ("mixtral", {"tp": 2, "layout": {"expert_model_parallel_size": 2, "sequence_parallel": True}}, 4),
    ],
)
def test_held_bytes(ranks, family, layout, world_size):
    model = tiny_model(family, **SMALL)
    held = ranks.run(bytes_held, model, layout, world_size=world_size)
    copies = world_size // (layout.get("tp", 1) * layout.get("pp", 1))
    estimate = estimate_memory(run_config(model, layout), data_parallel_size=copies)
    fullest = [max(each) for each in zip(*held, strict=True)]
    assert estimate.parameters == pytest.approx(fullest[0], rel=0.03)
    assert estimate.gradients == pytest.approx(fullest[1], rel=0.03)
    mean = sum(each[2] for each in held) / world_size  # shards of one copy are cut by size, not by tensor
    assert estimate.optimizer == pytest.approx(mean, rel=0.05 if layout.get("pp", 1) == 1 else 0.3)


def activations(layout=None, family="llama", **parallel):
    model = tiny_model(family, **SMALL)
    return estimate_memory(run_config(model, layout or {}, **parallel), data_parallel_size=1).activations


def test_activations_follow_the_layout():
    plain = activations()
    assert activations({"tp": 2}) > activations({"tp": 2}, sequence_parallel=True) == plain / 2
    assert activations(context_parallel_size=2) == plain / 2
    assert activations({"pp": 2}) == plain  # half of the layers, two microbatches
    chunks = {"pp": 2, "layout": {"virtual_pipeline_model_parallel_size": 2}}
    assert activations(chunks) == pytest.approx(plain * 1.25)  # 1 + (p - 1) / (p v)


def test_recomputation_keeps_less():
    full = {"recompute_granularity": "full", "recompute_num_layers": 1}
    uniform = activations(recompute_method="uniform", **full)
    block = activations(recompute_method="block", **full)
    layernorm = activations(recompute_granularity="selective", recompute_modules=["layernorm"])
    mlp = activations(recompute_granularity="selective", recompute_modules=["mlp"])
    assert uniform < block < 2 * activations()
    assert uniform < mlp < activations()
    assert uniform < layernorm < activations()
    assert activations(recompute_granularity="selective") == activations()  # attention kernels keep no matrix
