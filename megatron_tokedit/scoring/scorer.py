"""The scorer that every backend shares: windows, batches, one forward a batch, the chunked head, reassembly.

Invariant: batches are formed among the documents of one call only, so a document's scores do not depend on
who scores it; a forward takes at most ``batch_tokens`` positions (or one window) and the head at most
``logits_bytes``.

Legend: ``B`` rows of a batch, ``L`` positions of a batch, ``N`` scored tokens of a batch, ``H`` hidden size,
``G`` tokens of all documents of a call, ``E`` rows with candidates, ``K`` candidates a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from megatron_tokedit.errors import ConfigError, PriorError
from megatron_tokedit.scoring.base import CandidateRequest, TokenScores
from megatron_tokedit.scoring.head import OutputHead, num_candidates, score_rows
from megatron_tokedit.scoring.windows import Window, plan_batches, plan_windows

Documents = Sequence[npt.NDArray[np.int32]]


class Backbone(Protocol):
    """A causal language model without its head."""

    head: OutputHead
    device: torch.device
    max_context_tokens: int
    """Longest input in positions."""
    fingerprint: str
    """SHA-256 (hex) of weights, architecture and dtype."""

    def hidden_states(self, ids_BL: torch.Tensor) -> torch.Tensor:
        """Final hidden states ``[B, L, H]`` of int64 ids; position t must not depend on later positions."""


@dataclass(frozen=True, slots=True)
class ScoringOptions:
    """How a backbone is used.

    Attributes:
        context_tokens: tokens a window.
        overlap_tokens: tokens of a window that are context only, in all windows but a document's first.
        start_id: id put before each window; None: none.
        batch_tokens: positions a forward, padding included.
        logits_bytes: memory of the chunked head.
    """

    context_tokens: int
    overlap_tokens: int
    start_id: int | None
    batch_tokens: int
    logits_bytes: int


@dataclass(frozen=True, slots=True)
class _Batch:
    """Model input of one batch and where its scores belong."""

    ids_BL: npt.NDArray[np.int64]
    rows_N: npt.NDArray[np.int64]
    """Flat index into B x L of the hidden state that predicts each scored token."""
    places_N: npt.NDArray[np.int64]
    """Flat index of each scored token among all tokens of the call."""


class CausalScorer:
    """A :class:`megatron_tokedit.scoring.base.Scorer` over any backbone.

    Args:
        backbone: the model.
        options: windows and batches.

    Raises:
        ConfigError: the context is longer than the model takes, or the overlap not shorter than the context.
    """

    def __init__(self, backbone: Backbone, options: ScoringOptions) -> None:
        if options.context_tokens > backbone.max_context_tokens:
            raise ConfigError(
                f"prior_context={options.context_tokens}: the prior takes at most "
                f"{backbone.max_context_tokens} tokens; give that or less"
            )
        if not 1 <= options.overlap_tokens < options.context_tokens:
            raise ConfigError(
                f"prior_overlap={options.overlap_tokens}: expected at least 1 and less than "
                f"prior_context={options.context_tokens}"
            )
        self.backbone = backbone
        self.options = options
        self.vocab_size = backbone.head.vocab_size
        self.max_context_tokens = backbone.max_context_tokens

    @property
    def fingerprint(self) -> str:
        """See :class:`megatron_tokedit.scoring.base.Scorer`."""
        options = self.options
        windows = f"{options.context_tokens} {options.overlap_tokens} {options.start_id}"
        text = f"{self.backbone.fingerprint} {windows}"
        return hashlib.sha256(text.encode()).hexdigest()

    @torch.inference_mode()
    def score(self, documents: Documents, candidates: CandidateRequest | None = None) -> list[TokenScores]:
        """See :class:`megatron_tokedit.scoring.base.Scorer`."""
        options = self.options
        offsets = np.cumsum([0, *(len(ids) for ids in documents)])
        ids_G = np.concatenate([*documents, np.empty(0, np.int32)])
        self._check_ids(ids_G)
        logprobs_G = np.full(len(ids_G), np.nan, np.float32)
        width = num_candidates(candidates, self.vocab_size)
        found = [(np.empty(0, np.int64), np.empty((0, width), np.int32), np.empty((0, width), np.float32))]
        windows = [
            window
            for index, ids in enumerate(documents)
            for window in plan_windows(
                index, len(ids), context=options.context_tokens, overlap=options.overlap_tokens
            )
        ]
        for windows_of_batch in plan_batches(windows, options.batch_tokens):
            batch = _make_batch(windows_of_batch, ids_G, offsets, options.start_id)
            if len(batch.places_N):
                found.append(self._score_batch(batch, ids_G, logprobs_G, candidates))
        return _split(logprobs_G, found, offsets)

    def _check_ids(self, ids_G: npt.NDArray[np.int32]) -> None:
        """Refuse ids that the model does not have."""
        if len(ids_G) and (ids_G.min() < 0 or ids_G.max() >= self.vocab_size):
            raise PriorError(
                f"token id {max(ids_G.max(), -ids_G.min())} is outside the prior's vocabulary of "
                f"{self.vocab_size}: the tokenizer does not belong to this prior"
            )

    def _score_batch(
        self,
        batch: _Batch,
        ids_G: npt.NDArray[np.int32],
        logprobs_G: npt.NDArray[np.float32],
        request: CandidateRequest | None,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Score one batch: fill ``logprobs_G`` and return places, ids and log-probabilities of candidates."""
        device = self.backbone.device
        hidden_BLH = self.backbone.hidden_states(torch.from_numpy(batch.ids_BL).to(device))
        hidden_NH = hidden_BLH.flatten(0, 1)[torch.from_numpy(batch.rows_N).to(device)]
        targets_N = torch.from_numpy(ids_G[batch.places_N].astype(np.int64)).to(device)
        scores = score_rows(
            self.backbone.head, hidden_NH, targets_N, request, logits_bytes=self.options.logits_bytes
        )
        logprobs_N = scores.logprobs_N.cpu().numpy()
        if not np.isfinite(logprobs_N).all():
            raise PriorError(
                "the prior returned a log-probability that is not a finite number; "
                "its weights are damaged or its precision does not suffice (try --prior-dtype float32)"
            )
        logprobs_G[batch.places_N] = logprobs_N
        return (
            batch.places_N[scores.rows_E.cpu().numpy()],
            scores.candidate_ids_EK.cpu().numpy(),
            scores.candidate_logprobs_EK.cpu().numpy(),
        )


