"""What the samplers draw: exact laws, and draws that depend on the row and its uniform alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
from edit_reference import SPECIAL, candidate_pool, law
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tokedit.edit.editor import Candidates, EditMethod, Editor
from megatron_tokedit.edit.random import document_key
from megatron_tokedit.edit.rules import preset
from megatron_tokedit.edit.samplers import Rejection, TopK, TopP, draw
from megatron_tokedit.errors import ConfigError
from megatron_tokedit.testing.fake_prior import BigramScorer

TABLE = np.tile(np.array([0.0, 0.0, 0.42, 0.23, 0.14, 0.09, 0.05, 0.04, 0.03]), (9, 1))
DRAWS = 40_000
TEMPERATURES = (0.5, 1.0, 1.5, 3.0)
SAMPLERS = [
    kind(*settings)
    for temperature in TEMPERATURES
    for kind, settings in (
        (TopK, (4, temperature)),
        (TopK, (100, temperature)),
        (Rejection, (4, temperature)),
        (TopP, (0.8, temperature)),
        (TopP, (0.9, temperature, 4)),
    )
]


def critical(degrees: int) -> float:
    """Chi-square's 1 - 1e-4 quantile, after Wilson and Hilferty."""
    return degrees * (1 - 2 / (9 * degrees) + 3.719 * math.sqrt(2 / (9 * degrees))) ** 3


def repeated(method, token, key):
    """What the editor makes of DRAWS tokens that are all the same, whatever precedes them."""
    logp = BigramScorer(TABLE).logprobs_VV[token]
    pool = np.array(candidate_pool(method.sampler, logp), np.int32)
    logprobs = np.full(DRAWS + 1, logp[token])
    logprobs[0] = np.nan
    candidates = Candidates(
        np.arange(1, DRAWS + 1), np.tile(pool, (DRAWS, 1)), np.tile(logp[pool], (DRAWS, 1))
    )
    editor = Editor(method, vocab_size=len(TABLE), special_ids=SPECIAL, bos=None, incomplete_utf8={})
    edited = editor.edit([np.full(DRAWS + 1, token, np.int32)], logprobs, candidates, key)
    assert edited.num_resampled == DRAWS
    return np.bincount(edited.sequences[0][1:], minlength=len(TABLE))


@pytest.mark.parametrize("exclude_original", [False, True])
@pytest.mark.parametrize("token", [2, 8])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_sampled_frequencies_follow_the_law(sampler, token, exclude_original):
    method = EditMethod(preset("up_revise", threshold=0.02), sampler, exclude_original=exclude_original)
    counts = repeated(method, token, document_key([f"frequencies {token}"]))
    expected = np.zeros(len(TABLE))
    for candidate, probability in law(method, BigramScorer(TABLE).logprobs_VV[token], token).items():
        expected[candidate] = DRAWS * probability
    possible = expected > 0
    assert not counts[~possible].any()
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < critical(max(int(possible.sum()) - 1, 1))


@pytest.mark.parametrize("beta", TEMPERATURES)
@pytest.mark.parametrize("token", [2, 8])
def test_rejection_is_what_a_rejection_loop_draws(beta, token):
    method = EditMethod(preset("up_revise", threshold=0.02), Rejection(4, beta))
    counts = repeated(method, token, document_key(["closed form"]))
    logp = np.log(TABLE[0, 2:])
    pool = sorted({0, 1, 2, 3, token - 2})  # the top 4 and the original
    rng = np.random.default_rng(0)
    loop_counts = np.zeros(len(TABLE), int)
    accept = [math.exp((logp[i] - logp.max()) / beta) for i in pool]
    for _ in range(DRAWS):
        while True:
            chosen = int(rng.random() * len(pool))
            if rng.random() < accept[chosen]:
                break
        loop_counts[pool[chosen] + 2] += 1
    both = counts + loop_counts
    possible = both > 0
    chi_square = (((counts - loop_counts) ** 2)[possible] / both[possible]).sum()  # two samples of one size
    assert possible.sum() == len(pool)
    assert chi_square < critical(len(pool) - 1)


