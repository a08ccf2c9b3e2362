"""The fast edit rule against a slow and obvious one, on a prior whose probabilities are known."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import numpy as np
import pytest
from edit_reference import BOS, check, likely_text, run_fast
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tokedit.edit.editor import EditMethod
from megatron_tokedit.edit.random import document_key, uniforms
from megatron_tokedit.edit.rules import Action, Rule, Rules, preset
from megatron_tokedit.edit.samplers import Rejection, TopK, TopP
from megatron_tokedit.testing.fake_prior import BigramScorer, random_bigrams

VOCAB_SIZE = 23
UP = preset("up_revise", threshold=0.3)
METHODS = {
    "up_revise": EditMethod(preset("up_revise", threshold=0.6), TopK(8, 1.5)),
    "hot": EditMethod(preset("up_revise", threshold=0.2), TopK(3, 4.0)),
    "wider than the vocabulary": EditMethod(preset("up_revise", threshold=0.2), TopK(500, 4.0)),
    "both": EditMethod(preset("low_drop_up_revise", threshold=0.5, low_threshold=0.05), TopK(4, 1.0)),
    "filtering": EditMethod(preset("filtering", low_threshold=0.1), TopK()),
    "low p": EditMethod(Rules((Rule(Action.RESAMPLE, at_most=0.1),)), TopK(5, 1.0)),
    "never itself": EditMethod(UP, TopK(4, 2.0), exclude_original=True),
    "never itself, k = 1": EditMethod(preset("up_revise", threshold=0.6), TopK(1), exclude_original=True),
    "ordered": EditMethod(
        Rules((Rule(Action.DROP, above=0.5, below=0.9), Rule(Action.RESAMPLE, at_least=0.3))), TopK(4, 2.0)
    ),
    "nucleus": EditMethod(UP, TopP(0.9, 3.0)),
    "nucleus of the top k": EditMethod(UP, TopP(0.8, 4.0, 5)),
    "nucleus, k beyond the vocabulary": EditMethod(UP, TopP(0.95, 4.0, 500)),
    "whole vocabulary as nucleus": EditMethod(UP, TopP(1.0, 2.0)),
    "nucleus without the original": EditMethod(Rules((Rule(Action.RESAMPLE, at_most=0.2),)), TopP(0.5, 1.0)),
    "nucleus, never itself": EditMethod(UP, TopP(0.9, 3.0), exclude_original=True),
    "rejection": EditMethod(UP, Rejection(4, 3.0)),
    "rejection, never itself": EditMethod(UP, Rejection(4, 3.0), exclude_original=True),
    "rejection with drops": EditMethod(
        preset("low_drop_up_revise", threshold=0.3, low_threshold=0.05), Rejection(30, 2.0)
    ),
    "nucleus with drops": EditMethod(
        preset("low_drop_up_revise", threshold=0.3, low_threshold=0.05), TopP(0.9, 3.0)
    ),
    "third generation": EditMethod(UP, TopK(8, 3.0), seed=5, generation=3),
}
TABLES = [random_bigrams(VOCAB_SIZE, seed=seed, sharpness=3.0) for seed in range(3)]
ONE_CANDIDATE = "never itself, k = 1"  # there the original is the only candidate


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("bos", [None, BOS])
@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=40), max_size=4), st.integers(0, 2))
def test_fast_rule_is_the_slow_rule(method, bos, lists, table):
    check(method, [np.array(ids, np.int32) for ids in lists], TABLES[table], bos)


@pytest.mark.parametrize("name", METHODS)
def test_edits_do_happen_in_these_cases(name):
    ids = likely_text(TABLES[0], 800)
    edited = check(METHODS[name], [ids[:100], ids[100:100], ids[100:]], TABLES[0], BOS)
    if name != ONE_CANDIDATE:
        assert len(edited.positions_N) > 5
    if METHODS[name].exclude_original and name != ONE_CANDIDATE:
        assert edited.num_changed > 0.8 * edited.num_resampled  # all but those whose nucleus is themselves


@pytest.mark.parametrize("ids", [[], [5], [BOS, 5], [BOS]])
@pytest.mark.parametrize("sampler", [TopK(8, 100.0), TopP(1.0, 100.0), Rejection(8, 100.0)])
@pytest.mark.parametrize("action", [Action.RESAMPLE, Action.DROP])
def test_short_documents_are_untouched(ids, sampler, action):
    method = EditMethod(Rules((Rule(action, at_least=0.0),)), sampler)
    for sequences in ([np.array(ids, np.int32)], [np.array(ids[:1], np.int32), np.array(ids[1:], np.int32)]):
        edited = check(method, sequences, TABLES[0], BOS)
        assert edited.num_eligible == 0
    assert check(method, [], TABLES[0], BOS).sequences == []


def test_the_first_text_token_is_the_one_after_a_leading_bos():
    method = EditMethod(preset("up_revise", threshold=0.0), TopK(8, 100.0), exclude_original=True)
    for ids, touched in (([5, 6, 7], [1, 2]), ([BOS, 6, 7, 8], [2, 3]), ([5, BOS, 7, 8], [2, 3])):
        edited = check(method, [np.array(ids, np.int32)], TABLES[0], BOS)
        assert edited.positions_N.tolist() == touched


def test_a_sequence_never_loses_its_first_token():
    method = EditMethod(Rules((Rule(Action.DROP, at_least=0.0),)), TopK())
    sequences = [np.array(ids, np.int32) for ids in ([5, 6, 7], [8, 9], [], [10])]
    edited = check(method, sequences, TABLES[0])
    assert [ids.tolist() for ids in edited.sequences] == [[5], [8], [], [10]]


def test_nothing_is_copied_where_nothing_is_edited():
    ids = np.array([5, 6, 7], np.int32)
    edited = check(EditMethod(preset("none"), TopK()), [ids, ids], TABLES[0])
    assert edited.sequences[0] is ids
    assert edited.positions_N.dtype == np.int64
    assert edited.original_ids_N.dtype == np.int32
    assert edited.dropped_N.dtype == bool


@pytest.mark.parametrize("sampler", [TopK(2, 1.0), TopP(1.0, 1.0, 2), Rejection(2, 1.0)])
def test_ties_are_broken_by_id(sampler):
    table = np.full((6, 6), 1 / 6)
    method = EditMethod(preset("up_revise", threshold=0.1), sampler)
    drawn = set()
    for text in range(60):
        edited = run_fast(
            method, [np.array([2, 5], np.int32)], BigramScorer(table), document_key([str(text)])
        )
        drawn.add(int(edited.sequences[0][1]))
    # the two lowest ids that are not special, and the original where it is always a candidate
    assert drawn == ({2, 3} if isinstance(sampler, TopP) else {2, 3, 5})


@pytest.mark.parametrize("exclude_original", [False, True])
def test_the_original_stays_where_there_is_no_candidate(exclude_original):
    table = np.zeros((6, 6))
    table[:, 5], table[:, 2] = 0.999, 0.001
    method = EditMethod(preset("up_revise", threshold=0.9), TopP(0.5, 1.0), exclude_original=exclude_original)
    edited = check(method, [np.array([5, 5, 5, 5], np.int32)], table)
    assert (edited.num_resampled, edited.num_changed) == (3, 0)


def test_probability_equal_to_the_threshold_is_eligible():
    for threshold in (0.99, 0.999, 0.3, 1 / 3, 0.001, 1.0):
        rules = preset("up_revise", threshold=threshold)
        at = np.float32(math.log(threshold))
        below = np.nextafter(at, np.float32(-np.inf))
        assert rules.actions(np.array([at, below, np.nan], np.float32)).tolist() == [1, 0, 0]
        drop = Rules((Rule(Action.DROP, below=threshold),))
        assert drop.actions(np.array([at, below], np.float32)).tolist() == [0, 2]


def test_the_editor_takes_a_token_at_the_threshold():
    table = np.full((6, 6), 0.0)
    table[:, 2:] = [0.25, 0.25, 0.375, 0.125]
    ids = np.array([2, 3, 4, 5, 2], np.int32)
    for bound, positions in (("at_least", [1, 2, 4]), ("above", [2]), ("at_most", [1, 3, 4]), ("below", [3])):
        rules = Rules((Rule(Action.DROP, **{bound: 0.25}),))
        assert check(EditMethod(rules, TopK()), [ids], table).positions_N.tolist() == positions


def test_generations_and_seeds_draw_anew():
    ids = likely_text(TABLES[0], 400)
    method = EditMethod(UP, TopK(8, 3.0))
    outcomes = {
        tuple(run_fast(each, [ids], BigramScorer(TABLES[0]), b"the same key 123").sequences[0])
        for each in (method, replace(method, generation=2), replace(method, seed=1))
    }
    assert len(outcomes) == 3


def test_uniforms_are_pinned():
    # written down once; a change of the generator changes every edited corpus and must be deliberate
    numbers = uniforms(document_key(["Once upon a time"]), 4, seed=1234)
    assert numbers.tolist() == [
        0.7872261162468484,
        0.5999640678231402,
        0.17365411887537285,
        0.2236594340078082,
    ]
    assert np.array_equal(uniforms(document_key(["Once upon a time"]), 2, seed=1234), numbers[:2])
    assert not np.array_equal(
        uniforms(document_key(["Once upon a time"]), 4, seed=1234, generation=2), numbers
    )
    assert document_key(["ab", "c"]) != document_key(["a", "bc"])


def test_uniforms_are_philoxs_own():
    digest = hashlib.blake2b(b"k" * 16, digest_size=16, person=b"tokedit-uniforms")
    digest.update((7).to_bytes(8, "little") + (2).to_bytes(8, "little"))
    philox = np.random.Philox(key=int.from_bytes(digest.digest(), "little"))
    expected = np.random.Generator(philox).random(1000)
    assert np.array_equal(uniforms(b"k" * 16, 1000, seed=7, generation=2), expected)
