"""The shared scorer against the exact table, and the chunked head against a full softmax."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from contract import options

from megatron_tokedit.errors import ConfigError, PriorError
from megatron_tokedit.scoring import head
from megatron_tokedit.scoring.base import CandidateRequest
from megatron_tokedit.scoring.candidates import top_candidates
from megatron_tokedit.scoring.head import OutputHead, TiledHead
from megatron_tokedit.scoring.scorer import CausalScorer
from megatron_tokedit.testing.fake_prior import BigramBackbone, BigramScorer, random_bigrams

VOCAB = 31
LENGTHS = (0, 1, 2, 7, 8, 9, 40, 3, 1, 100)


def documents(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, n).astype(np.int32) for n in LENGTHS]


@pytest.mark.parametrize("bos", [None, 1])
@pytest.mark.parametrize(
    "changes", [{}, {"logits_bytes": 1}, {"batch_tokens": 1}, {"context_tokens": 2, "overlap_tokens": 1}]
)
@pytest.mark.parametrize("k", [4, 500])
def test_scores_are_the_tables(bos, changes, k):
    table = random_bigrams(VOCAB, seed=1)
    request = CandidateRequest(k, ((float(np.float32(np.log(0.6))), np.inf), (-3.0, -2.0)), (0, 1, 30))
    got = CausalScorer(BigramBackbone(table), options(start_id=bos, **changes)).score(documents(), request)
    expected = BigramScorer(table, bos).score(documents(), request)
    assert len(got) == len(LENGTHS)
    for ours, exact in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours.logprobs_T, exact.logprobs_T, atol=1e-5)
        np.testing.assert_array_equal(ours.candidate_positions_E, exact.candidate_positions_E)
        np.testing.assert_array_equal(ours.candidate_ids_EK, exact.candidate_ids_EK)
        np.testing.assert_allclose(ours.candidate_logprobs_EK, exact.candidate_logprobs_EK, atol=1e-5)
        assert ours.candidate_ids_EK.shape[1] == min(k, VOCAB - 3)
        assert np.isfinite(ours.candidate_logprobs_EK).all()
    assert sum(len(s.candidate_positions_E) for s in got) > 5


def test_scores_do_not_depend_on_company():
    scorer = CausalScorer(BigramBackbone(random_bigrams(VOCAB, seed=2)), options(start_id=1))
    together = scorer.score(documents())
    alone = [scorer.score([ids])[0] for ids in documents()]
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a.logprobs_T, b.logprobs_T, atol=1e-6)


def test_forwards_keep_the_budgets():
    backbone = BigramBackbone(random_bigrams(VOCAB, seed=2), max_context_tokens=8)
    CausalScorer(backbone, options(start_id=1)).score(documents())
    assert all(rows * length <= 32 and length <= 8 for rows, length in backbone.forward_shapes)
    assert len(backbone.forward_shapes) < sum(map(len, documents())) / 12  # little is padded, too


def test_tiles_never_exceed_the_byte_budget(monkeypatch):
    tile_bytes = []
    original = TiledHead.tile

    def watched(self, hidden_nH, block, out_nv):
        original(self, hidden_nH, block, out_nv)
        tile_bytes.append(out_nv.numel() * 4)

    monkeypatch.setattr(TiledHead, "tile", watched)
    monkeypatch.setattr(head, "_CPU_COLUMNS", 20)
    tiled = TiledHead(OutputHead(torch.randn(50, 8)), logits_bytes=7 * 20 * 4)
    assert len(tiled.score(torch.randn(100, 8), torch.arange(100) % 50).logprobs_N) == 100
    assert max(tile_bytes) == 7 * 20 * 4
    assert len(tile_bytes) == 15 * 3


def test_head_with_bias_scale_and_soft_cap():
    torch.manual_seed(0)
    weight, bias, hidden = torch.randn(20, 8), torch.randn(20), torch.randn(6, 8)
    output = OutputHead(weight, bias, scale=0.25, softcap=3.0)
    expected = 3.0 * torch.tanh((hidden @ weight.T + bias) * 0.25 / 3.0)
    torch.testing.assert_close(output.logits(hidden), expected)
    scores = TiledHead(output, logits_bytes=1 << 20).score(hidden, torch.arange(6))
    torch.testing.assert_close(scores.logprobs_N, expected.log_softmax(1).diagonal())


def test_ties_at_the_last_place_go_to_the_lowest_id():
    logits = torch.zeros(3, 64)
    logits[1, 40] = 1.0
    logits[2, :] = torch.arange(64)
    ids, logprobs = top_candidates(logits, torch.logsumexp(logits, 1), 4)
    assert ids.tolist() == [[0, 1, 2, 3], [40, 0, 1, 2], [63, 62, 61, 60]]
    torch.testing.assert_close(logprobs, logits.log_softmax(1).gather(1, ids.long()))


@pytest.mark.parametrize(("context", "overlap"), [(10, 3), (8, 8), (8, 0)])
def test_impossible_windows_are_refused(context, overlap):
    backbone = BigramBackbone(random_bigrams(VOCAB, seed=2), max_context_tokens=8)
    with pytest.raises(ConfigError, match=r"prior_context|prior_overlap"):
        CausalScorer(backbone, options(context_tokens=context, overlap_tokens=overlap))


def test_unusable_numbers_and_ids_are_refused():
    backbone = BigramBackbone(random_bigrams(VOCAB, seed=2))
    backbone._rows_VV[3] = torch.nan
    scorer = CausalScorer(backbone, options())
    with pytest.raises(PriorError, match="not a finite number"):
        scorer.score([np.array([3, 4], np.int32)])
    with pytest.raises(PriorError, match=r"outside the prior's vocabulary"):
        scorer.score([np.array([3, VOCAB], np.int32)])
