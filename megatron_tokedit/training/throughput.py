"""How fast a run is, and how fast its device could be: tokens/s, TFLOP/s, model FLOP utilisation, time left.

Invariant: only time spent in training steps counts; validation and saving are left out.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from megatron_tokedit.config.gpus import gpu_named
from megatron_tokedit.config.recipes import RECIPES
from megatron_tokedit.config.sections import PrecisionConfig


@dataclass(frozen=True, slots=True)
class Peak:
    """What model FLOP utilisation is measured against.

    Attributes:
        tflops: peak rate of one rank's device; None where it is not known.
        source: where the number is from, in words.
    """

    tflops: float | None
    source: str

    def __str__(self) -> str:
        return (
            f"{self.tflops:.4g} TFLOP/s a rank ({self.source})" if self.tflops else f"unknown ({self.source})"
        )


def device_peak(device: torch.device, recipe: str, configured: float | None) -> Peak:
    """Peak rate of one rank's device, for products in the recipe's precision.

    On a CPU it is what a matrix product reaches while every rank computes one, so call it on all ranks at
    the same time. Under an FP8 recipe attention and the output layer stay in bfloat16, so that not even a
    perfect run reaches the FP8 peak.

    Args:
        device: of this rank.
        recipe: the precision recipe.
        configured: ``logging.peak_tflops``; wins where given.
    """
    traits = RECIPES[PrecisionConfig.model_validate({"recipe": recipe}).recipe]
    if configured is not None:
        return Peak(configured, "logging.peak_tflops")
    if device.type == "cpu":
        dtype = torch.bfloat16 if traits.compute_dtype == "bf16" else torch.float32
        return Peak(_measured_cpu_tflops(dtype), "measured, a matrix product")
    name = torch.cuda.get_device_name(device)
    gpu = gpu_named(name)
    if traits.compute_dtype == "fp32":
        return Peak(None, "no peak is known for float32")
    if gpu is None:
        return Peak(None, f"{name} is not in the table; set logging.peak_tflops")
    times = f", {traits.peak_of_bf16:g} x bf16" if traits.is_fp8 else ", bf16"
    return Peak(gpu.bf16_tflops * traits.peak_of_bf16, f"data sheet of {gpu.name}{times}")


def peak_tflops(device: torch.device, recipe: str, configured: float | None) -> float | None:
    """:func:`device_peak` in TFLOP/s; None where it is not known."""
    return device_peak(device, recipe, configured).tflops


def _measured_cpu_tflops(dtype: torch.dtype, size: int = 768, repeats: int = 6) -> float:
    """Best rate of a square matrix product, in TFLOP/s."""
    left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    best_seconds = float("inf")
    with torch.no_grad():
        for _ in range(repeats):
            start = time.perf_counter()
            torch.mm(left, right)
            best_seconds = min(best_seconds, time.perf_counter() - start)
    return 2.0 * size**3 / best_seconds / 1e12


@dataclass(frozen=True, slots=True)
class Rates:
    """Rates over a number of steps.

    Attributes:
        step_seconds: mean seconds a step.
        tokens_per_second: over all ranks.
        tflops_per_device: of the model's own arithmetic, a rank.
        mfu: share of the device's peak, 0 to 1; None where the peak is not known.
    """

    step_seconds: float
    tokens_per_second: float
    tflops_per_device: float
    mfu: float | None


class Throughput:
    """Adds up steps between two log lines."""

    def __init__(self, *, flops_per_token: float, world_size: int, peak_tflops: float | None) -> None:
        self.flops_per_token = flops_per_token
        self.world_size = world_size
        self.peak_tflops = peak_tflops
        self._seconds = 0.0
        self._tokens = 0
        self._steps = 0

    def add(self, *, seconds: float, tokens: int) -> None:
        """Count one step."""
        self._seconds += seconds
        self._tokens += tokens
        self._steps += 1

    def rates(self, *, reset: bool = True) -> Rates:
        """Rates since the last reset."""
        seconds = max(self._seconds, 1e-9)
        tokens_per_second = self._tokens / seconds
        tflops = tokens_per_second * self.flops_per_token / self.world_size / 1e12
        mfu = tflops / self.peak_tflops if self.peak_tflops else None
        rates = Rates(seconds / max(self._steps, 1), tokens_per_second, tflops, mfu)
        if reset:
            self._seconds, self._tokens, self._steps = 0.0, 0, 0
        return rates
