"""One prior held by several processes, and how they work as one.

The first of them leads: it has the documents, and the results. Before every call it announces to the others
what it is going to do, and all of them do the same: with the same documents they form the same batches, pass
hidden states on and join their parts of the vocabulary (``sharded``). The stages in front of the last one
only pass on.

Where memory runs out in one of them, that one goes through the rest of the pass with zeros
(``engine.unfinished_pass``); then all hear of it, and the batch is scored in halves when the others are done.

Invariant: what a document gets is what one process gives it, to float rounding; a failure anywhere is raised
everywhere (``replica_group``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from megatron_tokedit.engine.inference import LanguageModel
from megatron_tokedit.engine.unfinished_pass import PassMeetings
from megatron_tokedit.errors import PriorError
from megatron_tokedit.scoring.base import CandidateRequest, TokenScores
from megatron_tokedit.scoring.batches import Batch, join_documents, make_batch
from megatron_tokedit.scoring.identity import PriorIdentity
from megatron_tokedit.scoring.megatron import MegatronBackbone, load_part
from megatron_tokedit.scoring.megatron_layers import speed_up
from megatron_tokedit.scoring.memory import attempt, halves_of
from megatron_tokedit.scoring.replica_group import Leave, Replica, Vote
from megatron_tokedit.scoring.scorer import CausalScorer, Documents, ScoringOptions
from megatron_tokedit.scoring.transfer import upload
from megatron_tokedit.scoring.windows import Window


@dataclass(frozen=True, slots=True)
class Load:
    """Load this prior."""

    identity: PriorIdentity
    options: ScoringOptions
    dtype: str
    threads: int
    deferred: bool | None


@dataclass(frozen=True, slots=True)
class Call:
    """Score these documents."""

    documents: list[npt.NDArray[np.int32]]
    candidates: CandidateRequest | None
    scored_from: Sequence[int] | None


class _Part(Protocol):
    """What a process does in a call."""

    def score(
        self,
        documents: Documents,
        candidates: CandidateRequest | None = None,
        *,
        scored_from: Sequence[int] | None = None,
    ) -> list[TokenScores]:
        """Its part of scoring documents."""


class _Passes:
    """Forward passes of this process with the others; see :class:`~megatron_tokedit.scoring.memory.Partners`.

    Args:
        replica: this process's.
        model: its part, whose layers are what they will be.
    """

    def __init__(self, replica: Replica, model: LanguageModel) -> None:
        self._replica, self._meetings = replica, PassMeetings(model)

    def attempt(self, batch: Batch, work: Callable[[], torch.Tensor]) -> torch.Tensor | None:
        """Make a pass over a batch, and wait until all have; None where memory ran out in one of them."""
        result, vote = self.begin(batch, work)
        return result if vote.is_unanimous() else None

    def begin(self, batch: Batch, work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor | None, Vote]:
        """Make a pass over a batch; what it gave here, and how it went in all, which is to be waited for."""
        if not self._meetings.can_finish:  # who runs out of memory ends all, see Replica.together
            return work(), Vote()
        self._meetings.begin()
        result = attempt(work)
        if result is None:
            self._meetings.finish(torch.from_numpy(batch.ids_BL))
        return result, self._replica.vote(result is not None)


class _Stage:
    """A stage in front of the last one: passes hidden states on and sees no result."""

    def __init__(self, replica: Replica, model: LanguageModel, options: ScoringOptions) -> None:
        speed_up(model)
        self._passes = _Passes(replica, model)
        self._model, self._options = model, options

    @torch.inference_mode()
    def score(
        self,
        documents: Documents,
        candidates: CandidateRequest | None = None,
        *,
        scored_from: Sequence[int] | None = None,
    ) -> list[TokenScores]:
        """Forward every batch that the last stage is going to score; no results."""
        ids_G, offsets = join_documents(documents)
        batches: Iterable[Sequence[Window]]
        batches = self._options.plan([len(ids) for ids in documents], scored_from)
        while batches:
            votes = []
            for windows in batches:
                batch = make_batch(windows, ids_G, offsets, self._options.start_id)
                if len(batch.places_N):
                    _, vote = self._passes.begin(batch, partial(self._forward, batch))
                    votes.append((windows, vote))
            batches = halves_of(windows for windows, vote in votes if not vote.is_unanimous())
        return []

    def _forward(self, batch: Batch) -> torch.Tensor:
        return self._model.hidden_states(upload(batch.ids_BL, self._model.device))


class ReplicaScorer(CausalScorer):
    """The scorer of the process that leads a replica: the same calls, and all its processes work on them.

    Args:
        replica: this process's.
        backbone: its part of the model.
        options: windows and batches.
        deferred: as for :class:`CausalScorer`.
    """

    def __init__(
        self,
        replica: Replica,
        backbone: MegatronBackbone,
        options: ScoringOptions,
        *,
        deferred: bool | None = None,
    ) -> None:
        super().__init__(backbone, options, deferred=deferred, partners=_Passes(replica, backbone.model))
        self._replica = replica

    def score(
        self,
        documents: Documents,
        candidates: CandidateRequest | None = None,
        *,
        scored_from: Sequence[int] | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> list[TokenScores]:
        """See :class:`megatron_tokedit.scoring.base.Scorer`; :class:`PriorError` also where another process
        of the replica failed. After an error the replica is of no more use.
        """
        self.check_ids(join_documents(documents)[0])
        with self._replica.together():
            self._replica.announce(Call(list(documents), candidates, scored_from))
            return super().score(documents, candidates, scored_from=scored_from, on_batch=on_batch)


def load_scorer(
    replica: Replica,
    identity: PriorIdentity,
    options: ScoringOptions,
    *,
    dtype: str = "float32",
    threads: int = 1,
    deferred: bool | None = None,
) -> ReplicaScorer:
    """Load a prior into all processes of a replica. By the leader, while the others :func:`follow`.

    Args:
        replica: this process's.
        identity: of a Megatron checkpoint.
        options: windows and batches.
        dtype: as for ``load.load_scorer``.
        threads: torch threads of each process on a CPU.
        deferred: as for :class:`CausalScorer`.

    Raises:
        PriorError: it cannot be loaded, here or in another process.
        ConfigError: options that the model cannot honour.
    """
    assert replica.leads
    with replica.together():
        replica.announce(Load(identity, options, dtype, threads, deferred))
        model = _load(replica, identity, dtype, threads)
        backbone = MegatronBackbone(identity, model, dtype=dtype)
        return ReplicaScorer(replica, backbone, options, deferred=deferred)


def follow(replica: Replica, do_else: Callable[[object, LanguageModel], None] | None = None) -> None:
    """Do what the leader announces until it leaves. By all other processes of a replica.

    Args:
        replica: this process's.
        do_else: is given what is not of here, and this process's part of the model.

    Raises:
        PriorError: the leader or another process failed.
    """
    part: _Part | None = None
    model: LanguageModel | None = None
    while True:
        with replica.together():
            match replica.hear():
                case Leave(message):
                    if message is None:
                        return
                    raise PriorError(
                        f"replica {replica.index} of the prior ends, its leader failed: {message}"
                    )
                case Load(identity, options, dtype, threads, deferred):
                    model = _load(replica, identity, dtype, threads)
                    if model.ctx.is_last_stage:
                        backbone = MegatronBackbone(identity, model, dtype=dtype)
                        passes = _Passes(replica, model)
                        part = CausalScorer(backbone, options, deferred=deferred, partners=passes)
                    else:
                        part = _Stage(replica, model, options)
                case Call(documents, candidates, scored_from):
                    assert part is not None, "a prior is loaded before it scores"
                    part.score(documents, candidates, scored_from=scored_from)
                case command:
                    assert do_else is not None, f"the leader said {command!r}"
                    assert model is not None, "a prior is loaded before anything is done with it"
                    do_else(command, model)


def _load(replica: Replica, identity: PriorIdentity, dtype: str, threads: int) -> LanguageModel:
    """This process's part of a prior, with so many torch threads."""
    torch.set_num_threads(threads)
    model = load_part(identity, dtype=dtype, device=replica.device, layout=replica.layout)
    torch.set_num_threads(threads)  # megatron's initialisation may have chosen its own
    return model
