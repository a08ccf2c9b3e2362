"""Edits of byte-level ids: what was valid UTF-8 stays so, and no edit is undone without need."""

from __future__ import annotations

import numpy as np
import pytest
from edit_reference import run_fast
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tokedit.edit.editor import EditMethod
from megatron_tokedit.edit.random import document_key
from megatron_tokedit.edit.rules import Action, Rule, Rules
from megatron_tokedit.edit.samplers import TopK, TopP
from megatron_tokedit.edit.utf8_guard import Utf8Guard
from megatron_tokedit.testing.fake_prior import BigramScorer, random_bigrams

ALPHABET = "ab \u00e9\u00df\u4e2d\u6587\u5b57\ud55c\U0001f600\U0001f4a9"


def is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


class Vocabulary:
    """Ids 0 and 1 are special, the others have bytes; some of them are no whole characters."""

    def __init__(self, pieces):
        self.pieces = {2 + index: piece for index, piece in enumerate(dict.fromkeys(pieces))}
        self.ids = {piece: i for i, piece in self.pieces.items()}
        self.incomplete = {i: piece for i, piece in self.pieces.items() if not is_utf8(piece)}
        self.size = 2 + len(self.pieces)

    def encode(self, pieces):
        return np.array([self.ids[piece] for piece in pieces], np.int32)

    def decode(self, ids):
        return b"".join(self.pieces.get(int(i), b"") for i in ids)


def cut(data: bytes, rng) -> list[bytes]:
    """The bytes in pieces of random lengths."""
    pieces = []
    while data:
        length = int(rng.integers(1, 6))
        pieces.append(data[:length])
        data = data[length:]
    return pieces


def naive(vocabulary, sequences, edited):
    """What must come out, run by run: (ids of each sequence, positions that stay edited, number undone)."""
    fate = {}
    new = iter(np.concatenate([*edited.sequences, np.empty(0, np.int32)]).tolist())
    dropped = set(edited.positions_N[edited.dropped_N].tolist())
    touched, undone, position, results = set(edited.positions_N.tolist()), 0, 0, []
    for sequence in sequences:
        old = {position + t: int(i) for t, i in enumerate(sequence)}
        fate = {t: None if t in dropped else next(new) for t in old}
        kept_edits = {t: fate[t] for t in old if t in touched}
        runs, run = [], []
        for t in old:
            if old[t] in vocabulary.incomplete or fate[t] in vocabulary.incomplete:
                run.append(t)
            else:
                runs.append(run)
                run = []
        runs.append(run)
        for run in runs:
            before = b"".join(vocabulary.incomplete.get(old[t], b"a") for t in run)
            after = b"".join(vocabulary.incomplete.get(fate[t], b"a") for t in run if fate[t] is not None)
            if not (is_utf8(before) and is_utf8(after)):
                for t in run:
                    if t in kept_edits:
                        del kept_edits[t]
                        undone += 1
        outcome = [kept_edits.get(t, old[t]) for t in old]
        results.append(([i for i in outcome if i is not None], sorted(kept_edits)))
        position += len(sequence)
    return [ids for ids, _ in results], [t for _, kept in results for t in kept], undone


METHODS = [
    EditMethod(Rules((Rule(Action.RESAMPLE, at_least=0.0),)), TopK(200, 50.0)),
    EditMethod(Rules((Rule(Action.RESAMPLE, at_least=0.02),)), TopP(0.95, 5.0)),
    EditMethod(Rules((Rule(Action.DROP, below=0.02), Rule(Action.RESAMPLE, at_least=0.05))), TopK(8, 3.0)),
    EditMethod(Rules((Rule(Action.DROP, at_least=0.03),)), TopK()),
]


def check(vocabulary, sequences, method, seed):
    """Compare with the naive loop on the edits of an editor that minds no UTF-8."""
    scorer = BigramScorer(random_bigrams(vocabulary.size, seed=seed, sharpness=2.0))
    key = document_key([str(seed)])
    plain = run_fast(method, sequences, scorer, key)
    guarded = run_fast(method, sequences, scorer, key, vocabulary.incomplete)
    expected, positions, undone = naive(vocabulary, sequences, plain)
    assert [ids.tolist() for ids in guarded.sequences] == expected
    assert guarded.positions_N.tolist() == positions
    ids = np.concatenate([*sequences, np.empty(0, np.int32)])
    assert guarded.original_ids_N.tolist() == ids[positions].tolist()
    assert (guarded.num_undone, guarded.num_eligible) == (undone, plain.num_eligible)
    assert guarded.num_resampled == plain.num_resampled
    assert guarded.num_changed + guarded.num_dropped + undone == plain.num_changed + plain.num_dropped
    return guarded


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text(ALPHABET, max_size=25), max_size=3),
    st.integers(0, 2**31),
    st.sampled_from(METHODS),
    st.booleans(),
)
def test_valid_text_stays_valid(texts, seed, method, damaged):
    rng = np.random.default_rng(seed)
    data = [text.encode() for text in texts]
    if damaged:  # a document that is not valid UTF-8 to begin with
        data = [
            bytes(rng.choice([byte, 0xE4, 0x80, 0x61], p=[0.9, 0.03, 0.03, 0.04]) for byte in d) for d in data
        ]
    pieces = [cut(each, rng) for each in data]
    others = [piece for text in (ALPHABET, ALPHABET[::-1]) for piece in cut(text.encode(), rng)]
    vocabulary = Vocabulary([*(p for sequence in pieces for p in sequence), *others, b"a", b"\xe4", b"\x80"])
    sequences = [vocabulary.encode(each) for each in pieces]
    guarded = check(vocabulary, sequences, method, seed)
    for before, after in zip(data, guarded.sequences, strict=True):
        assert is_utf8(vocabulary.decode(after)) or not is_utf8(before)


