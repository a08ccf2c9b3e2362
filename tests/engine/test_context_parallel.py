"""Context parallelism: refused where Transformer Engine is missing; all but its attention tried here.

A slow attention that gathers the whole sequence stands in for Transformer Engine's, so that what is ours or
megatron-core's (how batches, positions, losses and gradients are split) runs on CPU ranks.
"""

from __future__ import annotations

from unittest import mock

import engine_cases
import pytest

from megatron_tokedit.errors import ConfigError
from megatron_tokedit.testing.models import tiny_model


def refusal():
    try:
        engine_cases.start(tiny_model("llama"), layout={"context_parallel_size": 2})
    except ConfigError as error:
        return str(error)
    return "started"


def test_refused_without_transformer_engine(ranks):
    for message in ranks.run(refusal, world_size=2):
        assert message == (
            "parallel.context_parallel_size: 2 needs Transformer Engine's attention on a GPU, and this "
            "machine has no CUDA device; set it to 1"
        )


def gathering_attention():
    """A core attention over the pieces of all context-parallel ranks, in the order of the sequence."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    from megatron_tokedit.engine.attention import SdpaCoreAttention

    class GatheringAttention(SdpaCoreAttention):
        def __init__(self, config, *args, **kwargs):
            with mock.patch.object(config, "context_parallel_size", 1):
                super().__init__(config, *args, **kwargs)

        def forward(self, query, key, value, attention_mask, *args, **kwargs):
            group = parallel_state.get_context_parallel_group()
            size, rank = group.size(), group.rank()

            def whole(local):  # [s / size, ...]: pieces rank and 2 * size - rank - 1
                pieces = gather_from_sequence_parallel_region(local, group=group).chunk(2 * size)
                order = [piece for index in range(size) for piece in (index, 2 * size - index - 1)]
                return torch.cat([pieces[order.index(piece)] for piece in range(2 * size)])

            output = super().forward(whole(query), whole(key), whole(value), None)
            pieces = output.chunk(2 * size)
            return torch.cat((pieces[rank], pieces[2 * size - rank - 1]))

    return GatheringAttention


def unpinned_torch():
    """megatron-core puts the positions of a piece into pinned memory, which a CPU has none of."""
    import torch

    from megatron_tokedit.engine import cpu_device

    namespace = cpu_device._torch_on_cpu()
    namespace.tensor = lambda *args, pin_memory, **kwargs: torch.tensor(*args, **kwargs)
    return namespace


def split_steps(folder, model, layout):
    from megatron.core.models.common.embeddings import rope_utils

    from megatron_tokedit.engine import attention, initialize, preflight

    with (
        mock.patch.object(rope_utils, "torch", unpinned_torch()),
        mock.patch.object(initialize, "_check_context_parallel"),
        mock.patch.object(preflight, "refuse_faults"),
        mock.patch.object(attention, "SdpaCoreAttention", gathering_attention()),
    ):
        return engine_cases.load_and_train(folder, model, 2, **layout)


@pytest.mark.parametrize(
    ("family", "tp", "pp"), [("llama", 1, 1), ("gpt2", 1, 1), ("llama", 1, 2), ("mixtral", 2, 1)]
)
def test_pieces_of_sequences_give_the_same_loss_and_gradient(ranks, tmp_path, family, tp, pp):
    model = tiny_model(family)
    ranks.run(engine_cases.train_and_save, tmp_path, model, 2, world_size=1)
    (expected,) = ranks.run(engine_cases.load_and_train, tmp_path, model, 2, world_size=1)
    fields = {"context_parallel_size": 2, "sequence_parallel": tp > 1}
    results = ranks.run(
        split_steps, tmp_path, model, {"tp": tp, "pp": pp, "layout": fields}, world_size=2 * tp * pp
    )
    for result in results:
        for got, want in zip(result, expected, strict=True):
            assert got == pytest.approx(want, rel=1e-5)
