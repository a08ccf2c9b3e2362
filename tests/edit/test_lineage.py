"""Several edits of a document, and the way back to its original."""

from __future__ import annotations

import itertools

import numpy as np
from edit_reference import run_fast
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tokedit.edit.editor import EditedDocument, EditMethod
from megatron_tokedit.edit.lineage import Lineage
from megatron_tokedit.edit.rules import preset
from megatron_tokedit.edit.samplers import TopK
from megatron_tokedit.testing.fake_prior import BigramScorer, random_bigrams


def rebuilt(lineage):
    """The original's sequences, from the current ones and the changes."""
    positions, original_ids, dropped = lineage.changes()
    assert (np.diff(positions) > 0).all()
    assert (positions.dtype, original_ids.dtype, dropped.dtype) == (np.int64, np.int32, bool)
    current = iter([int(i) for ids in lineage.sequences for i in ids])
    change = {int(p): (int(i), bool(d)) for p, i, d in zip(positions, original_ids, dropped, strict=True)}
    ids = []
    for position in range(sum(lineage.sequence_lengths)):
        original_id, is_dropped = change.get(position, (None, False))
        now = None if is_dropped else next(current)
        assert now != original_id  # a change is one
        ids.append(now if original_id is None else original_id)
    assert next(current, None) is None
    bounds = [0, *itertools.accumulate(lineage.sequence_lengths)]
    return [ids[begin:end] for begin, end in itertools.pairwise(bounds)]


@st.composite
def edit_of(draw, sequences):
    """Any edit that an editor's record can tell."""
    position, positions, original_ids, dropped, edited = 0, [], [], [], []
    for sequence in sequences:
        kept = []
        for token in sequence.tolist():
            fate = draw(st.sampled_from(["keep", "keep", "drop", "change"]))
            new = draw(st.integers(0, 3)) if fate == "change" else token
            if fate == "drop" or new != token:
                positions.append(position)
                original_ids.append(token)
                dropped.append(fate == "drop")
            if fate != "drop":
                kept.append(new)
            position += 1
        edited.append(np.array(kept, np.int32))
    return EditedDocument(
        edited,
        np.array(positions, np.int64),
        np.array(original_ids, np.int32),
        np.array(dropped, bool),
        len(positions),
        0,
    )


@settings(max_examples=150, deadline=None)
@given(st.data(), st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=3), st.integers(0, 4))
def test_any_chain_of_edits_leads_back(data, lists, generations):
    originals = [np.array(ids, np.int32) for ids in lists]
    lineage = Lineage.start(originals)
    ids = [i for sequence in lists for i in sequence]
    tokens = list(enumerate(ids))  # where each current token stood in the original, and what it is
    for _ in range(generations):
        edited = data.draw(edit_of(lineage.sequences))
        lineage = lineage.advance(edited)
        gone = set(edited.positions_N[edited.dropped_N].tolist())
        kept = [origin for position, (origin, _) in enumerate(tokens) if position not in gone]
        tokens = list(zip(kept, np.concatenate([*edited.sequences, []]).tolist(), strict=True))
        now = dict(tokens)
        differ = [position for position, token in enumerate(ids) if now.get(position) != token]
        positions, original_ids, dropped = lineage.changes()
        assert positions.tolist() == differ
        assert original_ids.tolist() == [ids[position] for position in differ]
        assert dropped.tolist() == [position not in now for position in differ]
        assert lineage.sequences is edited.sequences
        assert lineage.sequence_lengths == [len(ids) for ids in lists]
        assert rebuilt(lineage) == lists
    if not generations:
        assert len(lineage.changes()[0]) == 0


def test_one_edit_is_the_editors_own_record_and_more_are_traced():
    table = random_bigrams(23, seed=1, sharpness=2.0)
    ids = np.random.default_rng(0).integers(2, 23, 400).astype(np.int32)
    lineage = Lineage.start([ids[:150], ids[150:]])
    rules = preset("low_drop_up_revise", threshold=0.05, low_threshold=0.004)
    lengths = []
    for generation in (1, 2, 3):
        method = EditMethod(rules, TopK(8, 3.0), generation=generation)
        edited = run_fast(method, lineage.sequences, BigramScorer(table), b"document")
        assert edited.num_changed > 3
        assert edited.num_dropped > 3
        lineage = lineage.advance(edited)
        if generation == 1:
            record = (edited.positions_N, edited.original_ids_N, edited.dropped_N)
            assert all(np.array_equal(a, b) for a, b in zip(lineage.changes(), record, strict=True))
        assert rebuilt(lineage) == [ids[:150].tolist(), ids[150:].tolist()]
        lengths.append(sum(map(len, lineage.sequences)))
    assert lengths == sorted(lengths, reverse=True)


def test_a_token_that_came_back_is_no_change():
    there = EditedDocument(
        [np.array([5, 9], np.int32)], np.array([1]), np.array([6], np.int32), np.array([False]), 1, 1
    )
    back = EditedDocument(
        [np.array([5, 6], np.int32)], np.array([1]), np.array([9], np.int32), np.array([False]), 1, 1
    )
    lineage = Lineage.start([np.array([5, 6], np.int32)]).advance(there)
    assert lineage.changes()[0].tolist() == [1]
    assert lineage.advance(back).changes()[0].tolist() == []
