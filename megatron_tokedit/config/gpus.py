"""GPUs that a run can be checked for without one, and what their data sheets say.

Peaks are dense (without sparsity) and of the SXM form where there are several; FP8 has a multiple of the
bfloat16 rate (``Recipe.peak_of_bf16``). From NVIDIA's data sheets and its list of compute capabilities.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU.

    Attributes:
        name: a part of what CUDA calls the device.
        compute_capability: as CUDA reports it.
        bf16_tflops: peak rate of bfloat16 matrix products.
    """

    name: str
    compute_capability: tuple[int, int]
    bf16_tflops: float


GPUS: tuple[Gpu, ...] = (
    Gpu("GB200", (10, 0), 2500.0),
    Gpu("B200", (10, 0), 2250.0),
    Gpu("GH200", (9, 0), 989.0),
    Gpu("H200", (9, 0), 989.0),
    Gpu("H100 PCIe", (9, 0), 756.0),
    Gpu("H100 NVL", (9, 0), 835.0),
    Gpu("H100", (9, 0), 989.0),
    Gpu("A100", (8, 0), 312.0),
    Gpu("L40S", (8, 9), 362.0),
    Gpu("L40", (8, 9), 181.0),
    Gpu("L4", (8, 9), 121.0),
    Gpu("A10", (8, 6), 125.0),
)
"""Looked up in this order: the first whose name is a part of the device's."""

GPU_NAMES = ("a100", "l40s", "h100", "h200", "b200")
"""Those that a dry run can be asked to check for."""


def gpu_named(device_name: str) -> Gpu | None:
    """The GPU that CUDA calls ``device_name``, if it is known; case does not matter."""
    return next((gpu for gpu in GPUS if gpu.name.lower() in device_name.lower()), None)
