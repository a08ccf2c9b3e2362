from __future__ import annotations

import errno
import resource
import threading

import engine_cases
import pytest
from torch.distributed.checkpoint import filesystem

from megatron_tokedit.config.training import CheckpointConfig
from megatron_tokedit.engine import checkpoint_folder
from megatron_tokedit.engine.checkpoint_shards import check_shards
from megatron_tokedit.errors import CheckpointError
from megatron_tokedit.testing.models import tiny_llama

DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}


def five_and_five(folder, model, layout):
    first = engine_cases.start(model, **layout)
    results = first.steps(5)
    first.save(folder, 5)
    first.ctx.destroy()
    second = engine_cases.start(model, seed=1234, **layout)
    assert second.load(folder)["step"] == 5
    second.skip_batches(5)
    return results + second.steps(5)


@pytest.mark.parametrize(
    ("layout", "world_size"),
    [
        ({}, 1),
        ({"recipe": "bf16"}, 2),
        ({"tp": 2}, 2),
        ({"pp": 2}, 2),
        ({"distributed": False}, 2),
        ({"distributed": False, "recipe": "bf16"}, 1),
    ],
    ids=["one", "bf16-dp2", "tp2", "pp2", "replicated-dp2", "replicated-bf16"],
)
def test_five_and_five_steps_are_ten(ranks, tmp_path, layout, world_size):
    model = tiny_llama(**DROPOUT)
    straight = ranks.run(engine_cases.train_straight, model, 10, world_size=world_size, **layout)
    resumed = ranks.run(five_and_five, tmp_path, model, layout, world_size=world_size)
    assert resumed == straight  # bit for bit: weights, moments, schedule, dropout


def save_three(folder, model):
    run = engine_cases.start(model)
    for step in (1, 2, 3):
        run.steps(1)
        run.save(folder, step, settings=CheckpointConfig(save_interval_steps=1, keep_last=2))


@pytest.fixture(scope="module")
def run_folder(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    ranks.run(save_three, folder, tiny_llama(), world_size=1)
    return folder


def test_keeps_the_newest_and_points_at_it(run_folder):
    names = sorted(entry.name for entry in (run_folder / "checkpoints").iterdir())
    assert names == ["latest", "step_00000002", "step_00000003"]
    assert (run_folder / "checkpoints" / "latest").read_text() == "step_00000003\n"
    newest = run_folder / "checkpoints" / "step_00000003"
    for path in (run_folder, run_folder / "checkpoints", newest):
        assert checkpoint_folder.find_latest(path) == newest


@pytest.mark.parametrize("damage", ["marker", "truncated", "missing"])
def test_skips_incomplete_folders(run_folder, damage):
    newest = run_folder / "checkpoints" / "step_00000003"
    victim = (
        newest
        / {"marker": checkpoint_folder.MARKER, "truncated": "__0_0.distcp", "missing": "common.pt"}[damage]
    )
    content = victim.read_bytes()
    try:
        if damage == "truncated":
            victim.write_bytes(content[:-1])
        else:
            victim.unlink()
        assert checkpoint_folder.find_latest(run_folder).name == "step_00000002"
    finally:
        victim.write_bytes(content)


def test_nothing_there(tmp_path):
    assert checkpoint_folder.find_latest(tmp_path / "none") is None
    with pytest.raises(CheckpointError, match=r"none: does not exist; give a run folder"):
        checkpoint_folder.require(tmp_path / "none")
    with pytest.raises(CheckpointError, match="has no complete checkpoint"):
        checkpoint_folder.require(tmp_path)


def crash_then_save(folder, model):
    """What a killed save leaves behind is no checkpoint, and the next save clears it away."""
    run = engine_cases.start(model)
    run.save(folder, 4)
    (folder / "checkpoints" / "step_00000004").rename(folder / "checkpoints" / "step_00000007.partial")
    before = checkpoint_folder.find_latest(folder)
    run.save(folder, 5)
    run.save(folder, 5)  # the same step again replaces it
    return before, sorted(entry.name for entry in (folder / "checkpoints").iterdir())


def test_killed_save_is_no_checkpoint(ranks, tmp_path):
    ((before, names),) = ranks.run(crash_then_save, tmp_path, tiny_llama(), world_size=1)
    assert before is None
    assert names == ["latest", "step_00000005"]


def save_on_a_full_disk(folder, model):
    """Rank 1 cannot write more than 64 KiB a file when it saves for the second time."""
    run = engine_cases.start(model, tp=2)
    run.save(folder, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if run.ctx.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        run.save(folder, 2)
    except CheckpointError as error:
        return str(error), checkpoint_folder.find_latest(folder).name
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return "saved", None


def test_full_disk_is_an_error_on_every_rank(ranks, tmp_path):
    model = tiny_llama(hidden_size=64)
    for message, latest in ranks.run(save_on_a_full_disk, tmp_path, model, world_size=2):
        assert "step_00000002.partial: cannot be written (rank 1: " in message
        assert "is the disk full?" in message
        assert latest == "step_00000001"


def save_while_a_thread_fails(folder, model):
    """One of the two writing threads cannot write, and the other can; torch says nothing of it."""
    run = engine_cases.start(model)
    run.save(folder, 1)
    write, failed = filesystem._write_item, threading.Event()

    def write_or_fail(*args, **options):
        if threading.current_thread() is not threading.main_thread():
            failed.set()
            raise OSError(errno.ENOSPC, "No space left on device")
        assert failed.wait(20), "the other thread was given nothing to write"
        return write(*args, **options)

    filesystem._write_item = write_or_fail
    try:
        run.save(folder, 2)
    except CheckpointError as error:
        return str(error), checkpoint_folder.find_latest(folder).name
    finally:
        filesystem._write_item = write
    return "saved", None


def test_a_writing_thread_that_fails_is_an_error(ranks, tmp_path):
    ((message, latest),) = ranks.run(save_while_a_thread_fails, tmp_path, tiny_llama(), world_size=1)
    assert "tensors and objects were not written" in message
    assert "is the disk full?" in message
    assert latest == "step_00000001"


def load_other_shape(folder):
    try:
        engine_cases.start(tiny_llama(hidden_size=64)).load(folder)
    except CheckpointError as error:
        return str(error)
    return "loaded"


def test_another_shape_is_refused(ranks, run_folder):
    (message,) = ranks.run(load_other_shape, run_folder, world_size=1)
    assert "does not fit the configured model" in message
    assert "hape mismatch" in message


def resume_with_other_rate(folder):
    run = engine_cases.start(tiny_llama(), lr=5e-3, weight_decay=0.3)
    run.load(folder)
    group = run.optimizer.param_groups[0]
    return group["max_lr"], group["weight_decay"], group["lr"], run.scheduler.num_steps


def test_configured_hyper_parameters_win_over_saved_ones(ranks, run_folder):
    ((max_lr, weight_decay, lr, num_steps),) = ranks.run(resume_with_other_rate, run_folder, world_size=1)
    assert (max_lr, weight_decay, num_steps) == (5e-3, 0.3, 3)
    assert 0.9 * 5e-3 < lr <= 5e-3


def test_a_shard_that_rank_0_does_not_see_is_noticed(ranks, tmp_path):
    ranks.run(engine_cases.train_and_save, tmp_path, tiny_llama(), 1, world_size=2)
    folder = checkpoint_folder.require(tmp_path)
    check_shards(folder)
    shard = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=shard.name):
        check_shards(folder)
    shard.unlink()
    with pytest.raises(CheckpointError, match="1 of"):
        check_shards(folder)
