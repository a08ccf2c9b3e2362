"""The scoring contract as checks that any scorer must pass, against a slow loop over the same model.

A subject says how to make a scorer and what its model answers; `CHECKS` are run on each subject.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_tokedit.scoring.base import CandidateRequest, Nucleus, Scorer, TokenScores
from megatron_tokedit.scoring.scorer import ScoringOptions
from megatron_tokedit.scoring.windows import plan_windows

EVERYTHING = ((-math.inf, math.inf),)
SOME = ((math.log(0.05), math.inf), (-6.0, -4.0))
EXCLUDED = (0, 1, 17)
LENGTHS = (0, 1, 2, 7, 8, 9, 13, 14, 40, 3, 1)
"""Nothing, one token, and both sides of a window's end (8 tokens, of which 3 overlap)."""


@dataclass
class Subject:
    """A scorer to test.

    Attributes:
        make: a scorer with these options.
        logprobs: float32 ``[T, V]``: the model's distribution after each of some ids, alone.
        vocab_size: V.
        tolerance: of log-probabilities.
        has_windows: whether the context is cut (an exact fake needs one token of it).
    """

    make: Callable[[ScoringOptions], Scorer]
    logprobs: Callable[[list[int]], np.ndarray]
    vocab_size: int
    tolerance: float = 1e-4
    has_windows: bool = True

    def scorer(self, start_id: int | None = None, **changes: int) -> Scorer:
        return self.make(options(start_id=start_id, **changes))

    def documents(self, seed: int = 0) -> list[np.ndarray]:
        rng = np.random.default_rng(seed)
        return [rng.integers(0, self.vocab_size, n).astype(np.int32) for n in LENGTHS]

    def rows(self, ids: np.ndarray, start_id: int | None) -> np.ndarray:
        """The distribution that each token is drawn from; NaN where there is none."""
        rows = np.full((len(ids), self.vocab_size), np.nan, np.float32)
        context, overlap = (8, 3) if self.has_windows else (1 << 20, 1)
        start = [] if start_id is None else [start_id]
        for window in plan_windows(0, len(ids), context=context, overlap=overlap):
            given = start + ids[window.start : window.stop].tolist()
            answers = self.logprobs(given)
            for position in range(window.first_scored, window.stop):
                index = position - window.start - 1 + len(start)
                if index >= 0:
                    rows[position] = answers[index]
        return rows


def remembered(logprobs: Callable[[list[int]], np.ndarray]) -> Callable[[list[int]], np.ndarray]:
    """A model's answers, each computed once: the checks ask the slow loop for the same ones."""
    known: dict[tuple[int, ...], np.ndarray] = {}

    def answer(ids: list[int]) -> np.ndarray:
        key = tuple(ids)
        if key not in known:
            known[key] = logprobs(ids)
        return known[key]

    return answer


def options(**changes: int | None) -> ScoringOptions:
    settings = {
        "context_tokens": 8,
        "overlap_tokens": 3,
        "start_id": None,
        "batch_tokens": 32,
        "logits_bytes": 1 << 20,
    }
    return ScoringOptions(**(settings | changes))


def slow_candidates(row: np.ndarray, request: CandidateRequest) -> list[int]:
    allowed = [i for i in range(len(row)) if i not in request.excluded_ids]
    kept = sorted(allowed, key=lambda i: (-row[i], i))[: request.num_candidates]
    if request.nucleus is None:
        return kept
    weights = np.exp(row[kept].astype(np.float64) / request.nucleus.temperature)
    reached = np.cumsum(weights) / weights.sum()
    return kept[: int(np.searchsorted(reached, request.nucleus.top_p)) + 1]


def compare(subject: Subject, scores: TokenScores, ids: np.ndarray, start_id: int | None, request) -> int:
    """Compare a document's scores with the slow loop's; returns the number of rows with candidates."""
    rows = subject.rows(ids, start_id)
    expected = rows[np.arange(len(ids)), ids]
    assert scores.logprobs_T.dtype == np.float32
    np.testing.assert_allclose(scores.logprobs_T, expected, atol=subject.tolerance)
    wanted = np.zeros(len(ids), bool)
    for low, high in request.intervals:
        wanted |= (scores.logprobs_T >= low) & (scores.logprobs_T <= high)
    np.testing.assert_array_equal(scores.candidate_positions_E, np.flatnonzero(wanted))
    assert scores.candidate_ids_EK.shape == scores.candidate_logprobs_EK.shape
    found = [slow_candidates(rows[position], request) for position in scores.candidate_positions_E]
    if request.nucleus:
        assert scores.candidate_ids_EK.shape[1] == max(map(len, found), default=0)
    else:
        allowed = subject.vocab_size - len(request.excluded_ids)
        assert scores.candidate_ids_EK.shape[1] == min(request.num_candidates, allowed)
    for e, (position, slow) in enumerate(zip(scores.candidate_positions_E, found, strict=True)):
        count = len(slow)
        assert scores.candidate_ids_EK[e, :count].tolist() == slow
        np.testing.assert_allclose(
            scores.candidate_logprobs_EK[e, :count], rows[position, slow], atol=subject.tolerance
        )
        assert (scores.candidate_ids_EK[e, count:] == -1).all()
        assert (scores.candidate_logprobs_EK[e, count:] == -np.inf).all()
    return len(found)


