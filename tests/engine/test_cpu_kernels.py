from __future__ import annotations

import pytest
import torch

from megatron_tokedit.engine.cpu_kernels import MAX_BLOCKED_POSITIONS, BlockedCausalAttention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_groups", [6, 2, 1])
@pytest.mark.parametrize("num_positions", [1, 63, 64, 65, 200, 600])
def test_attention_by_blocks_equals_the_formula(num_positions, num_groups, dtype):
    generator = torch.Generator().manual_seed(num_positions)

    def normal(heads):
        return torch.randn(2, heads, num_positions, 8, generator=generator).to(dtype)

    inputs = [
        normal(6).requires_grad_(),
        normal(num_groups).requires_grad_(),
        normal(num_groups).requires_grad_(),
    ]
    weight = normal(6)
    output = BlockedCausalAttention.apply(*inputs, 0.3)
    output.backward(weight)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    query, key, value = exact[0], *(x.repeat_interleave(6 // num_groups, dim=1) for x in exact[1:])
    scores = query @ key.transpose(-1, -2) * 0.3
    scores = scores.masked_fill(torch.ones(num_positions, num_positions).triu(1).bool(), float("-inf"))
    want = torch.softmax(scores, -1) @ value
    want.backward(weight.double())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for got, reference in zip(
        [output, *(tensor.grad for tensor in inputs)], [want, *(tensor.grad for tensor in exact)], strict=True
    ):
        assert got.dtype == dtype
        assert (got.double() - reference).norm() <= tolerance * reference.norm() + 1e-12


def test_long_sequences_take_torchs_attention():
    assert MAX_BLOCKED_POSITIONS < 4096


def cross_entropy(dtype_name, real_vocab_size):
    """Blocked cross entropy of this rank's share of the vocabulary against torch in double precision."""
    import torch.distributed as dist

    from megatron_tokedit.engine.cpu_kernels import BlockedCrossEntropy

    dtype = getattr(torch, dtype_name)
    generator = torch.Generator().manual_seed(4)
    whole = (4 * torch.randn(301, 96, generator=generator)).to(dtype)
    labels = torch.randint(0, real_vocab_size, (301,), generator=generator)
    grad = torch.rand(301, generator=generator)
    columns = 96 // dist.get_world_size()
    first = dist.get_rank() * columns
    logits = whole[:, first : first + columns].clone().requires_grad_()
    real_columns = min(max(real_vocab_size - first, 0), columns)
    loss = BlockedCrossEntropy.apply(logits, labels, first, real_columns, dist.group.WORLD)
    loss.backward(grad)
    exact = whole.double().requires_grad_()
    want = torch.nn.functional.cross_entropy(exact[:, :real_vocab_size], labels, reduction="none")
    want.backward(grad.double())
    grad_error = (logits.grad.double() - exact.grad[:, first : first + columns]).abs().max()
    return (loss.double() - want).abs().max().item(), grad_error.item()


@pytest.mark.parametrize("real_vocab_size", [96, 90, 48, 30])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_cross_entropy_by_blocks_equals_the_formula(ranks, world_size, real_vocab_size):
    for loss_error, grad_error in ranks.run(cross_entropy, "float32", real_vocab_size, world_size=world_size):
        assert loss_error < 1e-5
        assert grad_error < 1e-6


def test_cross_entropy_of_bfloat16_logits(ranks):
    for loss_error, grad_error in ranks.run(cross_entropy, "bfloat16", 90, world_size=2):
        assert loss_error < 1e-5  # log-sum-exp in float32
        assert grad_error < 4e-3  # one rounding to bfloat16
