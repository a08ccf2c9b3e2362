from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_tokedit.scoring.windows import Window, plan_batches, plan_windows

sizes = st.integers(2, 12).flatmap(
    lambda context: st.tuples(st.just(context), st.integers(1, context - 1), st.integers(0, 60))
)


@given(sizes)
def test_every_token_is_scored_once_with_its_overlap(size):
    context, overlap, num_tokens = size
    windows = list(plan_windows(3, num_tokens, context=context, overlap=overlap))
    scored = [t for window in windows for t in range(window.first_scored, window.stop)]
    assert scored == list(range(num_tokens))
    for window in windows:
        assert window.document == 3
        assert 0 < window.num_tokens <= context
        assert window.first_scored - window.start == (overlap if window.start else 0) or window.start == 0


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 64))
def test_batches_hold_every_window_within_the_budget(lengths, budget):
    windows = [Window(i, 0, n, 0) for i, n in enumerate(lengths)]
    batches = list(plan_batches(windows, budget))
    assert sorted((w for batch in batches for w in batch), key=lambda w: w.document) == windows
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(w.num_tokens for w in batch) <= budget
    flat = [w.num_tokens for batch in batches for w in batch]
    assert flat == sorted(flat, reverse=True)


def test_little_is_padded():
    windows = [Window(i, 0, n, 0) for i, n in enumerate([100] * 10 + [96] * 5 + [60, 50, 40, 7, 6])]
    batches = [[w.num_tokens for w in batch] for batch in plan_batches(windows, 480)]
    # 95 is close enough to 100; 60 is not; 7 and 6 fill up a batch that would be tiny
    assert batches == [[100] * 4, [100] * 4, [100] * 2 + [96] * 2, [96] * 3, [60], [50, 40], [7, 6]]


@pytest.mark.parametrize("num_tokens", [0, 1, 8, 9])
def test_window_edges(num_tokens):
    windows = list(plan_windows(0, num_tokens, context=8, overlap=3))
    assert len(windows) == {0: 0, 1: 1, 8: 1, 9: 2}[num_tokens]
    if num_tokens == 9:
        assert windows[1] == Window(0, 5, 9, 8)
