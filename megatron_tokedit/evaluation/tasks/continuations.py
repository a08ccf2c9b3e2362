"""How probable continuations of contexts are, with a ``Scorer``, and whether they are the most probable ones.

The answers of a multiple-choice question often differ in their last token only. Such continuations are scored
in one pass: the logits behind what they share hold all of them. They are looked for among the candidates that
the scorer gives, and one that is not among these is scored by itself.

Invariant: an answer is the sum of the continuation's log-probabilities given as much of its context as the
model takes, cut from the left; it depends on nothing else that is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from megatron_tokedit.errors import DataFormatError
from megatron_tokedit.evaluation.tasks.encoding import Pair
from megatron_tokedit.scoring.base import CandidateRequest, Scorer, TokenScores

Answer = tuple[float, bool]
"""Log-probability in nats, and whether each token is the most probable one at its place."""
_ALTERNATIVES = 128
"""Candidates among which last tokens are looked for."""
_EVERY_ROW = ((-np.inf, 0.0),)


@dataclass(slots=True)
class _Document:
    """What is scored at once: tokens, and continuations that differ from them in the last one at most.

    Attributes:
        ids: ``[T]``, of the first of them.
        members: of each its number among all, where it begins, and its last id.
    """

    ids: npt.NDArray[np.int32]
    members: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def scored_from(self) -> int:
        """Where the longest continuation begins."""
        return min(start for _, start, _ in self.members)

    @property
    def has_alternatives(self) -> bool:
        """Whether the continuations differ."""
        return len({last for _, _, last in self.members}) > 1


def score_pairs(
    scorer: Scorer,
    pairs: Sequence[Pair],
    *,
    max_positions: int,
    tokens_at_once: int,
    on_answers: Callable[[list[tuple[int, Answer]]], None] | None = None,
) -> list[Answer]:
    """The answers for all pairs, in order.

    Args:
        scorer: without a start id, with windows of ``max_positions + 1`` tokens.
        pairs: in any order.
        max_positions: ids the model is given; what is longer loses the beginning of its context.
        tokens_at_once: so many tokens, about, go to the scorer in one call.
        on_answers: told what is known after each call: numbers of pairs, and their answers.

    Raises:
        DataFormatError: a continuation is longer than what the model takes.
        PriorError: the model's numbers are unusable.
    """
    answers: dict[int, Answer] = {}

    def take(found: list[tuple[int, Answer]]) -> None:
        answers.update(found)
        if on_answers is not None and found:
            on_answers(found)

    documents = _documents(pairs, max_positions)
    alone = [document for document in documents if not document.has_alternatives]
    missed: list[_Document] = []
    for batch in _chunks(alone, tokens_at_once):
        scores = _score(scorer, batch, 1)
        take([a for d, s in zip(batch, scores, strict=True) for a in _read(d, s, missed)])
    for batch in _chunks([d for d in documents if d.has_alternatives], tokens_at_once):
        scores = _score(scorer, batch, _ALTERNATIVES)
        take([a for d, s in zip(batch, scores, strict=True) for a in _read(d, s, missed)])
    for batch in _chunks(missed, tokens_at_once):
        scores = _score(scorer, batch, 1)
        take([a for d, s in zip(batch, scores, strict=True) for a in _read(d, s, [])])
    return [answers[i] for i in range(len(pairs))]


def _documents(pairs: Sequence[Pair], max_positions: int) -> list[_Document]:
    """What is to be scored, the longest first."""
    documents: dict[bytes, _Document] = {}
    for number, pair in enumerate(pairs):
        if len(pair.continuation) > max_positions:
            raise DataFormatError(
                f"a continuation of {len(pair.continuation)} tokens: the model takes {max_positions}"
            )
        ids = np.array((pair.context + pair.continuation)[-(max_positions + 1) :], np.int32)
        document = documents.setdefault(ids[:-1].tobytes(), _Document(ids))
        document.members.append((number, len(ids) - len(pair.continuation), int(ids[-1])))
    return sorted(documents.values(), key=lambda document: -len(document.ids))


def _chunks(documents: Sequence[_Document], tokens_at_once: int) -> Iterator[list[_Document]]:
    chunk: list[_Document] = []
    num_tokens = 0
    for document in documents:
        chunk.append(document)
        num_tokens += len(document.ids)
        if num_tokens >= tokens_at_once:
            yield chunk
            chunk, num_tokens = [], 0
    if chunk:
        yield chunk


def _score(scorer: Scorer, documents: Sequence[_Document], num_candidates: int) -> list[TokenScores]:
    return scorer.score(
        [document.ids for document in documents],
        CandidateRequest(num_candidates, _EVERY_ROW),
        scored_from=[document.scored_from for document in documents],
    )


def _read(document: _Document, scores: TokenScores, missed: list[_Document]) -> Iterator[tuple[int, Answer]]:
    """The answers of a document's members; those whose last token is no candidate go to ``missed``."""
    ids, last_place = document.ids, len(document.ids) - 1
    first = document.scored_from
    best_S = scores.candidate_ids_EK[:, 0]
    is_best_S = best_S == ids[first:]
    for number, start, last in document.members:
        shared = float(scores.logprobs_T[start:last_place].sum(dtype=np.float64))
        if last == ids[last_place]:
            own = float(scores.logprobs_T[last_place])
        else:
            places = np.flatnonzero(scores.candidate_ids_EK[-1] == last)
            if not len(places):
                other = _Document(np.append(ids[:-1], np.int32(last)), [(number, start, last)])
                missed.append(other)
                continue
            own = float(scores.candidate_logprobs_EK[-1, places[0]])
        is_greedy = bool(is_best_S[start - first : -1].all() and best_S[-1] == last)
        yield number, (shared + own, is_greedy)
