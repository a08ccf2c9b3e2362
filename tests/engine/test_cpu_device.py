"""Each redirect of engine/cpu_device.py, by the call that megatron-core makes."""

from __future__ import annotations

import pytest


def redirected(name):
    import torch

    from megatron_tokedit.engine import cpu_device

    cpu_device.install()
    cpu_device.install()
    CHECKS[name](torch)


def current_device(torch):
    assert torch.zeros(1, device=torch.cuda.current_device()).device.type == "cpu"


def waiting(torch):
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.set_device(0)


def streams(torch):
    stream = torch.cuda.Stream(device=torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.default_stream().wait_stream(stream)
    with torch.cuda.stream(stream):
        stream.synchronize()


def random_states(torch):
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(first, torch.rand(3))
    torch.cuda.random.set_rng_state(torch.cuda.random.get_rng_state(device="cuda"))


def megatron_random_states(torch):
    from megatron.core.tensor_parallel import random

    state = random._get_cuda_rng_state(graph_safe=False)
    first = torch.rand(3)
    random._set_cuda_rng_state(state, graph_safe=False)
    assert torch.equal(first, torch.rand(3))


def random_tracker(torch):
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("a", 1)
    outside = torch.get_rng_state()
    with tracker.fork("a"):
        first = torch.rand(3)
    with tracker.fork("a"):
        second = torch.rand(3)
    assert torch.equal(outside, torch.get_rng_state())
    assert not torch.equal(first, second)


def tensor_cuda(torch):
    tensor = torch.zeros(2)
    assert tensor.cuda() is tensor
    assert tensor.cuda(torch.cuda.current_device()) is tensor


def literals(torch):
    from megatron.core.optimizer import clip_grads, optimizer
    from megatron.core.pipeline_parallel import schedules

    assert optimizer.torch.tensor([1.0], device="cuda").device.type == "cpu"
    assert clip_grads.torch.zeros(1, dtype=torch.int, device="cuda").device.type == "cpu"
    assert schedules.torch.empty((2,), device=torch.device("cuda")).device.type == "cpu"
    assert schedules.torch.ones(1, device="meta").device.type == "meta"
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")  # the real torch is left alone


def type_names(torch):
    from megatron_tokedit.engine import cpu_device

    parameter, tensor = torch.nn.Parameter(torch.zeros(1)), torch.zeros(1)
    assert parameter.type() == "torch.cuda.FloatTensor"
    assert torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16)).type() == "torch.cuda.BFloat16Tensor"
    assert parameter.type(torch.float64).dtype == torch.float64
    assert tensor.type() == "torch.FloatTensor"
    with cpu_device.cuda_type_names():
        assert tensor.type() == "torch.cuda.FloatTensor"
        assert torch.zeros(1, dtype=torch.int64).type() == "torch.LongTensor"
    assert tensor.type() == "torch.FloatTensor"


def honesty(torch):
    assert not torch.cuda.is_available()
    assert torch.cuda.device_count() == 0


CHECKS = {
    function.__name__: function
    for function in (
        current_device, waiting, streams, random_states, megatron_random_states, random_tracker, tensor_cuda,
        literals, type_names, honesty,
    )
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKS)
def test_redirect(ranks, name):
    ranks.run(redirected, name, world_size=1)
