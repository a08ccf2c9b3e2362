from __future__ import annotations

import pytest


def compare(num_query_groups, with_mask, dtype_name):
    """Largest differences of output and gradients from megatron-core's unfused attention."""
    import torch
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_tokedit.config.sections import ParallelConfig, PrecisionConfig
    from megatron_tokedit.engine.initialize import initialize
    from megatron_tokedit.engine.model import transformer_config
    from megatron_tokedit.testing.models import tiny_llama

    dtype = getattr(torch, dtype_name)
    parallel = ParallelConfig()
    ctx = initialize(parallel, seed=1, device="cpu")
    from megatron_tokedit.engine.attention import SdpaCoreAttention

    recipe = PrecisionConfig(recipe="bf16" if dtype == torch.bfloat16 else "fp32")
    config = transformer_config(tiny_llama(num_query_groups=num_query_groups), recipe, parallel, ctx.device)
    generator = torch.Generator().manual_seed(3)
    shapes = [(17, 3, 4, 8), (17, 3, num_query_groups, 8), (17, 3, num_query_groups, 8)]  # [s, b, n or g, d]
    data = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    mask = torch.ones(17, 17).tril()
    if with_mask:
        mask[9:, :9] = 0
    mask = mask[None, None] < 0.5
    results = []
    for kind, attention_mask in (
        (DotProductAttention, mask),
        (SdpaCoreAttention, mask if with_mask else None),
    ):
        inputs = [tensor.clone().requires_grad_() for tensor in data]
        module = kind(config, 1, AttnMaskType.causal, "self")
        output = module(*inputs, attention_mask)
        output.float().pow(2).sum().backward()
        results.append([output.detach()] + [tensor.grad for tensor in inputs])
    return [(a.float() - b.float()).abs().max().item() for a, b in zip(*results, strict=True)]


@pytest.mark.parametrize("with_mask", [False, True], ids=["causal", "masked"])
@pytest.mark.parametrize("num_query_groups", [4, 2, 1])
def test_equals_unfused_attention(ranks, num_query_groups, with_mask):
    (differences,) = ranks.run(compare, num_query_groups, with_mask, "float32", world_size=1)
    assert max(differences) < 2e-5


def test_equals_unfused_attention_in_bfloat16(ranks):
    (differences,) = ranks.run(compare, 2, False, "bfloat16", world_size=1)
    assert max(differences) < 0.15  # gradients reach 20; one bfloat16 step there is 0.125


def dropout_streams():
    """Dropout draws from the tensor-parallel random state: ranks differ, the default state stays."""
    import torch
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_tokedit.config.sections import ParallelConfig, PrecisionConfig
    from megatron_tokedit.engine.initialize import initialize
    from megatron_tokedit.engine.model import transformer_config
    from megatron_tokedit.testing.models import tiny_llama

    parallel = ParallelConfig(tensor_model_parallel_size=2)
    ctx = initialize(parallel, seed=1, device="cpu")
    from megatron_tokedit.engine.attention import SdpaCoreAttention

    config = transformer_config(
        tiny_llama(attention_dropout=0.5), PrecisionConfig(recipe="fp32"), parallel, ctx.device
    )
    module = SdpaCoreAttention(config, 1, AttnMaskType.causal, "self")
    query = torch.ones(16, 1, 2, 8)
    key = torch.ones(16, 1, 1, 8)
    before = torch.get_rng_state()
    output = module(query, key, key, None)
    unchanged = torch.equal(before, torch.get_rng_state())
    without = module.eval()(query, key, key, None)
    return output.sum().item(), unchanged, torch.allclose(without, torch.ones(16, 1, 16))


def test_dropout_uses_the_tensor_parallel_random_state(ranks):
    first, second = ranks.run(dropout_streams, world_size=2)
    assert first[0] != second[0]
    assert first[1:] == second[1:] == (True, True)
