"""The scorer that every backend shares: windows, batches, one forward a batch, the tiled head, candidates.

Each batch goes through three steps: *launch* (forward and log-probabilities), *select* (which rows need
candidates, and the head again for them) and *collect* (candidates into main memory). On a CPU they follow
one another, and rows wait until they are enough for efficient products. On a GPU they are deferred: batch
i + 1 is launched before batch i is selected and batch i - 1 collected, so what the host waits for was queued
before work that still keeps the device busy.

Invariant: batches are formed among the documents of one call only, so a document's scores do not depend on
who scores it; a forward takes at most ``batch_tokens`` positions (or one window) and the head at most
``logits_bytes``, less where memory runs out.

Legend: ``B`` rows of a batch, ``L`` positions of a batch, ``N`` scored tokens of a batch, ``H`` hidden size,
``G`` tokens of all documents of a call, ``E`` rows with candidates, ``K`` candidates a row.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from megatron_tokedit.errors import ConfigError, PriorError
from megatron_tokedit.log import get_logger
from megatron_tokedit.scoring.base import CandidateRequest, TokenScores
from megatron_tokedit.scoring.batches import Batch, RaggedCandidates, join_documents, make_batch, split_scores
from megatron_tokedit.scoring.candidates import WIDENING, CandidateSearch, FoundRows
from megatron_tokedit.scoring.head import OutputHead
from megatron_tokedit.scoring.memory import Partners, attempt, halves_of
from megatron_tokedit.scoring.sharded import make_head, make_search
from megatron_tokedit.scoring.transfer import Download, upload
from megatron_tokedit.scoring.under_way import Launched, Selected, Wanted
from megatron_tokedit.scoring.windows import Window, plan_batches, plan_windows

logger = get_logger(__name__)

Documents = Sequence[npt.NDArray[np.int32]]
_SEARCH_ROWS = 512
"""Rows whose candidates are looked for together on a CPU: every column block's weights are read once."""


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What a forward pass costs.

    Attributes:
        num_parameters: all of them, shared ones once.
        num_matmul_parameters: of matrix products, output layer included, embedding tables not: each costs a
            multiplication and an addition a token.
        attention_width: query heads x size of a head, summed over layers: four operations for each position
            that a token attends to.
    """

    num_parameters: int
    num_matmul_parameters: int
    attention_width: int


class Backbone(Protocol):
    """A causal language model without its head."""

    head: OutputHead
    device: torch.device
    max_context_tokens: int
    """Longest input in positions."""
    fingerprint: str
    """SHA-256 (hex) of weights, architecture and dtype."""
    size: ModelSize

    def hidden_states(self, ids_BL: torch.Tensor) -> torch.Tensor:
        """Final hidden states ``[B, L, H]`` of int64 ids; position t must not depend on later positions."""


@dataclass(frozen=True, slots=True)
class ScoringOptions:
    """How a backbone is used.

    Attributes:
        context_tokens: tokens a window; without a start id one more than the model takes, as the last one is
            no input.
        overlap_tokens: tokens of a window that are context only, in all windows but a document's first.
        start_id: id put before each window; None: none.
        batch_tokens: positions a forward, padding included.
        logits_bytes: memory of the tiled head.
    """

    context_tokens: int
    overlap_tokens: int
    start_id: int | None
    batch_tokens: int
    logits_bytes: int

    def plan(
        self, lengths: Sequence[int], scored_from: Sequence[int] | None = None
    ) -> Iterator[list[Window]]:
        """The batches, as lists of windows, in which documents of these lengths are scored."""
        windows = [
            window
            for index, length in enumerate(lengths)
            for window in plan_windows(
                index,
                length,
                context=self.context_tokens,
                overlap=self.overlap_tokens,
                scored_from=scored_from[index] if scored_from is not None else 0,
            )
        ]
        return plan_batches(windows, self.batch_tokens)


class CausalScorer:
    """A :class:`megatron_tokedit.scoring.base.Scorer` over any backbone.

    Args:
        backbone: the model.
        options: windows and batches.
        deferred: select and collect while later batches run (see the module); default: on a GPU.
        partners: the processes that take part in a forward pass; None: this one alone.

    Raises:
        ConfigError: the context is longer than the model takes, or the overlap not shorter than the context.
    """

    def __init__(
        self,
        backbone: Backbone,
        options: ScoringOptions,
        *,
        deferred: bool | None = None,
        partners: Partners | None = None,
    ) -> None:
        longest = backbone.max_context_tokens + int(options.start_id is None)
        if options.context_tokens > longest:
            raise ConfigError(
                f"prior_context={options.context_tokens}: the prior takes at most {longest} tokens; give "
                "that or less"
            )
        if not 1 <= options.overlap_tokens < options.context_tokens:
            raise ConfigError(
                f"prior_overlap={options.overlap_tokens}: expected at least 1 and less than "
                f"prior_context={options.context_tokens}"
            )
        self.backbone = backbone
        self.options = options
        self.vocab_size = backbone.head.full_vocab_size
        self.max_context_tokens = backbone.max_context_tokens
        self._head = make_head(backbone.head, logits_bytes=options.logits_bytes)
        self._deferred = backbone.device.type == "cuda" if deferred is None else deferred
        self._partners = partners
        self._has_warned = False

    @property
    def fingerprint(self) -> str:
        """See :class:`megatron_tokedit.scoring.base.Scorer`."""
        options = self.options
        windows = f"{options.context_tokens} {options.overlap_tokens} {options.start_id}"
        text = f"{self.backbone.fingerprint} {windows}"
        return hashlib.sha256(text.encode()).hexdigest()

    @torch.inference_mode()
    def score(
        self,
        documents: Documents,
        candidates: CandidateRequest | None = None,
        *,
        scored_from: Sequence[int] | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> list[TokenScores]:
        """See :class:`megatron_tokedit.scoring.base.Scorer`."""
        ids_G, offsets = join_documents(documents)
        self.check_ids(ids_G)
        search = None
        if candidates is not None:
            search = make_search(self._head, candidates, asynchronous=self._deferred)
        call = _Call(self, candidates, search, ids_G, offsets, on_batch)
        batches: Iterable[Sequence[Window]]
        batches = self.options.plan([len(ids) for ids in documents], scored_from)
        while batches:
            for windows in batches:
                call.add(windows)
            call.drain()
            batches = halves_of(call.take_unscored())
        width = None if candidates and candidates.nucleus else (search.limit if search else 0)
        return split_scores(call.logprobs_G, call.found, offsets, width)

    def check_ids(self, ids_G: npt.NDArray[np.int32]) -> None:
        """Raise :class:`PriorError` for ids that the model does not have."""
        if len(ids_G) and (ids_G.min() < 0 or ids_G.max() >= self.vocab_size):
            raise PriorError(
                f"token id {max(ids_G.max(), -ids_G.min())} is outside the prior's vocabulary of "
                f"{self.vocab_size}: the tokenizer does not belong to this prior"
            )

    def _launch(self, batch: Batch) -> Launched | None:
        """Forward and log-probabilities of one batch; None where memory ran out."""
        if self._partners is None:
            return attempt(lambda: self._score(batch, self._forward(batch)))
        hidden_NH = self._partners.attempt(batch, lambda: self._forward(batch))
        return None if hidden_NH is None else self._score(batch, hidden_NH)

    def _forward(self, batch: Batch) -> torch.Tensor:
        """Hidden states of the scored rows."""
        device = self.backbone.device
        hidden_BLH = self.backbone.hidden_states(upload(batch.ids_BL, device))
        return hidden_BLH.flatten(0, 1)[upload(batch.rows_N, device)]

    def _score(self, batch: Batch, hidden_NH: torch.Tensor) -> Launched:
        scores = self._head.score(hidden_NH, upload(batch.targets_N, self.backbone.device))
        return Launched(batch, hidden_NH, scores, Download(scores.logprobs_N))

    def _warn_of_memory(self, num_windows: int) -> None:
        """Say once that memory ran out in a forward pass."""
        if num_windows > 1 and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "out of memory in the prior's forward pass of %d windows: going on with half as many, and "
                "fewer where needed; a lower --prior-batch-tokens avoids this",
                num_windows,
            )


class _Call:
    """The state of one :meth:`CausalScorer.score`: batches under way, and what came of the others."""

    def __init__(
        self,
        scorer: CausalScorer,
        request: CandidateRequest | None,
        search: CandidateSearch | None,
        ids_G: npt.NDArray[np.int32],
        offsets: npt.NDArray[np.int64],
        on_batch: Callable[[int], None] | None,
    ) -> None:
        self._scorer = scorer
        self._request = request
        self._search = search if search is not None and search.limit > 0 else None
        self._ids_G, self._offsets = ids_G, offsets
        self._on_batch = on_batch
        self._launched: deque[Launched] = deque()
        self._waiting: list[Wanted] = []
        self._selected: deque[Selected] = deque()
        self._unscored: list[Sequence[Window]] = []
        self.logprobs_G = np.full(len(ids_G), np.nan, np.float32)
        self.found: list[RaggedCandidates] = []

    def add(self, windows: Sequence[Window]) -> None:
        """Score a batch; it waits for :meth:`take_unscored` where memory runs out.

        Raises:
            PriorError: the model's numbers are unusable.
        """
        scorer = self._scorer
        batch = make_batch(windows, self._ids_G, self._offsets, scorer.options.start_id)
        if not len(batch.places_N):
            return
        launched = scorer._launch(batch)
        if launched is None:
            self._unscored.append(windows)
            scorer._warn_of_memory(len(windows))
            self.drain()  # earlier batches hold memory too
            return
        self._launched.append(launched)
        self._advance(keep=1 if scorer._deferred else 0)

    def take_unscored(self) -> list[Sequence[Window]]:
        """Batches for which memory did not suffice, in order, once."""
        unscored, self._unscored = self._unscored, []
        return unscored

    def drain(self) -> None:
        """Finish all batches under way."""
        self._advance(keep=0)
        self._search_waiting()
        self._advance(keep=0)

    def _advance(self, keep: int) -> None:
        """Select and collect all batches but the last ``keep`` at each step."""
        while len(self._launched) > keep:
            self._select(self._launched.popleft())
        while len(self._selected) > keep:
            self._collect(self._selected.popleft())

    def _select(self, launched: Launched) -> None:
        """Take in log-probabilities, and start on the candidates of the rows that need them."""
        (logprobs_N,) = launched.logprobs.wait()
        if not np.isfinite(logprobs_N).all():
            raise PriorError(
                "the prior returned a log-probability that is not a finite number; "
                "its weights are damaged or its precision does not suffice (try --prior-dtype float32)"
            )
        self.logprobs_G[launched.batch.places_N] = logprobs_N
        if self._on_batch is not None:
            self._on_batch(len(logprobs_N))
        if self._search is None or self._request is None:
            return
        is_wanted_N = np.zeros(len(logprobs_N), bool)
        for low, high in self._request.intervals:
            is_wanted_N |= (logprobs_N >= low) & (logprobs_N <= high)
        rows_E = np.flatnonzero(is_wanted_N)
        if len(rows_E):
            self._waiting.append(Wanted.of_batch(launched, rows_E))
            num_rows = sum(len(wanted.places_E) for wanted in self._waiting)
            if self._scorer._deferred or num_rows >= _SEARCH_ROWS:
                self._search_waiting()

    def _search_waiting(self) -> None:
        """Start on the candidates of the rows that have been waiting."""
        if self._waiting:
            assert self._search is not None
            wanted = Wanted.joined(self._waiting)
            self._waiting.clear()
            self._selected.append(Selected(wanted, self._find(wanted, self._search.first_width)))

    def _find(self, wanted: Wanted, width: int) -> Download:
        """Candidates of some rows."""
        assert self._search is not None
        found: FoundRows = self._search.find(wanted.hidden_EH, wanted.normalisers_E, wanted.maxima_CE, width)
        tensors = (found.ids_EK, found.logprobs_EK)
        return Download(*tensors) if found.covered_E is None else Download(*tensors, found.covered_E)

    def _collect(self, selected: Selected) -> None:
        """Take in candidates; look further where a nucleus without a bound is not covered yet."""
        assert self._search is not None
        assert self._request is not None
        wanted, found = selected.wanted, selected.found
        width = self._search.first_width
        while len(wanted.places_E):
            ids_EK, logprobs_EK, *covered = found.wait()
            is_final = not covered or width >= self._search.limit
            is_done_E = np.ones(len(wanted.places_E), bool) if is_final else covered[0]
            self.found.append(
                RaggedCandidates.from_rows(
                    wanted.places_E[is_done_E],
                    ids_EK[is_done_E],
                    logprobs_EK[is_done_E],
                    is_ragged=self._request.nucleus is not None,
                )
            )
            wanted = wanted.where(~is_done_E)
            if len(wanted.places_E):
                width *= WIDENING
                found = self._find(wanted, width)
