"""The most probable ids of rows that an edit rule covers, from the head applied again to these rows alone.

Of the first pass over the vocabulary the maximum of each column block is known, and the K most probable ids
of a row can only lie in the K blocks with the largest maxima. So on a CPU only those are computed again;
where they would be most of the vocabulary, and on a GPU, whole rows are, within ``logits_bytes``.

Invariant: candidates are ordered by falling log-probability, ties by rising id, also the tie at the last
place; an excluded id or an impossible one (probability 0) is never among them. With ``asynchronous`` nothing
here waits for the device.

Legend: ``E`` rows, ``H`` hidden size, ``V`` vocabulary, ``C`` column blocks, ``J`` of them computed again,
``v`` columns of a block, ``W`` = ``V`` or ``J v``, ``K`` candidates a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from megatron_tokedit.scoring.base import CandidateRequest
from megatron_tokedit.scoring.head import TiledHead
from megatron_tokedit.scoring.memory import ChunkLimit

FIRST_WIDTH = 64
WIDENING = 8
"""A nucleus without a bound is looked for among 64 ids, then 512, and so on, until it is covered."""


@dataclass(frozen=True, slots=True)
class FoundRows:
    """Candidates of ``E`` rows, on the head's device.

    Attributes:
        ids_EK: int32 ``[E, K]``; -1 where a row has fewer.
        logprobs_EK: float32 ``[E, K]``; -inf there.
        covered_E: bool ``[E]``: whether the row's nucleus is complete; None: there is nothing to complete.
    """

    ids_EK: torch.Tensor
    logprobs_EK: torch.Tensor
    covered_E: torch.Tensor | None


class CandidateSearch:
    """Finds candidates of rows for one request.

    Args:
        head: the head.
        request: what is wanted.
        asynchronous: never wait for the device.
    """

    def __init__(self, head: TiledHead, request: CandidateRequest, *, asynchronous: bool) -> None:
        self._head = head
        self._request = request
        self._asynchronous = asynchronous
        excluded = sorted({i for i in request.excluded_ids if 0 <= i < head.head.vocab_size})
        self._excluded = torch.tensor(excluded, dtype=torch.int64).to(head.head.weight_VH.device)
        self.num_allowed = head.head.vocab_size - len(excluded)
        self._always = sorted({i // head.width for i in excluded})
        wanted = self.num_allowed if request.num_candidates is None else request.num_candidates
        self.limit = max(0, min(wanted, self.num_allowed))
        """Most candidates that a row can have."""
        self.first_width = FIRST_WIDTH if self._is_open else self.limit
        num_blocks = min(self.limit, len(head.columns) - len(self._always)) + len(self._always)
        self._num_blocks = num_blocks if not self._is_open and 2 * num_blocks <= len(head.columns) else None
        block_row_bytes = num_blocks * head.width * 4 * 4
        self._block_rows = ChunkLimit(head.logits_bytes // max(1, block_row_bytes))

    @property
    def _is_open(self) -> bool:
        """Whether a row's candidates are a nucleus of all ids, however many that takes."""
        return self._request.nucleus is not None and self._request.num_candidates is None

    def find(
        self, hidden_EH: torch.Tensor, normalisers_E: torch.Tensor, maxima_CE: torch.Tensor, width: int
    ) -> FoundRows:
        """Candidates of some rows.

        Args:
            hidden_EH: ``[E, H]``.
            normalisers_E: float32 ``[E]``, from the first pass.
            maxima_CE: float32 ``[C, E]``, likewise.
            width: ids to look at in each row.

        Raises:
            PriorError: out of memory even with one row at a time.
        """
        width = min(width, self.limit)
        hidden_EH = hidden_EH.to(self._head.head.weight_VH.dtype)

        def find_rows(start: int, stop: int) -> FoundRows:
            rows = slice(start, stop)
            return self._nucleus(
                *self._top_rows(hidden_EH[rows], normalisers_E[rows], maxima_CE[:, rows], width)
            )

        parts = self._rows.run(len(hidden_EH), find_rows)
        covered = [part.covered_E for part in parts if part.covered_E is not None]
        return FoundRows(
            torch.cat([part.ids_EK for part in parts]),
            torch.cat([part.logprobs_EK for part in parts]),
            torch.cat(covered) if covered else None,
        )

    @property
    def _rows(self) -> ChunkLimit:
        """How many rows :meth:`_top_rows` takes at a time."""
        return self._head.whole_rows if self._num_blocks is None else self._block_rows

    def _top_rows(
        self, hidden_eH: torch.Tensor, normalisers_e: torch.Tensor, maxima_Ce: torch.Tensor, width: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The ``width`` most probable ids of some rows.

        Returns:
            Ids and log-probabilities ``[e, width]``; and, for a nucleus of all ids, the log of the sum over
            all allowed ids of p ** (1 / temperature), ``[e]``.
        """
        if self._num_blocks is not None:
            return *self._in_blocks(hidden_eH, normalisers_e, maxima_Ce, width), None
        logits_eV = self._head.head.logits(hidden_eH)
        logits_eV[:, self._excluded] = -torch.inf
        ids_eK, logprobs_eK = top_candidates(logits_eV, normalisers_e, width, asynchronous=self._asynchronous)
        if not self._is_open or self._request.nucleus is None:
            return ids_eK, logprobs_eK, None
        tempered_eV = logits_eV.sub_(normalisers_e[:, None]).div_(self._request.nucleus.temperature)
        return ids_eK, logprobs_eK, torch.logsumexp(tempered_eV, dim=1)

    def _nucleus(
        self, ids_EK: torch.Tensor, logprobs_EK: torch.Tensor, normaliser_E: torch.Tensor | None
    ) -> FoundRows:
        """Keep the request's nucleus of each row.

        Args:
            ids_EK: by falling log-probability.
            logprobs_EK: theirs.
            normaliser_E: float32 ``[E]``: log of the sum over all allowed ids of p ** (1 / temperature);
                None: what is kept are these ids alone.
        """
        nucleus = self._request.nucleus
        if nucleus is None:
            return FoundRows(ids_EK, logprobs_EK, None)
        tempered_EK = logprobs_EK.double() / nucleus.temperature
        if normaliser_E is None:
            normaliser_E = torch.logsumexp(tempered_EK, dim=1)
        cumulative_EK = torch.cumsum((tempered_EK - normaliser_E.double()[:, None]).exp_(), dim=1)
        is_outside_EK = torch.zeros_like(ids_EK, dtype=torch.bool)
        is_outside_EK[:, 1:] = cumulative_EK[:, :-1] >= nucleus.top_p
        covered_E = (cumulative_EK[:, -1] >= nucleus.top_p) | (ids_EK[:, -1] < 0) if self._is_open else None
        return FoundRows(
            ids_EK.masked_fill(is_outside_EK, -1),
            logprobs_EK.masked_fill(is_outside_EK, -torch.inf),
            covered_E,
        )

    def _in_blocks(
        self, hidden_EH: torch.Tensor, normalisers_E: torch.Tensor, maxima_CE: torch.Tensor, width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The ``width`` most probable ids, from the column blocks that can hold them (CPU).

        Blocks with excluded ids are taken always: their maxima may be those of excluded ids.
        """
        head, num_rows = self._head, len(hidden_EH)
        maxima_EC = maxima_CE.t().contiguous()
        maxima_EC[:, self._always] = torch.inf
        blocks_EC = torch.sort(maxima_EC, dim=1, descending=True, stable=True).indices
        blocks_EJ = torch.sort(blocks_EC[:, : self._num_blocks], dim=1).values
        num_blocks = blocks_EJ.shape[1]
        logits_EJv = torch.full((num_rows, num_blocks, head.width), -torch.inf)
        order = np.argsort(blocks_EJ.flatten().numpy(), kind="stable")
        bounds = np.searchsorted(blocks_EJ.flatten().numpy()[order], np.arange(len(head.columns) + 1))
        slots = logits_EJv.view(num_rows * num_blocks, head.width)
        for block, columns in enumerate(head.columns):
            places = torch.from_numpy(order[bounds[block] : bounds[block + 1]])
            if len(places):
                columns_in_use = columns.stop - columns.start
                tile_nv = torch.empty(len(places), columns_in_use)
                head.tile(hidden_EH[places // num_blocks], block, tile_nv)
                slots[places, :columns_in_use] = tile_nv
        self._exclude(logits_EJv, blocks_EJ)
        places_EK, logprobs_EK = top_candidates(logits_EJv.view(num_rows, -1), normalisers_E, width)
        found_EK = places_EK.long().clamp_(min=0)
        ids_EK = blocks_EJ.gather(1, found_EK // head.width) * head.width + found_EK % head.width
        return torch.where(places_EK < 0, -1, ids_EK).int(), logprobs_EK

    def _exclude(self, logits_EJv: torch.Tensor, blocks_EJ: torch.Tensor) -> None:
        """Give the excluded ids probability 0, in place."""
        for block in self._always:
            rows, slots = (blocks_EJ == block).nonzero(as_tuple=True)
            columns = self._excluded[self._excluded // self._head.width == block] % self._head.width
            logits_EJv[rows[:, None], slots[:, None], columns[None, :]] = -torch.inf


def top_candidates(
    logits_EW: torch.Tensor, normalisers_E: torch.Tensor, width: int, *, asynchronous: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``width`` most probable places of each row, and their log-probabilities.

    Ties are resolved by rising place, also the tie at the last one, about which ``torch.topk`` promises
    nothing: among the places that equal the last chosen value the lowest are taken. Rows without such a tie
    are spared that, unless finding them would wait for the device.

    Returns:
        int32 ``[E, K]`` (-1 for a logit of -inf) and float32 ``[E, K]``.
    """
    values_EK, places_EK = torch.topk(logits_EW, min(width + 1, logits_EW.shape[1]), dim=1)
    if values_EK.shape[1] > width:
        is_tied_E = values_EK[:, width] == values_EK[:, width - 1]
        values_EK, places_EK = values_EK[:, :width], places_EK[:, :width]
        if asynchronous:
            places_EK = _lowest_of_ties(logits_EW, values_EK, places_EK)
        elif len(tied := is_tied_E.nonzero()[:, 0]):
            lowest = _lowest_of_ties(logits_EW[tied], values_EK[tied], places_EK[tied])
            places_EK = places_EK.index_copy(0, tied, lowest)
    logprobs_EK = values_EK - normalisers_E[:, None]
    places_EK, order_EK = torch.sort(places_EK, dim=1)
    logprobs_EK, order_EK = torch.sort(logprobs_EK.gather(1, order_EK), dim=1, descending=True, stable=True)
    places_EK = places_EK.gather(1, order_EK).masked_fill(logprobs_EK == -torch.inf, -1)
    return places_EK.int(), logprobs_EK


def _lowest_of_ties(
    logits_EW: torch.Tensor, values_EK: torch.Tensor, places_EK: torch.Tensor
) -> torch.Tensor:
    """Replace the places that equal the last value by the lowest places that do, int64 ``[E, K]``."""
    num_places, width = logits_EW.shape[1], values_EK.shape[1]
    last_E1 = values_EK[:, -1:]
    falling_W = torch.arange(num_places, 0, -1, dtype=torch.int32, device=logits_EW.device)
    tied_EW = (logits_EW == last_E1).to(torch.int32).mul_(falling_W)
    lowest_EK = num_places - torch.topk(tied_EW, width, dim=1).values.long()
    is_above_EK = values_EK > last_E1
    rank_EK = torch.arange(width, device=logits_EW.device) - is_above_EK.sum(dim=1, keepdim=True)
    return torch.where(is_above_EK, places_EK, lowest_EK.gather(1, rank_EK.clamp_(min=0)))