def test_some_edits_of_byte_level_ids_survive_and_some_do_not():
    lead = [bytes([byte]) for byte in range(0xE1, 0xE9)]
    tail = [bytes([byte]) for byte in range(0x80, 0xC0)]
    vocabulary = Vocabulary([*lead, *tail, b"x", b"y"])
    rng = np.random.default_rng(0)
    pieces = []
    for _ in range(240):
        pieces += [lead[rng.integers(8)], tail[rng.integers(64)], tail[rng.integers(64)], b"x"]
    sequences = [vocabulary.encode(pieces[:480]), vocabulary.encode(pieces[480:])]
    guarded = check(vocabulary, sequences, METHODS[1], 3)
    is_byte = [int(i) in vocabulary.incomplete for i in guarded.original_ids_N]
    assert sum(is_byte) > 5
    assert guarded.num_undone > 5


WHOLE, INCOMPLETE = (
    2,
    {10: b"\xe4", 11: b"\xb8", 12: b"\xad", 13: b"\xb8\xad", 14: b"\xc3", 15: b"\xed", 16: b"\xa0"},
)
CASES = {
    "a continuation byte by another": ([10, 11, 12], {2: 11}, []),
    "a lead byte by a letter": ([10, 11, 12], {0: WHOLE}, [0]),
    "a letter by a lead byte": ([WHOLE, WHOLE], {1: 10}, [1]),
    "a letter by a piece of a character that another edit completes": ([3, 4], {0: 10, 1: 13}, []),
    "a whole character dropped": ([3, 10, 11, 12, 3], {1: None, 2: None, 3: None}, []),
    "a part dropped": ([3, 10, 11, 12, 3], {2: None, 3: None}, [2, 3]),
    "all edits of a run, but only of that": ([10, 13, 3, 10, 11, 12, 3], {1: 11, 2: 4, 4: 12, 5: 11}, [1]),
    "a character becomes letters": ([10, 11, 12], {0: 3, 1: 4, 2: 5}, []),
    "two bytes for two": ([10, 11, 12, 3], {1: None, 2: 13}, []),
    "a surrogate is no UTF-8": ([10, 11, 12], {0: 15, 1: 16, 2: 11}, [0, 1, 2]),
    "an overlong run": ([10, 13], {0: 14}, [0]),
    "an original that is no UTF-8": ([10, 3, 10, 13], {0: 4}, [0]),
    "a letter beside a run": ([3, 10, 13, 4], {0: 5, 3: None}, []),
}


@pytest.mark.parametrize(("ids", "edits", "undone"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("repeats", [1, 3])
def test_the_rule_case_by_case(ids, edits, undone, repeats):
    """Each repeat is a sequence of its own: runs end with their sequence."""
    guard = Utf8Guard(INCOMPLETE, vocab_size=20)
    number = len(ids)
    positions = [number * repeat + position for repeat in range(repeats) for position in sorted(edits)]
    original = np.array(ids * repeats, np.int32)
    new = [edits[position % number] for position in positions]
    broken = guard.broken(
        original,
        [number * repeat for repeat in range(repeats + 1)],
        np.array(positions),
        np.array([original[p] if i is None else i for p, i in zip(positions, new, strict=True)], np.int32),
        np.array([i is None for i in new]),
    )
    found = [] if broken is None else np.array(positions)[broken].tolist()
    assert found == [number * repeat + position for repeat in range(repeats) for position in undone]


def test_a_character_does_not_reach_over_sequences():
    guard = Utf8Guard(INCOMPLETE, vocab_size=20)
    broken = guard.broken(
        np.array([3, 10, 13, 4], np.int32),
        [0, 1, 4],
        np.array([0, 1, 2]),
        np.array([10, 11, 12], np.int32),
        np.zeros(3, bool),
    )
    assert broken is not None
    assert broken.all()
