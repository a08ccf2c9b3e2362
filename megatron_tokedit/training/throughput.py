"""How fast a run is, and how fast its device could be: tokens/s, TFLOP/s, model FLOP utilisation, time left.

Invariant: only time spent in training steps counts; validation and saving are left out.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

_PEAK_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10": 125.0,
}
"""Dense bfloat16 peaks from the vendor's data sheets, by part of the device's name; first match wins."""


def peak_tflops(device: torch.device, recipe: str, configured: float | None) -> float | None:
    """Peak rate of one rank's device.

    On a CPU it is what a matrix product reaches while every rank computes one, so call it on all ranks at
    the same time.

    Args:
        device: of this rank.
        recipe: the precision recipe.
        configured: ``logging.peak_tflops``; wins where given.

    Returns:
        TFLOP/s; None for a GPU that is not in the table or runs in float32.
    """
    if configured is not None:
        return configured
    if device.type == "cpu":
        return _measured_cpu_tflops(torch.bfloat16 if recipe == "bf16" else torch.float32)
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK_TFLOPS.items() if part in name and recipe != "fp32"), None)


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
