"""What scoring costs on this device: tokens a second, operations a token, share of the device's rate, memory.

Invariant: all of it is measured here and now or counted from the model; nothing is read off a data sheet.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from megatron_tokedit.scoring.base import CandidateRequest
from megatron_tokedit.scoring.resident import peak_resident_bytes
from megatron_tokedit.scoring.scorer import CausalScorer

_MATRIX_SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
_RATE_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class ScoringRate:
    """What scoring a sample cost.

    Attributes:
        tokens_per_second: scored tokens.
        num_parameters: of the model.
        flops_per_token: of a forward pass, for each scored token, with what overlapping windows compute
            twice: 2 x matmul parameters, output layer included, and attention at the sample's mean context.
            Padding is no work that counts.
        device_flops: floating-point operations a second of this device in matrix products, with torch's
            present number of threads.
        rate_dtype: the precision of these products: the model's, or bfloat16 for a model in FP8.
        share_of_device_rate: what scoring reaches of it.
        peak_memory_bytes: most memory this process has had: resident set on a CPU, allocated on a GPU.
    """

    tokens_per_second: float
    num_parameters: int
    flops_per_token: float
    device_flops: float
    rate_dtype: str
    share_of_device_rate: float
    peak_memory_bytes: int


def measure_rate(
    scorer: CausalScorer,
    documents: Sequence[npt.NDArray[np.int32]],
    request: CandidateRequest | None = None,
) -> ScoringRate:
    """Score a sample and say what it cost.

    Args:
        scorer: the prior.
        documents: the sample; what is short of a batch or two measures little.
        request: candidates to look for as well.

    Raises:
        PriorError: the model's numbers are unusable, or memory does not suffice.
    """
    backbone = scorer.backbone
    begin = time.perf_counter()
    scores = scorer.score(documents, request)
    seconds = max(time.perf_counter() - begin, 1e-9)
    num_tokens = sum(int(np.count_nonzero(~np.isnan(score.logprobs_T))) for score in scores)
    flops = count_flops(scorer, [len(ids) for ids in documents])
    dtype = backbone.head.weight_VH.dtype
    device_flops = matrix_product_rate(backbone.device, dtype)
    return ScoringRate(
        tokens_per_second=num_tokens / seconds,
        num_parameters=backbone.size.num_parameters,
        flops_per_token=flops / max(num_tokens, 1),
        device_flops=device_flops,
        rate_dtype=str(dtype).removeprefix("torch."),
        share_of_device_rate=flops / seconds / device_flops,
        peak_memory_bytes=peak_memory_bytes(backbone.device),
    )


def count_flops(scorer: CausalScorer, lengths: Sequence[int]) -> int:
    """Floating-point operations of scoring documents of these lengths, padding apart."""
    size, head = scorer.backbone.size, scorer.backbone.head
    shift = int(scorer.options.start_id is not None)
    head_parameters = head.full_vocab_size * head.weight_VH.shape[1]
    flops = 0
    for window in (window for batch in scorer.options.plan(lengths) for window in batch):
        positions = window.num_tokens - 1 + shift
        scored = window.stop - max(window.first_scored, window.start + 1 - shift)
        flops += 2 * (size.num_matmul_parameters - head_parameters) * positions
        flops += 4 * size.attention_width * positions * (positions + 1) // 2
        flops += 2 * head_parameters * scored
    return flops


def matrix_product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second that large square matrix products sustain, best of a few sizes."""
    best = 0.0
    for size in _MATRIX_SIZES[device.type]:
        left = torch.rand(size, size, device=device).to(dtype)
        out = torch.mm(left, left)
        _finish(device)
        num_products, seconds = 0, 0.0
        begin = time.perf_counter()
        while seconds < _RATE_SECONDS:
            torch.mm(left, left, out=out)
            _finish(device)
            num_products, seconds = num_products + 1, time.perf_counter() - begin
        best = max(best, 2 * size**3 * num_products / seconds)
    return best


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has had so far, on the device where it scores."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return peak_resident_bytes()


def _finish(device: torch.device) -> None:
    """Wait for the device, so that a clock tells what it did."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
