"""Saves in the background and saves that data-parallel ranks share: the same checkpoints, read by either."""

from __future__ import annotations

import multiprocessing
import resource

import engine_cases
import pytest

from megatron_tokedit.config.training import CheckpointConfig
from megatron_tokedit.engine import checkpoint_folder
from megatron_tokedit.errors import CheckpointError
from megatron_tokedit.testing.models import tiny_llama, tiny_model

DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}


def new_background():
    """A background save; the pool's processes are daemons, which may not have the children that it forks."""
    from megatron_tokedit.engine.background_save import BackgroundSave

    multiprocessing.current_process()._config["daemon"] = False
    return BackgroundSave()


def five_and_five(folder, model, layout, *, shared, in_background):
    """As test_checkpoint's, under the given strategies; a background save goes on while a step is made."""
    first = engine_cases.start(model, **layout)
    results = first.steps(5)
    background = new_background() if in_background else None
    first.save(folder, 5, settings=CheckpointConfig(fully_parallel_save=shared), background=background)
    if background is not None:
        assert checkpoint_folder.find_latest(folder) is None or background.finished is not None
        first.steps(1)
        background.wait()
        assert background.finished == checkpoint_folder.find_latest(folder)
    first.ctx.destroy()
    second = engine_cases.start(model, seed=1234, **layout)
    assert second.load(folder, fully_parallel=shared)["step"] == 5
    second.skip_batches(5)
    return results + second.steps(5)


CHUNKS = {"pp": 2, "layout": {"virtual_pipeline_model_parallel_size": 2}}
LAYOUTS = [({}, 1), ({}, 2), ({"pp": 2}, 2), ({"distributed": False, "recipe": "bf16"}, 2), (CHUNKS, 2)]
WAYS = [(True, False), (True, True), (False, True)]
QUICK = {
    (0, (False, True)),
    (1, (True, True)),
    (2, (True, True)),
    (3, (True, False)),
    (4, (False, True)),
}


@pytest.mark.parametrize(
    ("layout", "world_size", "shared", "in_background"),
    [
        pytest.param(*layout, *way, marks=() if (number, way) in QUICK else (pytest.mark.stress,))
        for number, layout in enumerate(LAYOUTS)
        for way in WAYS
    ],
)
def test_five_and_five_steps_are_ten(ranks, tmp_path, layout, world_size, shared, in_background):
    model = tiny_llama(**DROPOUT)
    straight = ranks.run(engine_cases.train_straight, model, 10, world_size=world_size, **layout)
    resumed = ranks.run(
        five_and_five,
        tmp_path,
        model,
        layout,
        shared=shared,
        in_background=in_background,
        world_size=world_size,
    )
    assert resumed == straight


def test_experts_are_saved_in_the_background_and_loaded_by_shared_reading(ranks, tmp_path):
    model, layout = tiny_model("mixtral"), {"layout": {"expert_model_parallel_size": 2}}
    straight = ranks.run(engine_cases.train_straight, model, 10, world_size=2, **layout)
    resumed = ranks.run(five_and_five, tmp_path, model, layout, shared=True, in_background=True, world_size=2)
    assert resumed == straight


def save_both_ways(folder, model):
    run = engine_cases.start(model)
    for name, shared in (("alone", False), ("shared", True)):
        run.save(folder / name, 1, settings=CheckpointConfig(fully_parallel_save=shared))


def test_ranks_share_the_writing(ranks, tmp_path):
    ranks.run(save_both_ways, tmp_path, tiny_llama(hidden_size=64), world_size=2)
    sizes = {
        name: [
            sum(
                file.stat().st_size for file in checkpoint_folder.require(tmp_path / name).glob(f"__{rank}_*")
            )
            for rank in (0, 1)
        ]
        for name in ("alone", "shared")
    }
    assert min(sizes["alone"]) < 0.1 * max(sizes["alone"])
    assert min(sizes["shared"]) > 0.7 * max(sizes["shared"])


def save_four(folder, model):
    run = engine_cases.start(model)
    background = new_background()
    for step in (1, 2, 3, 4, 5):
        run.steps(1)
        settings = CheckpointConfig(save_interval_steps=1, keep_last=1, keep_every_steps=2)
        run.save(folder, step, settings=settings, background=background)
    background.wait()


def test_keeps_the_last_and_every_second(ranks, tmp_path):
    ranks.run(save_four, tmp_path, tiny_llama(), world_size=1)
    names = sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step_00000002", "step_00000004", "step_00000005"]


def save_on_a_full_disk(folder, model):
    """The writer of rank 1 cannot write more than 64 KiB a file."""
    run = engine_cases.start(model, tp=2)
    background = new_background()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if run.ctx.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        run.save(folder, 2, background=background)
        background.wait()
    except CheckpointError as error:
        return str(error), checkpoint_folder.find_latest(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return "saved", None


def test_full_disk_is_an_error_on_every_rank(ranks, tmp_path):
    results = ranks.run(save_on_a_full_disk, tmp_path, tiny_llama(hidden_size=64), world_size=2)
    for message, latest in results:
        assert "step_00000002.partial: cannot be written" in message
        assert latest is None
    assert "rank 1: " in results[0][0]
