"""Shares of a job: which units each has, and how a Slurm array's task finds its own."""

from __future__ import annotations

import itertools
import multiprocessing
from pathlib import Path

import pytest
from pipeline_cases import settings, write_corpus

from megatron_tokedit.config.preprocess import preprocess_config
from megatron_tokedit.errors import ConfigError
from megatron_tokedit.pipeline import run
from megatron_tokedit.pipeline.placement import WHOLE, Share, array_share
from megatron_tokedit.pipeline.plan import load_plan
from megatron_tokedit.pipeline.prepared import place_output
from megatron_tokedit.pipeline.workdir import WorkDir


@pytest.mark.parametrize("ranks", [(1, 1, 1), (2, 2, 2), (1, 4, 3)])
def test_shares_divide_the_units_whatever_ranks_they_have(ranks: tuple[int, ...]) -> None:
    units = list(range(50))
    taken = []
    for index, world_size in enumerate(ranks):
        share = Share(index, len(ranks))
        mine = []
        for rank in range(world_size):
            first, step = share.placement(rank, world_size)
            mine += units[first::step]
        assert sorted(mine) == [unit for unit in units if share.has(unit)]
        taken += mine
    assert sorted(taken) == units
    assert WHOLE.placement(3, 8) == (3, 8)


@pytest.mark.parametrize(("index", "count"), [(2, 2), (-1, 2), (0, 0)])
def test_a_share_that_is_none(index: int, count: int) -> None:
    with pytest.raises(ConfigError, match="expected I/N"):
        Share(index, count)


def array(index: int, count: int, first: int = 0, last: int | None = None) -> dict[str, str]:
    last = first + count - 1 if last is None else last
    numbers = {"ID": index, "COUNT": count, "MIN": first, "MAX": last}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in numbers.items()}


def test_the_task_of_an_array() -> None:
    assert array_share({}, 16) is None
    assert array_share(array(3, 16), None) == Share(3, 16)
    assert array_share(array(3, 2, first=3, last=7), 16) == Share(3, 16), "failed tasks again"
    for gaps in (array(3, 2, first=3, last=7), array(1, 2, first=1), array(2, 2, last=2)):
        with pytest.raises(ConfigError, match=r"set slurm\.preprocess\.tasks to the size of the whole array"):
            array_share(gaps, None)
    with pytest.raises(ConfigError, match="tasks is 16, so the tasks are 0 to 15; submit with --array=0-15"):
        array_share(array(16, 17), 16)
    with pytest.raises(ConfigError, match="SLURM_ARRAY_TASK_ID='x': expected a whole number"):
        array_share({"SLURM_ARRAY_TASK_ID": "x"}, None)


def test_finished_units_are_counted_by_their_markers(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus.jsonl")
    config = preprocess_config(settings(tmp_path, "out", unit_documents=1))
    workdir = WorkDir(config.output_prefix)
    assert list(workdir.done_units()) == []
    run(config, rank=1, world_size=4, stage="edit")
    assert sorted(workdir.done_units()) == list(range(1, 40, 4))


def _place(folder: str, barrier: multiprocessing.synchronize.Barrier, answers: multiprocessing.Queue) -> None:
    from megatron_tokedit.pipeline import plan

    scan, scans = plan.plan_units, itertools.count()

    def counted(*args, **kwargs):
        next(scans)
        return scan(*args, **kwargs)

    plan.plan_units = counted
    job = preprocess_config(settings(Path(folder), "out") | {"output_prefix": "unplaced"})
    barrier.wait()
    answers.put((place_output(job, f"{folder}/prepared"), next(scans)))


def test_processes_that_look_for_a_place_at_once_read_the_input_once(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus.jsonl", num_documents=4000)
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(6), context.Queue()
    processes = [context.Process(target=_place, args=(str(tmp_path), barrier, answers)) for _ in range(6)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    places = {place for place, _ in found}
    assert len(places) == 1
    assert sum(scans for _, scans in found) == 1
    assert load_plan(WorkDir(places.pop()).plan) is not None
