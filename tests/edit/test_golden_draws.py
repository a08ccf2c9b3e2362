"""The draws of the top_k editor, written down: an edited corpus must come out the same after any rewrite.

A change of a digest here changes every edited corpus that was ever written with that seed; it must be
deliberate, and said in the change log.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from megatron_tokedit.edit.editor import Candidates, EditMethod, Editor
from megatron_tokedit.edit.random import document_key
from megatron_tokedit.edit.rules import Action, Rule, Rules, preset
from megatron_tokedit.edit.samplers import TopK
from megatron_tokedit.scoring.base import CandidateRequest
from megatron_tokedit.testing.fake_prior import BigramScorer

VOCAB_SIZE, SPECIAL = 40, frozenset({0, 1})
UP = preset("up_revise", threshold=0.03)
LOW = Rules((Rule(Action.DROP, below=0.002), Rule(Action.RESAMPLE, at_most=0.05)))

GOLDEN = {
    "default": (EditMethod(UP, TopK()), "7362d98d3472029d"),
    "hot": (EditMethod(UP, TopK(3, 4.0)), "fdb7060fb96efa4d"),
    "all": (EditMethod(UP, TopK(64, 1.0)), "b33742b7370dd1e9"),
    "seed": (EditMethod(UP, TopK(), seed=2**64 - 1), "997b199e455a1741"),
    "generation": (EditMethod(UP, TopK(), generation=3), "7ae15c048013ccaf"),
    "never itself": (EditMethod(UP, TopK(4, 2.0), exclude_original=True), "d07687d25f60cc63"),
    "low": (EditMethod(LOW, TopK(5, 1.0)), "f4608694dbae0426"),
}


def edited_corpus(method: EditMethod) -> tuple[bytes, int]:
    """The edited ids of forty documents of one or two sequences, and how many tokens were touched."""
    row, column = np.indices((VOCAB_SIZE, VOCAB_SIZE))
    weights = ((row * 7919 + column * 104_729 + row * column * 31) % 997 + 1.0) ** 3
    scorer = BigramScorer(weights / weights.sum(axis=1, keepdims=True), bos=1)
    request = CandidateRequest(
        method.sampler.num_candidates, method.rules.resample_intervals, tuple(sorted(SPECIAL))
    )
    editor = make_editor(method)
    corpus, touched = [], 0
    for index in range(40):
        ids = ((np.arange(index * 3) ** 2 * 31 + index) % 977 % VOCAB_SIZE).astype(np.int32)
        (scores,) = scorer.score([ids], request)
        candidates = Candidates(
            scores.candidate_positions_E, scores.candidate_ids_EK, scores.candidate_logprobs_EK
        )
        sequences = [ids[: index // 2], ids[index // 2 :]] if index % 2 else [ids]
        edited = editor.edit(sequences, scores.logprobs_T, candidates, document_key([f"text {index}"]))
        corpus += [sequence.astype("<i4").tobytes() + b"/" for sequence in edited.sequences]
        touched += len(edited.positions_N)
    return b"".join(corpus), touched


def make_editor(method: EditMethod) -> Editor:
    return Editor(method, vocab_size=VOCAB_SIZE, special_ids=SPECIAL, bos=1, incomplete_utf8={})


@pytest.mark.parametrize(("method", "digest"), GOLDEN.values(), ids=GOLDEN)
def test_draws_are_pinned(method, digest):
    corpus, touched = edited_corpus(method)
    assert touched > 100
    assert hashlib.sha256(corpus).hexdigest()[:16] == digest
