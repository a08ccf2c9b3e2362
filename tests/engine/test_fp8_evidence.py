"""What counts as FP8 at work, on modules that carry the state of Transformer Engine's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_tokedit.config.sections import ParallelConfig, PrecisionConfig
from megatron_tokedit.engine.fp8_evidence import evidence_faults, fp8_evidence


class Float8CurrentScaling:
    pass


class TEDelayedScaling:
    pass


DELAYED = TEDelayedScaling()


class Layer(torch.nn.Module):
    """As a linear layer of Transformer Engine after a forward pass."""

    def __init__(self, recipe=None, *, amax=None, in_fp8=False):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4, 4))
        self.layer_norm_weight = torch.nn.Parameter(torch.zeros(4))
        if in_fp8:
            self.weight._quantizer = object()
        self.fp8 = recipe is not None
        self.fp8_meta = {"recipe": recipe}
        if amax is not None:
            self.fp8_meta["scaling_fwd"] = SimpleNamespace(amax_history=torch.tensor([[0.0, amax]]))


class Attention(torch.nn.Module):
    """Transformer Engine's attention has FP8 state too, and no weights."""

    def __init__(self):
        super().__init__()
        self.fp8 = False
        self.fp8_meta = {}


def model(*layers):
    return [torch.nn.Sequential(Attention(), torch.nn.Linear(2, 2), *layers)]


def faults(chunks, recipe, **parallel):
    return evidence_faults(fp8_evidence(chunks), PrecisionConfig(recipe=recipe), ParallelConfig(**parallel))


def test_fp8_at_work():
    layers = [Layer(Float8CurrentScaling(), in_fp8=True) for _ in range(3)]
    found = fp8_evidence(model(*layers))
    assert (found.num_linear, found.num_active, found.num_fp8_weights) == (3, 3, 3)
    assert found.scalings == ("Float8CurrentScaling",)
    assert found.smallest_amax is None
    assert faults(model(*layers), "fp8_tensorwise") == []
    delayed = [Layer(TEDelayedScaling(), amax=2.5), Layer(TEDelayedScaling(), amax=0.5)]
    assert fp8_evidence(model(*delayed)).smallest_amax == 0.5
    assert faults(model(*delayed), "fp8_delayed") == []


@pytest.mark.parametrize(
    ("layers", "recipe", "fault"),
    [
        ([], "fp8_tensorwise", "the model has no linear layer of Transformer Engine"),
        (
            [Layer(), Layer(DELAYED, amax=1.0)],
            "fp8_delayed",
            "1 of 2 linear layers computed in FP8",
        ),
        (
            [Layer(DELAYED, amax=1.0), Layer(DELAYED, amax=0.0)],
            "fp8_delayed",
            "the amax history of a layer is empty",
        ),
        (
            [Layer(DELAYED, amax=1.0)],
            "fp8_blockwise",
            "used TEDelayedScaling, not Float8BlockScaling",
        ),
        ([Layer(Float8CurrentScaling())], "fp8_tensorwise", "no weight is kept in FP8"),
        ([Layer(Float8CurrentScaling())], "bf16", "1 layers computed in FP8 under bf16"),
    ],
)
def test_fp8_that_is_not_at_work(layers, recipe, fault):
    (found,) = faults(model(*layers), recipe)
    assert fault in found


def test_weights_stay_in_bfloat16_without_the_distributed_optimizer():
    chunks = model(Layer(Float8CurrentScaling()))
    assert faults(chunks, "fp8_tensorwise", use_distributed_optimizer=False) == []
    assert faults(model(Layer()), "bf16") == []
