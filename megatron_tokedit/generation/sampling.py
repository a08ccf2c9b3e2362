"""From logits to the next ids: temperature, top-k, top-p in transformers' order, then the inverse CDF.

Invariant: a row's draw depends on its logits and its number from the seed alone. Sums are float64 and run in
the order of ids, not of probabilities, so that rounding, which may swap nearly equal probabilities, moves the
borders between tokens by as much as it moved the probabilities, and no more.

Legend: ``B`` rows, ``V`` vocabulary, ``W`` most probable ids looked at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from megatron_tokedit.errors import CheckpointError
from megatron_tokedit.generation.settings import GenerationSettings

_FIRST_WIDTH = 1024
"""Ids among which a nucleus is looked for at first; sorting a vocabulary takes longer than summing it."""


def uniforms_of(prompt_ids: Sequence[int], sample: int, seed: int) -> np.random.Generator:
    """The numbers in [0, 1) of one text: keyed by seed, prompt and sample, so by no other text."""
    digest = hashlib.blake2b(digest_size=16, person=b"tokedit-generate")
    digest.update(seed.to_bytes(8, "little") + sample.to_bytes(8, "little"))
    digest.update(np.asarray(prompt_ids, "<i8").tobytes())
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest.digest(), "little")))


def choose(logits_BV: torch.Tensor, uniforms: Sequence[float], settings: GenerationSettings) -> list[int]:
    """The next id of every row.

    Args:
        logits_BV: float32 ``[B, V]``.
        uniforms: a number in [0, 1) a row; unused where the settings are greedy.
        settings: temperature, top-k and top-p.

    Raises:
        CheckpointError: the logits are no numbers.
    """
    if not logits_BV.max(dim=-1).values.isfinite().all():  # a NaN anywhere is the maximum of its row
        raise CheckpointError(
            "the model's logits are not finite numbers; its weights are damaged, or the precision does not "
            "suffice (try --dtype float32)"
        )
    if settings.is_greedy:
        return [int(i) for i in logits_BV.argmax(dim=-1).tolist()]
    scores_BV = restrict(logits_BV / settings.temperature, settings.top_k, settings.top_p)
    cumulative_BV = scores_BV.double().softmax(dim=-1).cumsum(dim=-1)
    targets_B1 = torch.tensor(uniforms, dtype=torch.float64, device=logits_BV.device)[:, None]
    targets_B1 = targets_B1 * cumulative_BV[:, -1:]
    chosen_B1 = torch.searchsorted(cumulative_BV, targets_B1, right=True)  # the first sum above the target
    return [int(i) for i in chosen_B1[:, 0].tolist()]


def restrict(scores_BV: torch.Tensor, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """Scores with -inf for what may not be drawn.

    Args:
        scores_BV: float32 ``[B, V]``, logits divided by the temperature.
        top_k: leaves the ``top_k`` highest, and those as high as the last of them.
        top_p: then leaves the fewest whose probability, in the softmax of what was left, reaches it.
    """
    if top_k is not None and top_k < scores_BV.size(-1):
        lowest_B1 = scores_BV.topk(top_k, dim=-1).values[:, -1:]
        scores_BV = scores_BV.masked_fill(scores_BV < lowest_B1, float("-inf"))
    if top_p is not None and top_p < 1.0:
        scores_BV = scores_BV.masked_fill(~_nucleus(scores_BV, top_p), float("-inf"))
    return scores_BV


def _nucleus(scores_BV: torch.Tensor, top_p: float) -> torch.Tensor:
    """Bool ``[B, V]``: the most probable ids up to the one with which their sum reaches ``top_p``."""
    probabilities_BV = scores_BV.double().softmax(dim=-1)
    vocab_size = scores_BV.size(-1)
    width = min(vocab_size, _FIRST_WIDTH)
    while True:
        top = probabilities_BV.topk(width, dim=-1)
        is_kept_BW = top.values.cumsum(dim=-1) - top.values < top_p  # what stands before it does not suffice
        if width == vocab_size or not is_kept_BW[:, -1].any():
            break
        width = min(vocab_size, 8 * width)
    return torch.zeros_like(scores_BV, dtype=torch.bool).scatter(1, top.indices, is_kept_BW)
