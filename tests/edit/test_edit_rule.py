"""The fast edit rule against a slow and obvious one, on a prior whose probabilities are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tokedit.edit.editor import Candidates, EditMethod, Editor
from megatron_tokedit.edit.random import document_key, uniforms
from megatron_tokedit.edit.rules import Action, Rule, Rules, preset
from megatron_tokedit.edit.samplers import TopK
from megatron_tokedit.errors import ConfigError
from megatron_tokedit.scoring.base import CandidateRequest
from megatron_tokedit.testing.fake_prior import BigramScorer, random_bigrams

SPECIAL = frozenset({0, 1})
BOS = 1


def run_fast(method, sequences, scorer, key):
    """The editor under test."""
    request = CandidateRequest(
        method.sampler.num_candidates, method.rules.resample_intervals, tuple(sorted(SPECIAL))
    )
    ids = np.concatenate([*sequences, np.empty(0, np.int32)])
    (scores,) = scorer.score([ids], request)
    editor = Editor(method, vocab_size=scorer.vocab_size, special_ids=SPECIAL, bos=BOS)
    candidates = Candidates(
        scores.candidate_positions_E, scores.candidate_ids_EK, scores.candidate_logprobs_EK
    )
    return editor.edit(sequences, scores.logprobs_T, candidates, key)


def run_slow(method, sequences, scorer, key):
    """The rule as METHOD.md tells it, token by token, straight from the table."""
    ids = [int(i) for sequence in sequences for i in sequence]
    numbers = uniforms(key, len(ids), seed=method.seed, generation=method.generation)
    starts, edited, position = set(), [], 0
    for sequence in sequences:
        starts.add(position)
        position += len(sequence)
    eligible = 0
    for t, token in enumerate(ids):
        before = ids[t - 1] if t else scorer.bos
        first_text = t == 0 or (t == 1 and ids[0] == BOS)
        if before is None or first_text or token in SPECIAL:
            edited.append(token)
            continue
        logp = scorer.logprobs_VV[before]
        action = Action.KEEP
        for rule in method.rules.rules:
            low, high = rule.interval
            if low <= logp[token] <= high:
                action = rule.action
                break
        if action is Action.DROP and t in starts:
            action = Action.KEEP
        eligible += action is not Action.KEEP
        if action is Action.DROP:
            edited.append(None)
        elif action is Action.KEEP:
            edited.append(token)
        else:
            edited.append(slow_draw(method, logp, token, numbers[t]))
    return ids, edited, eligible


def slow_draw(method, logp, token, number):
    allowed = [i for i in range(len(logp)) if i not in SPECIAL]
    pool = sorted(allowed, key=lambda i: (-logp[i], i))[: method.sampler.k]
    if token not in pool:
        pool.append(token)
    if method.exclude_original:
        pool.remove(token)
        if not pool:
            return token
    weights = [math.exp(float(logp[i]) / method.sampler.temperature) for i in pool]
    target, reached = number * sum(weights), 0.0
    for candidate, weight in zip(pool, weights, strict=True):
        reached += weight
        if reached > target:
            return candidate
    return pool[-1]


METHODS = {
    "up_revise": EditMethod(preset("up_revise", threshold=0.6), TopK(8, 1.5)),
    "hot": EditMethod(preset("up_revise", threshold=0.2), TopK(3, 4.0)),
    "wider than the vocabulary": EditMethod(preset("up_revise", threshold=0.2), TopK(500, 4.0)),
    "both": EditMethod(preset("low_drop_up_revise", threshold=0.5, low_threshold=0.05), TopK(4, 1.0)),
    "filtering": EditMethod(preset("filtering", low_threshold=0.1), TopK()),
    "low p": EditMethod(Rules((Rule(Action.RESAMPLE, at_most=0.1),)), TopK(5, 1.0)),
    "never itself": EditMethod(preset("up_revise", threshold=0.3), TopK(4, 2.0), exclude_original=True),
    "never itself, k = 1": EditMethod(preset("up_revise", threshold=0.6), TopK(1), exclude_original=True),
    "ordered": EditMethod(
        Rules((Rule(Action.DROP, above=0.5, below=0.9), Rule(Action.RESAMPLE, at_least=0.3))), TopK(4, 2.0)
    ),
}


def check(method, sequences, bos, table_seed=0, vocab_size=23):
    scorer = BigramScorer(random_bigrams(vocab_size, seed=table_seed, sharpness=3.0), bos)
    key = document_key([f"{table_seed} {[s.tolist() for s in sequences]}"])
    fast = run_fast(method, sequences, scorer, key)
    ids, slow, eligible = run_slow(method, sequences, scorer, key)
    assert np.concatenate([*fast.sequences, np.empty(0, int)]).tolist() == [i for i in slow if i is not None]
    assert fast.num_eligible == eligible
    touched = [t for t in range(len(ids)) if slow[t] != ids[t]]
    assert fast.positions_N.tolist() == touched
    assert fast.original_ids_N.tolist() == [ids[t] for t in touched]
    assert fast.dropped_N.tolist() == [slow[t] is None for t in touched]
    assert fast.num_changed + fast.num_dropped == len(touched)
    assert len(fast.sequences) == len(sequences)
    assert all(len(s) for s in fast.sequences)
    return fast


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("bos", [None, BOS])
@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 22), min_size=1, max_size=40), max_size=4), st.integers(0, 3))
def test_fast_rule_is_the_slow_rule(method, bos, lists, table_seed):
    check(method, [np.array(ids, np.int32) for ids in lists], bos, table_seed)


def test_edits_do_happen_in_these_cases():
    table = random_bigrams(23, seed=0, sharpness=3.0)
    rng = np.random.default_rng(0)
    chain = [2]
    while len(chain) < 1500:  # text that the prior finds likely
        chain.append(int(rng.choice(23, p=table[chain[-1]])))
    ids = np.array(chain, np.int32)
    for name, method in METHODS.items():
        edited = check(method, [ids[:100], ids[100:]], BOS)
        if name != "never itself, k = 1":  # there the original is the only candidate
            assert len(edited.positions_N) > 5, name


@pytest.mark.parametrize("ids", [[], [5], [BOS, 5], [BOS]])
def test_short_documents_are_untouched(ids):
    method = EditMethod(preset("up_revise", threshold=0.0), TopK(8, 100.0))
    edited = check(method, [np.array(ids, np.int32)] if ids else [], BOS)
    assert edited.num_eligible == 0


def test_probability_equal_to_the_threshold_is_eligible():
    for threshold in (0.99, 0.999, 0.3, 1 / 3, 0.001, 1.0):
        rules = preset("up_revise", threshold=threshold)
        at = np.float32(math.log(threshold))
        below = np.nextafter(at, np.float32(-np.inf))
        assert rules.actions(np.array([at, below, np.nan], np.float32)).tolist() == [1, 0, 0]
        drop = Rules((Rule(Action.DROP, below=threshold),))
        assert drop.actions(np.array([at, below], np.float32)).tolist() == [0, 2]


def test_ties_are_broken_by_id():
    table = np.full((6, 6), 1 / 6)
    scorer = BigramScorer(table)
    method = EditMethod(preset("up_revise", threshold=0.1), TopK(2, 1.0))
    for text in range(40):
        edited = run_fast(method, [np.array([2, 5], np.int32)], scorer, document_key([str(text)]))
        assert edited.sequences[0][1] in (
            2,
            3,
            5,
        )  # the two lowest ids that are not special, and the original


def test_sampled_frequencies_follow_the_softmax():
    vocab_size, draws = 7, 40_000
    table = np.tile(np.array([0.0, 0.0, 0.5, 0.25, 0.15, 0.07, 0.03]), (vocab_size, 1))
    method = EditMethod(preset("up_revise", threshold=0.02), TopK(4, 2.0))
    edited = run_fast(
        method, [np.full(draws + 1, 6, np.int32)], BigramScorer(table), document_key(["frequencies"])
    )
    counts = np.bincount(edited.sequences[0][1:], minlength=vocab_size)[2:]
    weights = table[0, 2:] ** 0.5  # top 4 and the original, which is not among them: all five
    expected = weights / weights.sum() * draws
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 23.5  # 4 degrees of freedom, p = 1e-4


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


@pytest.mark.parametrize(
    ("bounds", "word"),
    [({}, "no condition"), ({"at_least": 1.5}, "between 0 and 1"), ({"above": 0.5, "below": 0.4}, "no p")],
)
def test_impossible_rules_are_refused(bounds, word):
    with pytest.raises(ConfigError, match=word):
        Rule(Action.RESAMPLE, **bounds)
