"""The one scoring contract: token ids in, per-token log-probabilities and, where asked, candidates out.

Legend: ``T`` tokens of a document, ``E`` rows for which candidates are wanted, ``K`` candidates a row.
Invariant: every token that is asked for is scored exactly once, log-softmax is float32 over the real
vocabulary (padding of the vocabulary never takes part), and what a document gets does not depend on what else
is scored with it, beyond float rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Nucleus:
    """The fewest most probable ids that have probability ``top_p`` together, at a temperature."""

    top_p: float
    temperature: float


@dataclass(frozen=True, slots=True)
class CandidateRequest:
    """Which rows need candidates, and how many.

    A row needs candidates when its probability lies in one of ``intervals`` (closed on both ends, in
    log-probability). ``excluded_ids`` never appear among candidates (their probability stays in the
    normalisation).

    With a ``nucleus``, of the ids kept so far (the ``num_candidates`` most probable; None: all) the
    candidates are the shortest run of most probable ones whose softmax(log-probability / temperature) over
    what is kept adds up to ``top_p``: temperature, then top-k, then top-p, as transformers and vLLM do it.
    """

    num_candidates: int | None
    intervals: tuple[tuple[float, float], ...]
    excluded_ids: tuple[int, ...] = ()
    nucleus: Nucleus | None = None


@dataclass(slots=True)
class TokenScores:
    """Scores of one document.

    Attributes:
        logprobs_T: float32 ``[T]``; ``log P(x_t | x_<t)``; NaN at position 0 where no BOS was prepended.
        candidate_positions_E: int64 ``[E]``, ascending: every scored position whose log-probability lies in a
            requested interval (position 0 too, where BOS was prepended).
        candidate_ids_EK: int32 ``[E, K]``, by falling log-probability, ties by rising id.
        candidate_logprobs_EK: float32 ``[E, K]``, over the whole vocabulary (not renormalised).
        K is ``min(num_candidates, vocab - excluded)``; with a nucleus that of the document's widest row, and
        narrower rows are padded with id -1 and log-probability -inf.
    """

    logprobs_T: npt.NDArray[np.float32]
    candidate_positions_E: npt.NDArray[np.int64]
    candidate_ids_EK: npt.NDArray[np.int32]
    candidate_logprobs_EK: npt.NDArray[np.float32]


class Scorer(Protocol):
    """A prior language model behind the contract above."""

    vocab_size: int
    """Real vocabulary of the model (ids the tokenizer may use must be below it)."""
    max_context_tokens: int
    """Longest input (BOS included) that the model takes."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of what determines the scores: weights, architecture, dtype, context and overlap."""

    def score(
        self,
        documents: Sequence[npt.NDArray[np.int32]],
        candidates: CandidateRequest | None = None,
        *,
        scored_from: Sequence[int] | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> list[TokenScores]:
        """Score documents; one result each, in order. Empty documents give empty results.

        With ``scored_from``, a position a document, the tokens before it are context only: they have no
        score (NaN) and no candidates, and cost no pass over the vocabulary.

        ``on_batch`` is told the number of tokens that each batch scored.

        Batches are formed among ``documents`` only, in an order that depends on nothing else.

        Raises:
            PriorError: the model returned a NaN or an infinite log-probability, or an id is out of range.
        """
