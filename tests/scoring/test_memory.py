"""Memory that runs out: injected into a real backbone and a real head, whose arithmetic stays as it is."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from megatron_tokedit.errors import PriorError
from megatron_tokedit.scoring.base import CandidateRequest
from megatron_tokedit.scoring.head import OutputHead, TiledHead
from megatron_tokedit.scoring.memory import is_out_of_memory
from megatron_tokedit.scoring.scorer import CausalScorer, ScoringOptions
from megatron_tokedit.testing.fake_prior import BigramBackbone, BigramScorer, random_bigrams

VOCAB = 31
TABLE = random_bigrams(VOCAB, seed=1)
REQUEST = CandidateRequest(4, ((-np.inf, np.inf),), (0,))
CPU_ERROR = RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory")
GPU_ERROR = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def documents():
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB, n).astype(np.int32) for n in (8, 8, 7, 8, 5, 2, 30, 8, 8)]


def scorer(backbone, **settings):
    return CausalScorer(backbone, ScoringOptions(8, 3, 1, 64, 1 << 20), **settings)


class SmallBackbone(BigramBackbone):
    """Runs out of memory above a number of positions."""

    def __init__(self, positions, error):
        super().__init__(TABLE)
        self._positions, self._error = positions, error

    def hidden_states(self, ids_BL):
        if ids_BL.numel() > self._positions:
            raise self._error
        return super().hidden_states(ids_BL)


def assert_exact(scores):
    for ours, exact in zip(scores, BigramScorer(TABLE, 1).score(documents(), REQUEST), strict=True):
        np.testing.assert_allclose(ours.logprobs_T, exact.logprobs_T, atol=1e-5)
        np.testing.assert_array_equal(ours.candidate_ids_EK, exact.candidate_ids_EK)


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("error", [CPU_ERROR, GPU_ERROR, MemoryError()])
def test_a_batch_that_does_not_fit_is_split(caplog, error, deferred):
    backbone = SmallBackbone(positions=17, error=error)
    with caplog.at_level(logging.WARNING, logger="megatron_tokedit"):
        assert_exact(scorer(backbone, deferred=deferred).score(documents(), REQUEST))
    assert max(rows * length for rows, length in backbone.forward_shapes) <= 17
    assert len(caplog.records) == 1
    assert "--prior-batch-tokens" in caplog.text


def test_a_window_that_does_not_fit_names_the_settings():
    with pytest.raises(PriorError, match=r"single window of 8 tokens.*--prior-context.*--prior-batch-tokens"):
        scorer(SmallBackbone(positions=7, error=CPU_ERROR)).score(documents())


def limit_rows(monkeypatch, rows, error):
    """Let the real head run out of memory above a number of rows, wherever logits are computed."""
    seen = []
    tile, logits = TiledHead.tile, OutputHead.logits

    def check(hidden_nH):
        if len(hidden_nH) > rows:
            raise error
        seen.append(len(hidden_nH))

    def small_tile(self, hidden_nH, block, out_nv):
        check(hidden_nH)
        tile(self, hidden_nH, block, out_nv)

    def small_logits(self, hidden_nH):
        check(hidden_nH)
        return logits(self, hidden_nH)

    monkeypatch.setattr(TiledHead, "tile", small_tile)
    monkeypatch.setattr(OutputHead, "logits", small_logits)
    return seen


@pytest.mark.parametrize("error", [CPU_ERROR, GPU_ERROR])
def test_the_head_goes_on_with_half_as_many_rows(caplog, monkeypatch, error):
    seen = limit_rows(monkeypatch, 5, error)
    subject = scorer(BigramBackbone(TABLE))
    with caplog.at_level(logging.WARNING, logger="megatron_tokedit"):
        assert_exact(subject.score(documents(), REQUEST))
        num_warnings = len(caplog.records)
        assert_exact(subject.score(documents(), REQUEST))
    assert max(seen) <= 5
    assert num_warnings == len(caplog.records) == 2  # one for the first pass, one for the candidates
    assert "--prior-logits-bytes" in caplog.text


def test_a_row_that_does_not_fit_names_the_settings(monkeypatch):
    limit_rows(monkeypatch, 0, CPU_ERROR)
    with pytest.raises(PriorError, match=r"single token.*--prior-batch-tokens"):
        scorer(BigramBackbone(TABLE)).score(documents())


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        scorer(SmallBackbone(7, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))).score(documents())


def test_torchs_own_error_is_recognised():
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 55)
    assert is_out_of_memory(error.value)