def compare_all(subject: Subject, request: CandidateRequest, start_id: int | None = None, **changes) -> None:
    documents = subject.documents()
    scores = subject.scorer(start_id, **changes).score(documents, request)
    assert len(scores) == len(documents)
    found = sum(
        compare(subject, score, ids, start_id, request) for score, ids in zip(scores, documents, strict=True)
    )
    assert found > 5


def without_start_id(subject: Subject) -> None:
    compare_all(subject, CandidateRequest(4, SOME, EXCLUDED))
    first = [
        score.logprobs_T[0] for score in subject.scorer().score(subject.documents()) if len(score.logprobs_T)
    ]
    assert np.isnan(first).all()


def with_start_id(subject: Subject) -> None:
    compare_all(subject, CandidateRequest(4, SOME, EXCLUDED), start_id=1)
    scores = subject.scorer(1).score(subject.documents())
    assert not any(np.isnan(score.logprobs_T).any() for score in scores)


def few_candidates_everywhere(subject: Subject) -> None:
    for k in (1, 2):
        compare_all(subject, CandidateRequest(k, EVERYTHING, EXCLUDED), start_id=1)
        compare_all(subject, CandidateRequest(k, EVERYTHING), start_id=1)


def more_candidates_than_ids(subject: Subject) -> None:
    compare_all(subject, CandidateRequest(500, SOME, EXCLUDED), start_id=1)


def sixty_four_candidates_are_finite(subject: Subject) -> None:
    scores = subject.scorer(1).score(subject.documents(), CandidateRequest(64, EVERYTHING, EXCLUDED))
    for score in scores:
        assert score.candidate_ids_EK.shape[1] == min(64, subject.vocab_size - len(EXCLUDED))
        assert np.isfinite(score.candidate_logprobs_EK).all()
        assert not np.isin(score.candidate_ids_EK, EXCLUDED).any()


def bounded_nucleus(subject: Subject) -> None:
    for top_p, temperature in ((0.9, 1.0), (0.5, 1.7), (0.99, 0.6)):
        request = CandidateRequest(5, EVERYTHING, EXCLUDED, Nucleus(top_p, temperature))
        compare_all(subject, request, start_id=1)


def nucleus_of_all_ids(subject: Subject) -> None:
    for top_p, temperature in ((0.9, 1.0), (0.3, 2.5), (0.9999, 1.0)):
        request = CandidateRequest(None, EVERYTHING, EXCLUDED, Nucleus(top_p, temperature))
        compare_all(subject, request, start_id=1)
        compare_all(subject, request, start_id=1, logits_bytes=1)


def budgets_of_one_and_of_everything(subject: Subject) -> None:
    request = CandidateRequest(4, SOME, EXCLUDED)
    for changes in (
        {"logits_bytes": 1},
        {"logits_bytes": 1 << 30},
        {"batch_tokens": 1},
        {"batch_tokens": 10**6},
    ):
        compare_all(subject, request, start_id=1, **changes)


def company_does_not_matter(subject: Subject) -> None:
    scorer = subject.scorer(1)
    request = CandidateRequest(4, SOME, EXCLUDED)
    documents = subject.documents()
    alone = [scorer.score([ids], request)[0] for ids in documents]
    for together in (scorer.score(documents, request), scorer.score(documents[::-1], request)[::-1]):
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_allclose(a.logprobs_T, b.logprobs_T, atol=subject.tolerance / 10)
            np.testing.assert_array_equal(a.candidate_ids_EK, b.candidate_ids_EK)
    assert scorer.score([], request) == []


def progress_adds_up(subject: Subject) -> None:
    for start_id in (None, 1):
        seen: list[int] = []
        scores = subject.scorer(start_id).score(subject.documents(), on_batch=seen.append)
        scored = sum(int((~np.isnan(score.logprobs_T)).sum()) for score in scores)
        assert min(seen) > 0
        assert sum(seen) == scored
        assert len(seen) > 2


CHECKS = (
    without_start_id,
    with_start_id,
    few_candidates_everywhere,
    more_candidates_than_ids,
    sixty_four_candidates_are_finite,
    bounded_nucleus,
    nucleus_of_all_ids,
    budgets_of_one_and_of_everything,
    company_does_not_matter,
    progress_adds_up,
)
