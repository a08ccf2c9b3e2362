"""How a new token is drawn from the prior's candidates: a temperature softmax and the inverse of its CDF.

The candidates are the prior's k most probable tokens (special tokens left out) and the original token, which
is always one of them, as in the authors' script (their engine returns the prompt's own token beside the top
k). The authors' rejection loop draws from exactly this distribution; here it is drawn in closed form.

Invariant: weights and their sums are float64 over float32 log-probabilities, in the candidates' order, so the
draw depends on nothing but the row and its uniform.

Legend: ``E`` rows, ``K`` candidates a row, ``C`` = ``K`` + 1 with the original token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int32 = npt.NDArray[np.int32]


class Sampler(Protocol):
    """Turns candidates into sampling weights."""

    @property
    def num_candidates(self) -> int:
        """K: most probable tokens wanted from the scorer for each row."""

    def weights(self, logprobs_EC: Float32) -> Float64:
        """Unnormalised sampling weights, float64 ``[E, C]``; -inf log-probabilities must get weight 0."""


@dataclass(frozen=True, slots=True)
class TopK:
    """softmax(log p / temperature) over the candidates.

    Attributes:
        k: number of most probable tokens.
        temperature: above 0; 1 keeps the prior's proportions, more flattens them.
    """

    k: int = 8
    temperature: float = 1.5

    @property
    def num_candidates(self) -> int:
        """K."""
        return self.k

    def weights(self, logprobs_EC: Float32) -> Float64:
        """See :class:`Sampler`."""
        scaled_EC = logprobs_EC.astype(np.float64) / self.temperature
        peak_E1 = scaled_EC.max(axis=1, keepdims=True)
        return np.exp(scaled_EC - np.where(np.isfinite(peak_E1), peak_E1, 0.0))


def draw(
    sampler: Sampler,
    candidate_ids_EK: Int32,
    candidate_logprobs_EK: Float32,
    original_ids_E: Int32,
    original_logprobs_E: Float32,
    uniforms_E: Float64,
    *,
    exclude_original: bool = False,
) -> Int32:
    """Draw one id a row.

    Args:
        sampler: gives the weights.
        candidate_ids_EK: int32 ``[E, K]``, distinct within a row.
        candidate_logprobs_EK: float32 ``[E, K]``.
        original_ids_E: int32 ``[E]``.
        original_logprobs_E: float32 ``[E]``.
        uniforms_E: float64 ``[E]`` in [0, 1).
        exclude_original: never draw the original token, unless it is the only candidate.

    Returns:
        int32 ``[E]``.
    """
    is_original_EK = candidate_ids_EK == original_ids_E[:, None]
    if exclude_original:
        extra_E = np.full(len(original_ids_E), -np.inf, np.float32)
        candidate_logprobs_EK = np.where(is_original_EK, np.float32(-np.inf), candidate_logprobs_EK)
    else:  # the original joins as one more candidate where it is not among the top k
        extra_E = np.where(is_original_EK.any(axis=1), np.float32(-np.inf), original_logprobs_E)
    ids_EC = np.concatenate([candidate_ids_EK, original_ids_E[:, None]], axis=1)
    logprobs_EC = np.concatenate([candidate_logprobs_EK, extra_E[:, None].astype(np.float32)], axis=1)
    cumulative_EC = np.cumsum(sampler.weights(logprobs_EC), axis=1)
    total_E = cumulative_EC[:, -1]
    # the first candidate whose cumulative weight exceeds u * total; candidates of weight 0 are never that
    chosen_E = (cumulative_EC <= (uniforms_E * total_E)[:, None]).sum(axis=1)
    chosen_E[total_E <= 0.0] = ids_EC.shape[1] - 1
    last_positive_E = np.argmax(cumulative_EC >= total_E[:, None], axis=1)  # u * total may round up to total
    chosen_E = np.where(total_E > 0.0, np.minimum(chosen_E, last_positive_E), chosen_E)
    rows_E: npt.NDArray[np.int32] = ids_EC[np.arange(len(ids_EC)), chosen_E]
    return rows_E
