"""What is said about a run before it starts: published parameter counts, memory, rates, log lines."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from megatron_tokedit.config.load import load_config
from megatron_tokedit.config.record import resolve
from megatron_tokedit.engine.model import num_parameters
from megatron_tokedit.training.estimate import GIB, estimate_memory
from megatron_tokedit.training.metrics import MetricsWriter, duration, read_metrics, step_line
from megatron_tokedit.training.throughput import Rates, Throughput, device_peak, peak_tflops

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize(
    ("name", "published"), [("gpt2_124m", 124_439_808), ("llama3_8b", 8_030_261_248), ("tiny_cpu", 328_256)]
)
def test_parameter_counts(name: str, published: int) -> None:
    model = resolve(load_config(EXAMPLES / f"{name}.yaml"), vocab_size=1024).model
    assert num_parameters(model, model.vocab_size or 0) == published


def test_memory_follows_the_layout() -> None:
    path = EXAMPLES / "llama3_8b.yaml"
    one = estimate_memory(resolve(load_config(path), vocab_size=1), data_parallel_size=1)
    assert one.parameters == pytest.approx(8.03e9 / 8 * 2, rel=0.01)
    assert one.gradients == 2 * one.parameters
    assert one.optimizer == 6 * one.parameters
    assert one.total > one.parameters + one.optimizer
    eight = estimate_memory(resolve(load_config(path), vocab_size=1), data_parallel_size=8)
    assert eight.optimizer == one.optimizer / 8
    assert eight.total < 80 * GIB, "the example must fit the GPUs it names"
    halves = load_config(path, ["parallel.pipeline_model_parallel_size=2", "model.num_layers=32"])
    two_stages = estimate_memory(resolve(halves, vocab_size=1), data_parallel_size=8)
    assert 0.4 < two_stages.parameters / eight.parameters < 0.6
    assert two_stages.activations == eight.activations, "two stages keep two microbatches in flight"


def test_rates_count_steps_only() -> None:
    meter = Throughput(flops_per_token=1e9, world_size=2, peak_tflops=1.0)
    meter.add(seconds=1.0, tokens=1000)
    meter.add(seconds=3.0, tokens=1000)
    assert meter.rates() == Rates(2.0, 500.0, 0.25, 0.25)
    meter.add(seconds=1.0, tokens=10)
    assert meter.rates().tokens_per_second == 10


def test_peak_rate() -> None:
    cpu = torch.device("cpu")
    assert peak_tflops(cpu, "bf16", 3.5) == 3.5
    measured = peak_tflops(cpu, "fp32", None)
    assert measured is not None
    assert 0.0005 < measured < 100


@pytest.mark.parametrize(
    ("name", "recipe", "peak", "source"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.0, "data sheet of H100, bf16"),
        ("NVIDIA H100 80GB HBM3", "fp8_tensorwise", 1978.0, "data sheet of H100, 2 x bf16"),
        ("NVIDIA H100 PCIe", "fp8_delayed", 1512.0, "data sheet of H100 PCIe, 2 x bf16"),
        ("NVIDIA GH200 480GB", "bf16", 989.0, "data sheet of GH200, bf16"),
        ("NVIDIA B200", "mxfp8", 4500.0, "data sheet of B200, 2 x bf16"),
        ("NVIDIA L40S", "fp8_tensorwise", 724.0, "data sheet of L40S, 2 x bf16"),
        ("NVIDIA L40", "bf16", 181.0, "data sheet of L40, bf16"),
        ("NVIDIA A100-SXM4-80GB", "fp32", None, "no peak is known for float32"),
        ("Some GPU", "bf16", None, "Some GPU is not in the table; set logging.peak_tflops"),
    ],
)
def test_peak_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, name: str, recipe: str, peak: float | None, source: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    found = device_peak(torch.device("cuda"), recipe, None)
    assert (found.tflops, found.source) == (peak, source)
    assert str(found).startswith(f"{peak:.4g} TFLOP/s a rank (data" if peak else "unknown (")
    assert device_peak(torch.device("cuda"), recipe, 3.0).tflops == 3.0


def test_memory_of_fp8_weights() -> None:
    """By hand: a byte a weight as it is and one transposed, instead of the two of bfloat16 or beside them."""

    def parameters(*overrides: str) -> float:
        path = EXAMPLES / "llama3_8b.yaml"
        config = resolve(load_config(path, list(overrides)), vocab_size=1)
        return estimate_memory(config, data_parallel_size=1).parameters

    layer = 4096 * (32 + 2 * 8) * 128 + 32 * 128 * 4096 + 3 * 4096 * 14336  # qkv, projection, gated MLP
    bf16 = parameters("precision.recipe=bf16")
    assert parameters("precision.recipe=fp8_tensorwise") == bf16
    delayed = parameters("precision.recipe=fp8_delayed")
    assert delayed - bf16 == 32 * layer / 8 * 2
    two_in_bf16 = ("precision.num_layers_at_start_in_bf16=1", "precision.num_layers_at_end_in_bf16=1")
    blockwise = parameters("precision.recipe=fp8_blockwise", *two_in_bf16)
    assert blockwise - bf16 == 30 * layer / 8 * 2


def test_memory_of_the_fused_loss() -> None:
    """In place in bfloat16, against a float32 copy of the logits beside them."""

    def logits(*overrides: str) -> float:
        config = resolve(load_config(EXAMPLES / "llama3_8b.yaml", list(overrides)), vocab_size=1)
        return estimate_memory(config, data_parallel_size=1).logits

    values = 8192 * 128256 / 8
    assert logits("precision.recipe=bf16") == values * (2 + 4)
    assert logits("precision.recipe=fp8_tensorwise") == values * 2
    assert logits("precision.recipe=bf16", "precision.cross_entropy_loss_fusion=true") == values * 2


def test_step_line() -> None:
    rates = Rates(step_seconds=2.0, tokens_per_second=12345.6, tflops_per_device=0.0123, mfu=0.456)
    line = step_line(step=5, train_steps=1000, loss=2.5, lr=1e-3, grad_norm=0.7, rates=rates, skipped_steps=2)
    assert line == (
        "step    5/1000 | loss 2.5000 | lr 1.000e-03 | grad norm 0.700 | 12,346 tokens/s "
        "| 12.3 GFLOP/s a rank | MFU 45.6% | skipped 2 | ETA 33:10"
    )


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0:00"), (61, "1:01"), (3661, "1:01:01"), (90061, "1d 01:01:01")]
)
def test_duration(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_metrics_of_repeated_steps_are_dropped(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, first_step=1, is_writer=True)
    for step in (1, 2, 3):
        writer.write("train", step, {"loss": math.nan if step == 2 else step / 2, "mfu": None})
    writer.write("validation", 3, {"held": {"loss": 1.5}})
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')  # a kill cut this line short
    writer = MetricsWriter(tmp_path, first_step=3, is_writer=True)
    writer.write("train", 3, {"loss": 7.0})
    writer.close()
    assert [(record["step"], record["loss"]) for record in read_metrics(tmp_path)] == [
        (1, 0.5),
        (2, "nan"),
        (3, 7.0),
    ]
    assert all(json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "run", first_step=1, is_writer=False)
    writer.write("train", 1, {"loss": 1.0})
    writer.close()
    assert not (tmp_path / "run").exists()
