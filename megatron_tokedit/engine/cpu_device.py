"""Lets megatron-core, which knows CUDA only, run on a machine without a CUDA device.

Three kinds of places are redirected, each as narrowly as it can be, so that no operation of a step pays for
it:

- functions of ``torch.cuda`` that would raise here anyway (``current_device``, ``synchronize``, streams,
  random state) are replaced for the process;
- ``device="cuda"`` literals: the few megatron-core modules that write them get, as their global name
  ``torch``, a copy of the torch namespace whose factory functions turn "cuda" into "cpu". The real ``torch``
  module stays as it is, and so does every other library;
- ``Tensor.type()`` of parameters and gradients, which the optimizers compare with "torch.cuda.FloatTensor":
  parameters answer so always, plain tensors only inside :func:`cuda_type_names`.

Invariant: :func:`install` does nothing where a CUDA device exists, may be called any number of times, and
leaves ``torch.cuda.is_available()`` false.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

_LITERAL_MODULES = (
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.tensor_parallel.data",
    "megatron.core.transformer.moe.moe_utils",
    "megatron.core.transformer.utils",
    "megatron.core.utils",
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
)
"""Modules of megatron-core 0.16 that write ``device="cuda"`` where a CPU run passes."""

_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "zeros_like", "ones_like", "empty_like")

_CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}

_installed = False


class NullStream:
    """Stands for a CUDA stream; everything is already synchronous."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __enter__(self) -> NullStream:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def wait_stream(self, stream: object) -> None:
        """Nothing to wait for."""


def _current_device() -> torch.device:
    return torch.device("cpu")


def _get_rng_state(*args: object, **kwargs: object) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, *args: object, **kwargs: object) -> None:
    torch.set_rng_state(new_state)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``factory`` with the device ``"cuda"`` read as ``"cpu"``."""

    @functools.wraps(factory)
    def redirected(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs and str(kwargs["device"]).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return redirected


def _torch_on_cpu() -> types.ModuleType:
    """A copy of torch's namespace whose factory functions read "cuda" as "cpu"."""
    copy = types.ModuleType("torch", "torch, with device='cuda' read as 'cpu'")
    copy.__dict__.update(torch.__dict__)
    copy.__getattr__ = lambda name: getattr(torch, name)  # type: ignore[method-assign]
    for name in _FACTORIES:
        setattr(copy, name, _on_cpu(getattr(torch, name)))
    return copy


def _parameter_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if args or kwargs:
        return torch.Tensor.type(self, *args, **kwargs)
    return _CUDA_TYPE_NAMES.get(self.dtype) or torch.Tensor.type(self)


@contextlib.contextmanager
def cuda_type_names() -> Iterator[None]:
    """Within it, ``Tensor.type()`` names CPU tensors as CUDA ones; a no-op where a CUDA device exists.

    The optimizers need it while they are built and while they clip gradients.
    """
    if not _installed:
        yield
        return
    original = torch.Tensor.type

    def named(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original(self, *args, **kwargs)
        return _CUDA_TYPE_NAMES.get(self.dtype) or original(self)

    torch.Tensor.type = named  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.Tensor.type = original  # type: ignore[method-assign]


def _redirect_torch_cuda() -> None:
    """Every name gets a function of its own: torch's compiler refuses one object under two names."""
    cuda: Any = torch.cuda
    cuda.current_device = _current_device
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.empty_cache = lambda: None
    cuda.set_device = lambda device: None
    cuda.Stream = NullStream
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.current_stream = lambda *args, **kwargs: NullStream()
    cuda.default_stream = lambda *args, **kwargs: NullStream()
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    cuda.get_rng_state = cuda.random.get_rng_state = _get_rng_state
    cuda.set_rng_state = cuda.random.set_rng_state = _set_rng_state
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def _redirect_megatron() -> None:
    namespace = _torch_on_cpu()
    for name in _LITERAL_MODULES:
        module: Any = importlib.import_module(name)
        module.torch = namespace
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = _get_rng_state
    random._set_cuda_rng_state = _set_rng_state
    random.CudaRNGStatesTracker = _cpu_rng_tracker(random.CudaRNGStatesTracker)


def _cpu_rng_tracker(tracker_class: Any) -> Any:
    """megatron-core's tracker of named random states over torch's CPU generator.

    ``fork`` is restated because megatron-core's compares the CPU generator before and after, to warn of its
    use inside a CUDA region; here it is the one that is meant to be used.
    """

    class CpuRNGStatesTracker(tracker_class):
        @contextlib.contextmanager
        def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
            outer = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer)

    return CpuRNGStatesTracker


def install() -> None:
    """Redirect, once, and only where there is no CUDA device."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _redirect_megatron()  # first: importing it loads torch's compiler, which must see the real torch.cuda
    _redirect_torch_cuda()
    torch.nn.Parameter.type = _parameter_type  # type: ignore[method-assign,assignment]
    _installed = True