def _make_batch(
    windows: Sequence[Window],
    ids_G: npt.NDArray[np.int32],
    offsets: npt.NDArray[np.int64],
    start_id: int | None,
) -> _Batch:
    """Right-pad the windows' inputs; padding comes after everything that is scored, so no mask is needed."""
    shift = int(start_id is not None)
    length = max(1, max(window.num_tokens for window in windows) - 1 + shift)
    ids_BL = np.zeros((len(windows), length), np.int64)
    rows, places = [], []
    for row, window in enumerate(windows):
        if start_id is not None:
            ids_BL[row, 0] = start_id
        begin = offsets[window.document]
        ids_BL[row, shift : shift + window.num_tokens - 1] = ids_G[
            begin + window.start : begin + window.stop - 1
        ]
        # the token at window position i is predicted by input position i - 1 + shift
        first = max(window.first_scored, window.start + 1 - shift)
        rows.append(np.arange(first, window.stop) - window.start - 1 + shift + row * length)
        places.append(np.arange(first, window.stop) + begin)
    return _Batch(ids_BL, np.concatenate(rows), np.concatenate(places))


def _split(
    logprobs_G: npt.NDArray[np.float32],
    found: Sequence[tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.float32]]],
    offsets: npt.NDArray[np.int64],
) -> list[TokenScores]:
    """Scores of each document, from the scores of the whole call."""
    places_E, ids_EK, candidate_logprobs_EK = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order_E = np.argsort(places_E, kind="stable")
    places_E, ids_EK = places_E[order_E], ids_EK[order_E]
    candidate_logprobs_EK = candidate_logprobs_EK[order_E]
    bounds = np.searchsorted(places_E, offsets)
    return [
        TokenScores(
            logprobs_T=logprobs_G[offsets[i] : offsets[i + 1]],
            candidate_positions_E=places_E[bounds[i] : bounds[i + 1]] - offsets[i],
            candidate_ids_EK=ids_EK[bounds[i] : bounds[i + 1]],
            candidate_logprobs_EK=candidate_logprobs_EK[bounds[i] : bounds[i + 1]],
        )
        for i in range(len(offsets) - 1)
    ]