SOME_SAMPLERS = st.sampled_from([TopK(3, 0.7), TopP(0.9, 2.0), Rejection(8, 1.5)])


@st.composite
def rows(draw_value):
    """Random rows, some with a candidate that is the original, some without any."""
    number, width = draw_value(st.integers(1, 12)), draw_value(st.integers(0, 9))
    rng = np.random.default_rng(draw_value(st.integers(0, 2**32)))
    ids = np.array([rng.permutation(20)[:width] for _ in range(number)], np.int32).reshape(number, width)
    logprobs = -np.sort(rng.exponential(3.0, (number, width)), axis=1).astype(np.float32)
    lengths = rng.integers(0, width + 1, number)
    padding = np.arange(width) >= lengths[:, None]
    ids[padding], logprobs[padding] = -1, -np.inf
    originals = rng.integers(0, 20, number).astype(np.int32)
    uniforms = rng.choice([0.0, 0.5, 1 - 2.0**-53, *rng.random(9)], number)
    return ids, logprobs, originals, -rng.exponential(1.0, number).astype(np.float32), uniforms


@settings(max_examples=150, deadline=None)
@given(rows(), SOME_SAMPLERS, st.booleans(), st.integers(0, 20))
def test_a_draw_depends_on_the_row_and_its_uniform_alone(case, sampler, exclude_original, padding):
    drawn = draw(sampler, *case, exclude_original=exclude_original)
    ids, logprobs, originals, original_logprobs, uniforms = case
    wider_ids = np.pad(ids, ((0, 0), (0, padding)), constant_values=-1)
    wider_logprobs = np.pad(logprobs, ((0, 0), (0, padding)), constant_values=-np.inf)
    wider = draw(
        sampler,
        *(wider_ids, wider_logprobs, originals, original_logprobs, uniforms),
        exclude_original=exclude_original,
    )
    assert np.array_equal(drawn, wider)
    for row in range(len(ids)):
        length = int((ids[row] >= 0).sum())
        alone = draw(
            sampler,
            *(ids[row : row + 1, :length], logprobs[row : row + 1, :length]),
            *(array[row : row + 1] for array in (originals, original_logprobs, uniforms)),
            exclude_original=exclude_original,
        )
        assert alone.tolist() == [drawn[row]]
        others = set(ids[row, :length].tolist()) - {int(originals[row])}
        is_candidate = originals[row] in ids[row] or not isinstance(sampler, TopP)
        stays = is_candidate and not exclude_original
        assert drawn[row] in (others | ({int(originals[row])} if stays or not others else set()))


def test_the_ends_of_the_unit_interval_are_the_first_and_the_last_candidate():
    rng = np.random.default_rng(0)
    for width in range(1, 40):
        p = np.append(rng.random(width) + 1e-3, [1e-14, 0.0])  # the one before the padding is hardly there
        with np.errstate(divide="ignore"):
            logprobs = np.tile(np.log(p / p.sum()).astype(np.float32), (2, 1))
        ids = np.tile(np.append(np.arange(2, width + 3), -1).astype(np.int32), (2, 1))
        number = np.array([0.0, 1 - 2.0**-53])
        drawn = draw(TopK(width, 1.0), ids, logprobs, ids[:, 0], logprobs[:, 0], number)
        assert drawn.tolist() == [2, width + 2]


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: TopK(0), "k=0"),
        (lambda: TopK(8, 0.0), "temperature=0"),
        (lambda: TopK(8, math.inf), "temperature=inf"),
        (lambda: Rejection(8, -1.0), "beta=-1"),
        (lambda: Rejection(0, 1.0), "k=0"),
        (lambda: TopP(0.0), "top_p=0"),
        (lambda: TopP(1.01), "top_p=1.01"),
        (lambda: TopP(math.nan), "top_p=nan"),
        (lambda: TopP(0.9, math.nan), "temperature=nan"),
        (lambda: TopP(0.9, 1.0, 0), "k=0"),
    ],
)
def test_impossible_samplers_are_refused(make, word):
    with pytest.raises(ConfigError, match=word):
        make()
