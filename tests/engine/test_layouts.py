from __future__ import annotations

import engine_cases
import pytest

from megatron_tokedit.testing.models import tiny_gpt2, tiny_llama

LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2)]
MODELS = {"llama": tiny_llama(), "gpt2": tiny_gpt2()}


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """One checkpoint a family after two steps on one rank, and the two steps that follow it there."""
    folders = {}
    for family, model in MODELS.items():
        folder = tmp_path_factory.mktemp(family)
        ranks.run(engine_cases.train_and_save, folder, model, 2, world_size=1)
        expected = ranks.run(engine_cases.load_and_train, folder, model, 2, world_size=1)[0]
        folders[family] = (folder, expected)
    return folders


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "tp{}pp{}dp{}".format(*layout))
@pytest.mark.parametrize("family", MODELS)
def test_same_weights_same_loss_and_gradient_norm(ranks, saved, family, layout):
    folder, expected = saved[family]
    tp, pp, dp = layout
    results = ranks.run(
        engine_cases.load_and_train, folder, MODELS[family], 2, tp=tp, pp=pp, world_size=tp * pp * dp
    )
    for result in results:
        for got, want in zip(result, expected, strict=True):
            assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("recipe", ["fp32", "bf16"])
def test_optimizer_moves_between_layouts(ranks, tmp_path, recipe):
    model = tiny_llama()
    ranks.run(engine_cases.train_and_save, tmp_path, model, 3, tp=2, recipe=recipe, world_size=4)
    same = ranks.run(engine_cases.load_and_train, tmp_path, model, 3, tp=2, recipe=recipe, world_size=4)
    other = ranks.run(engine_cases.load_and_train, tmp_path, model, 3, pp=2, recipe=recipe, world_size=2)
    tolerance = 1e-5 if recipe == "fp32" else 1e-2
    for got, want in zip(other[0], same[0], strict=True):
        assert got == pytest.approx(want, rel=tolerance)
