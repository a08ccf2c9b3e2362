"""The method as METHOD.md tells it, token by token: the slow and obvious oracle of the fast one.

Special ids are 0 and 1 (BOS). The prior is a table of bigrams, so every probability is known.
"""

from __future__ import annotations

import math

import numpy as np

from megatron_tokedit.edit.editor import Candidates, Editor
from megatron_tokedit.edit.random import document_key, uniforms
from megatron_tokedit.edit.rules import Action
from megatron_tokedit.edit.samplers import Rejection, TopP
from megatron_tokedit.testing.fake_prior import BigramScorer

SPECIAL = frozenset({0, 1})
BOS = 1


def temperature_of(sampler):
    return sampler.beta if isinstance(sampler, Rejection) else sampler.temperature


def candidate_pool(sampler, logp):
    """The ids that a scorer returns for a row, best first: special ones never, ties by rising id."""
    pool = [i for i in sorted(range(len(logp)), key=lambda i: (-logp[i], i)) if i not in SPECIAL]
    if sampler.k is not None:
        pool = pool[: sampler.k]
    if isinstance(sampler, TopP):
        weights = [math.exp(float(logp[i]) / sampler.temperature) for i in pool]
        reached, nucleus = 0.0, []
        for candidate, weight in zip(pool, weights, strict=True):
            nucleus.append(candidate)
            reached += weight
            if reached >= sampler.top_p * sum(weights):
                break
        pool = nucleus
    return pool


def law(method, logp, token):
    """Candidate -> probability of being drawn in place of ``token``."""
    pool = candidate_pool(method.sampler, logp)
    if token not in pool and not isinstance(method.sampler, TopP):
        pool.append(token)
    if method.exclude_original:
        pool = [i for i in pool if i != token]
    weights = {i: math.exp(float(logp[i]) / temperature_of(method.sampler)) for i in pool}
    total = sum(weights.values())
    return {i: weight / total for i, weight in weights.items()} if total else {token: 1.0}


def slow_draw(method, logp, token, number):
    reached = 0.0
    for candidate, probability in law(method, logp, token).items():
        reached += probability
        if reached > number:
            return candidate
    return candidate


def run_slow(method, sequences, scorer, key):
    """(ids, what becomes of each: an id or None, number of eligible tokens)."""
    ids = [int(i) for sequence in sequences for i in sequence]
    numbers = uniforms(key, len(ids), seed=method.seed, generation=method.generation)
    starts, position = set(), 0
    for sequence in sequences:
        starts.add(position)
        position += len(sequence)
    edited, eligible = [], 0
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


def run_fast(method, sequences, scorer, key, incomplete_utf8=None):
    """The editor under test, on the scores and padded candidates that a scorer would give it."""
    ids = np.concatenate([*sequences, np.empty(0, np.int32)])
    (scores,) = scorer.score([ids])
    positions, rows = [], []
    for t, logprob in enumerate(scores.logprobs_T):
        if any(low <= logprob <= high for low, high in method.rules.resample_intervals):
            logp = scorer.logprobs_VV[ids[t - 1] if t else scorer.bos]
            positions.append(t)
            rows.append([(i, logp[i]) for i in candidate_pool(method.sampler, logp)])
    width = max(map(len, rows), default=0)
    padded = np.array([row + [(-1, -np.inf)] * (width - len(row)) for row in rows]).reshape(
        len(rows), width, 2
    )
    candidates = Candidates(
        np.array(positions, np.int64), padded[..., 0].astype(np.int32), padded[..., 1].astype(np.float32)
    )
    editor = Editor(
        method,
        vocab_size=scorer.vocab_size,
        special_ids=SPECIAL,
        bos=BOS,
        incomplete_utf8=incomplete_utf8 or {},
    )
    return editor.edit(sequences, scores.logprobs_T, candidates, key)


def check(method, sequences, table, bos=None):
    """Fast and slow agree on one document; returns the fast result."""
    scorer = BigramScorer(table, bos)
    key = document_key([f"{[s.tolist() for s in sequences]}"])
    before = [s.copy() for s in sequences]
    fast = run_fast(method, sequences, scorer, key)
    assert all(np.array_equal(a, b) for a, b in zip(before, sequences, strict=True))
    ids, slow, eligible = run_slow(method, sequences, scorer, key)
    assert len(fast.sequences) == len(sequences)
    position = 0
    for original, edited in zip(sequences, fast.sequences, strict=True):
        expected = [i for i in slow[position : position + len(original)] if i is not None]
        assert edited.tolist() == expected
        assert edited.dtype == np.int32
        assert len(edited) or not len(original)
        position += len(original)
    assert fast.num_eligible == eligible
    touched = [t for t in range(len(ids)) if slow[t] != ids[t]]
    assert fast.positions_N.tolist() == touched
    assert fast.original_ids_N.tolist() == [ids[t] for t in touched]
    assert fast.dropped_N.tolist() == [slow[t] is None for t in touched]
    assert fast.num_changed + fast.num_dropped == len(touched)
    assert fast.num_undone == 0
    return fast


def likely_text(table, length, seed=0):
    """Ids drawn from the table itself, so that many of them are probable."""
    rng = np.random.default_rng(seed)
    chain = [2]
    while len(chain) < length:
        chain.append(int(rng.choice(len(table), p=table[chain[-1]])))
    return np.array(chain, np.int32)
