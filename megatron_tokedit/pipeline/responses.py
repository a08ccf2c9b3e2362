"""Scores of the responses of conversations: given all that was said before, or each by itself.

Invariant: what is edited and counted is the same set of tokens either way, the responses' own; only their
context differs.

Legend: ``T`` tokens of a conversation, ``E`` rows with candidates, ``K`` candidates a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from megatron_tokedit.pipeline.conversations import TOKEN_ROLES
from megatron_tokedit.pipeline.results import count
from megatron_tokedit.scoring.base import TokenScores

LOGPROB_UNITS_PER_NAT = 2**20
Int32 = npt.NDArray[np.int32]
Score = Callable[[list[Int32]], list[TokenScores]]


def score_alone(score: Score, ids: Sequence[Int32], responses: Sequence[Int32]) -> list[TokenScores]:
    """Score every response by itself, as the authors' script does: no prompt, no template.

    Args:
        score: gives scores of documents.
        ids: int32 ``[T]`` of each conversation.
        responses: int32 ``[T]`` of each: the number of the response that a token is of; -1: of none.

    Returns:
        Scores of each conversation, NaN where a token is of no response.
    """
    places = [
        np.flatnonzero(responses_T == number)
        for responses_T in responses
        for number in range(int(responses_T.max(initial=-1)) + 1)
    ]
    owners = [
        index
        for index, responses_T in enumerate(responses)
        for _ in range(int(responses_T.max(initial=-1)) + 1)
    ]
    scores = score([ids[owner][place] for owner, place in zip(owners, places, strict=True)])
    parts: list[list[tuple[npt.NDArray[np.int64], TokenScores]]] = [[] for _ in ids]
    for owner, place, part in zip(owners, places, scores, strict=True):
        parts[owner].append((place, part))
    return [_joined(len(each), of_each) for each, of_each in zip(ids, parts, strict=True)]


def _joined(num_tokens: int, parts: Sequence[tuple[npt.NDArray[np.int64], TokenScores]]) -> TokenScores:
    """The scores of a conversation, from those of its responses and where these stand."""
    logprobs_T = np.full(num_tokens, np.nan, np.float32)
    width = max((part.candidate_ids_EK.shape[1] for _, part in parts), default=0)
    positions, ids, logprobs = [np.empty(0, np.int64)], [np.empty((0, width), np.int32)], []
    logprobs.append(np.empty((0, width), np.float32))
    for place, part in parts:
        logprobs_T[place] = part.logprobs_T
        missing = ((0, 0), (0, width - part.candidate_ids_EK.shape[1]))
        positions.append(place[part.candidate_positions_E])
        ids.append(np.pad(part.candidate_ids_EK, missing, constant_values=-1))
        logprobs.append(np.pad(part.candidate_logprobs_EK, missing, constant_values=-np.inf))
    return TokenScores(logprobs_T, np.concatenate(positions), np.concatenate(ids), np.concatenate(logprobs))


def without_first(responses_T: Int32) -> npt.NDArray[np.bool_]:
    """Tokens of responses but the first of each, which has no context where responses stand alone."""
    editable_T: npt.NDArray[np.bool_] = responses_T >= 0
    numbers = np.unique(responses_T[editable_T], return_index=True)[1]
    editable_T[np.flatnonzero(editable_T)[numbers]] = False
    return editable_T


def count_roles(
    counts: dict[str, int], logprobs_T: npt.NDArray[np.float32], roles_T: npt.NDArray[np.uint8]
) -> None:
    """Count the scored tokens of each role, and their log-probabilities in whole units."""
    for number, role in enumerate(TOKEN_ROLES):
        scored = logprobs_T[(roles_T == number) & ~np.isnan(logprobs_T)]
        count(counts, f"scored.{role}", len(scored))
        units = round(float(scored.sum(dtype=np.float64)) * LOGPROB_UNITS_PER_NAT)
        count(counts, f"logprob_units.{role}", units)
