"""What scoring costs: counted operations, measured rates."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_tokedit.scoring.base import CandidateRequest
from megatron_tokedit.scoring.cost import count_flops, matrix_product_rate, measure_rate
from megatron_tokedit.scoring.load import identify_prior, load_scorer, scoring_options
from megatron_tokedit.testing.models import write_hf_gpt2

LAYERS, HIDDEN, VOCAB = 2, 32, 59
BODY = LAYERS * (3 + 1 + 4 + 4) * HIDDEN * HIDDEN
HEAD = VOCAB * HIDDEN


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_hf_gpt2(tmp_path_factory.mktemp("prior"), vocab_size=VOCAB))


def scorer(folder, **settings):
    identity = identify_prior(folder)
    options = scoring_options(identity, batch_tokens=64, logits_bytes=1 << 20, **settings)
    return load_scorer(identity, options, device="cpu")


def test_operations_are_those_of_the_formula(folder):
    with_start = scorer(folder, start_id=0, context_tokens=16, overlap_tokens=4)
    size = with_start.backbone.size
    assert size.num_matmul_parameters == BODY + HEAD
    assert size.attention_width == LAYERS * HIDDEN
    from transformers import AutoModelForCausalLM

    assert size.num_parameters == AutoModelForCausalLM.from_pretrained(folder).num_parameters()

    def attention(positions):
        return 4 * LAYERS * HIDDEN * sum(range(1, positions + 1))

    assert count_flops(with_start, [10]) == 2 * (BODY + HEAD) * 10 + attention(10)
    # 16 tokens, then 4 of context and 12 more: 32 positions, 28 of which are scored
    assert count_flops(with_start, [28]) == 2 * BODY * 32 + 2 * HEAD * 28 + 2 * attention(16)
    assert count_flops(scorer(folder, start_id=None), [10]) == 2 * (BODY + HEAD) * 9 + attention(9)


def test_a_sample_is_measured(folder):
    prior = scorer(folder, start_id=0)
    documents = [np.arange(n, dtype=np.int32) for n in (20, 0, 33)]
    rate = measure_rate(prior, documents, CandidateRequest(4, ((-np.inf, np.inf),)))
    assert rate.tokens_per_second > 0
    assert rate.flops_per_token == pytest.approx(count_flops(prior, [20, 0, 33]) / 53)
    assert rate.device_flops > 1e8
    assert rate.share_of_device_rate == pytest.approx(
        rate.tokens_per_second * rate.flops_per_token / rate.device_flops
    )
    assert rate.peak_memory_bytes > 50e6
    assert measure_rate(prior, []).flops_per_token == 0


def test_the_matrix_rate_is_of_the_precision():
    for dtype in (torch.float32, torch.bfloat16):
        assert matrix_product_rate(torch.device("cpu"), dtype) > 1e8
