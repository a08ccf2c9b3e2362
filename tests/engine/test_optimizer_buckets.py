"""Checkpoints of an optimizer whose parameters lie in several padded buckets, as they do on GPUs."""

from __future__ import annotations

import functools
from unittest import mock

import engine_cases

from megatron_tokedit.testing.models import tiny_llama

LAYOUT = {"layout": {"overlap_grad_reduce": True}}
"""What makes megatron-core cut its buffers into buckets; the default on GPUs with data parallelism."""


def small_buckets():
    """Buckets of 5,000 values instead of 40 million."""
    from megatron.core import distributed

    config = functools.partial(distributed.DistributedDataParallelConfig, bucket_size=5000)
    return mock.patch.object(distributed, "DistributedDataParallelConfig", config)


def five_and_five(folder, model):
    """The last five of ten steps, the same after a resume, and the padding before the last bucket."""
    with small_buckets():
        straight = engine_cases.start(model, **LAYOUT)
        expected = straight.steps(5)
        straight.save(folder, 5)
        expected += straight.steps(5)
        (buffer,) = straight.model[0].buffers
        *before, _ = [
            end - start - bucket.numel_unpadded
            for (start, end), bucket in zip(buffer.bucket_indices, buffer.buckets, strict=True)
        ]
        straight.ctx.destroy()
        resumed = engine_cases.start(model, seed=1234, **LAYOUT)
        resumed.load(folder)
        resumed.skip_batches(5)
        return expected[5:], resumed.steps(5), sum(before)


def test_state_behind_a_padded_bucket_is_saved_as_it_is(ranks, tmp_path):
    (expected, resumed, padding), _ = ranks.run(five_and_five, tmp_path, tiny_llama(), world_size=2)
    assert padding > 0
    assert resumed == expected  # bit for bit


def load_in_one_bucket(folder, model):
    """Five steps on one rank, whose buffer is a single bucket, from the checkpoint."""
    run = engine_cases.start(model, seed=99)
    run.load(folder)
    run.skip_batches(5)
    return run.steps(5)


def test_another_layout_finds_it_too(ranks, tmp_path):
    (expected, _, _), _ = ranks.run(five_and_five, tmp_path, tiny_llama(), world_size=2)
    (resumed,) = ranks.run(load_in_one_bucket, tmp_path, tiny_llama(), world_size=1)
    for (loss, norm), (other_loss, other_norm) in zip(expected, resumed, strict=True):
        assert abs(loss - other_loss) < 1e-4
        assert abs(norm - other_norm) < 1e-3
