"""Blends give Megatron-LM's samples from an index cache that follows the content; loaders cut them up."""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
from dataclasses import replace
from pathlib import Path

import blend_cases
import numpy as np
import pytest
import torch
from training_cases import SPEC, write_dataset

from megatron_tokedit.config.sections import DataConfig, SourceConfig
from megatron_tokedit.dataset import IndexedDatasetWriter, best_dtype
from megatron_tokedit.dataset.batches import BatchShape, MicrobatchSampler, microbatches
from megatron_tokedit.dataset.blend import resume_blend
from megatron_tokedit.dataset.sources import SourceInfo, format_shares, inspect_sources, source_shares
from megatron_tokedit.errors import DataFormatError
from megatron_tokedit.testing.ranks import RankPool

BLEND = {"first": 3.0, "second": 1.0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate(BLEND):
        write_dataset(tmp_path / name, seed=seed)
    return tmp_path


@pytest.mark.parametrize("names", [BLEND, {"first": 1.0}])
def test_first_epoch_is_megatron_cores(ranks: RankPool, folder: Path, names: dict[str, float]) -> None:
    ours = ranks.run(blend_cases.samples, folder, names, 100, {}, world_size=2)
    theirs = ranks.run(blend_cases.megatron_samples, folder, names, 100, world_size=1)[0]
    assert ours[0]["tokens"] == ours[1]["tokens"] == theirs


def test_validation_sees_every_token_once(ranks: RankPool, folder: Path) -> None:
    result = ranks.run(blend_cases.samples, folder, BLEND, 8, {}, world_size=1)[0]
    infos = inspect_sources(
        blend_cases.data_config(folder, BLEND), tokenizer_spec=SPEC, seq_length=blend_cases.SEQ_LENGTH
    )
    assert result["validation_tokens"] == infos[f"{folder}/first"].num_tokens - 1


def test_cache_is_reused_and_follows_the_content(ranks: RankPool, folder: Path) -> None:
    first = ranks.run(blend_cases.samples, folder, BLEND, 40, {}, world_size=1)[0]
    again = ranks.run(blend_cases.samples, folder, BLEND, 40, {}, world_size=2)[1]
    assert again["files"] == first["files"]
    assert not again["leftovers"]
    write_dataset(folder / "second", seed=5)  # another dataset under the same name
    changed = ranks.run(blend_cases.samples, folder, BLEND, 40, {}, world_size=1)[0]
    assert changed["tokens"] != first["tokens"]
    assert set(first["files"]) < set(changed["files"])


def test_a_failure_on_rank_zero_reaches_all_ranks(ranks: RankPool, folder: Path) -> None:
    messages = ranks.run(blend_cases.build_without_permission, folder, BLEND, world_size=2)
    for message in messages:
        assert "DataFormatError: data.cache_dir: " in message
        assert "cache cannot be written: File exists" in message


def test_a_cache_that_is_not_shared(ranks: RankPool, folder: Path) -> None:
    first, second = ranks.run(blend_cases.build_in_folders_of_their_own, folder, BLEND, world_size=2)
    assert first == "nothing"
    assert "rank 1 does not see the index that rank 0 has built; data.cache_dir must be on" in second


def test_a_bug_on_rank_zero_reaches_all_ranks(ranks: RankPool) -> None:
    messages = ranks.run(blend_cases.bug_on_rank_zero, world_size=2)
    assert messages[0].startswith("ZeroDivisionError")
    assert "TokeditError: rank 0 failed: ZeroDivisionError" in messages[1]


def test_masks(ranks: RankPool, folder: Path) -> None:
    fields = {"eod_mask_loss": True, "reset_position_ids": True, "reset_attention_mask": True}
    first = ranks.run(blend_cases.samples, folder, BLEND, 4, fields, world_size=1)[0]["first"]
    length = blend_cases.SEQ_LENGTH
    assert first["loss_mask"] == [float(token != SPEC["eod"]) for token in first["tokens"]]
    starts = [0]
    for token in first["tokens"][:-1]:
        starts.append(0 if token == SPEC["eod"] else starts[-1] + 1)
    assert first["position_ids"] == starts
    hidden = torch.tensor(first["attention_mask"])[0]
    document = torch.tensor([start == 0 for start in starts]).cumsum(0)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    assert torch.equal(~hidden, causal & (document[:, None] == document[None]))


def test_masks_by_hand(tmp_path: Path) -> None:
    """One sample of six tokens over two documents, 2 is the end of document."""
    with IndexedDatasetWriter(str(tmp_path / "first"), best_dtype(97)) as writer:
        writer.add_document([np.array([5, 6, 2, 7, 8, 9, 2])])
        writer.finalize()
    fields = {"eod_mask_loss": True, "reset_position_ids": True, "reset_attention_mask": True}
    data = blend_cases.data_config(tmp_path, {"first": 1.0}, **fields)
    sample = blend_cases.build(data, tmp_path, 1, seq_length=6).train[0]
    assert sample["tokens"].tolist() == [5, 6, 2, 7, 8, 9]
    assert sample["labels"].tolist() == [6, 2, 7, 8, 9, 2]
    assert sample["loss_mask"].tolist() == [1, 1, 0, 1, 1, 1]  # what follows an end is not to be guessed
    assert sample["position_ids"].tolist() == [0, 1, 2, 0, 1, 2]
    seen = (~sample["attention_mask"][0]).int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1, 1],
    ]


def test_indexes_built_beforehand_serve_any_number_of_ranks(ranks: RankPool, folder: Path) -> None:
    """A process without a process group builds them, as --build-index does; ranks add nothing."""
    blend_cases.build(blend_cases.data_config(folder, BLEND), folder, 300)
    built = {str(path.relative_to(folder)) for path in (folder / "cache").rglob("*.npy")}
    for result in ranks.run(blend_cases.samples, folder, BLEND, 300, {}, world_size=2):
        assert set(result["files"]) == built


def test_jobs_that_build_at_the_same_time(folder: Path) -> None:
    """All get the same samples, and one set of files is left."""
    context = multiprocessing.get_context("fork")
    with context.Pool(3) as pool:
        tokens = pool.map(functools.partial(blend_cases.alone, folder, BLEND), [300] * 3)
    assert tokens[0] == tokens[1] == tokens[2]
    folders = list((folder / "cache").iterdir())
    assert not [path for path in folders if path.name.startswith(".")]
    assert len(folders) == len({path.name for path in folders})


def test_a_killed_build_leaves_nothing_that_is_used(folder: Path) -> None:
    """A half-written private folder, as after kill -9, is not taken for an index."""
    (folder / "cache" / ".building-killed").mkdir(parents=True)
    (folder / "cache" / ".building-killed" / "sources.npy").write_bytes(b"half")
    assert len(blend_cases.alone(folder, BLEND, 20)) == 20
    assert (folder / "cache" / ".building-killed").exists(), "it may be another job's, at work"
    os.utime(folder / "cache" / ".building-killed", (1, 1))
    blend_cases.alone(folder, BLEND, 30)
    assert not (folder / "cache" / ".building-killed").exists()


@pytest.mark.parametrize("seq_length", [1, 7, 16])
def test_sizes_are_known_without_indexes(tmp_path: Path, seq_length: int) -> None:
    """Samples of an epoch are computed from the number of tokens; megatron-core counts the same."""
    random = np.random.default_rng(3)
    for number in range(12):
        prefix = str(tmp_path / f"d{number}")
        with IndexedDatasetWriter(prefix, best_dtype(97)) as writer:
            for length in random.integers(0, 9, size=int(random.integers(4, 20))):
                writer.add_document([random.integers(3, 97, size=length), np.array([2])])
            writer.finalize()
        data = DataConfig(train=[SourceConfig(name="d", prefix=prefix)])
        (info,) = inspect_sources(data, tokenizer_spec=SPEC, seq_length=seq_length).values()
        train = blend_cases.build(data, tmp_path, 2 * info.num_samples, seq_length=seq_length).train
        assert len(train._epoch(0, 0)) == len(train._epoch(0, 1)) == info.num_samples
        assert train.locate(info.num_samples).epoch == 1


def test_loader_workers_read_the_same_over_epochs(folder: Path) -> None:
    train = blend_cases.build(blend_cases.data_config(folder, BLEND), folder, 400).train
    train = pickle.loads(pickle.dumps(train))  # as a worker that is not forked gets it
    read = []
    for num_workers in (0, 2):
        batches = microbatches(
            train, BatchShape(8, 4, 2, 1), start=40, stop=400, vocab_size=97, num_workers=num_workers
        )
        read.append([batch["tokens"].tolist() for batch in batches])
    assert read[0] == read[1]
    assert read[0][0] == [train[sample]["tokens"].tolist() for sample in range(44, 48)]


def test_a_run_that_is_done_has_no_samples_left(folder: Path) -> None:
    data = blend_cases.data_config(folder, BLEND)
    infos = inspect_sources(data, tokenizer_spec=SPEC, seq_length=blend_cases.SEQ_LENGTH)
    state, _ = resume_blend(None, 0, data, infos)
    state = replace(state, start_sample=40)
    train = blend_cases.build(data, folder, 40, blend_state=state, start_sample=40).train
    assert train.counters_at(40) == {"first": 0, "second": 0}


def test_every_sample_is_in_one_place_whatever_the_ranks() -> None:
    for data_parallel in (1, 2, 4):
        by_step: list[set[int | None]] = [set(), set()]
        for rank in range(data_parallel):
            sampler = MicrobatchSampler(BatchShape(8, 2, data_parallel, rank), start=16, stop=32)
            batches = list(sampler)
            assert len(batches) == len(sampler) == 2 * 8 // (2 * data_parallel)
            per_step = len(batches) // 2
            for step in (0, 1):
                rows = [row for batch in batches[step * per_step : (step + 1) * per_step] for row in batch]
                assert not by_step[step] & set(rows)
                by_step[step] |= set(rows)
        assert by_step == [set(range(16, 24)), set(range(24, 32))]


def test_last_validation_batch_is_filled_up() -> None:
    assert list(MicrobatchSampler(BatchShape(4, 2, 1, 0), 0, 5)) == [[0, 1], [2, 3], [4, None], [None, None]]


class Counting(torch.utils.data.Dataset):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(index, index + 3)
        return {"tokens": ids[:-1], "labels": ids[1:]}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loader_reads_and_checks_ids(num_workers: int) -> None:
    shape = BatchShape(2, 2, 1, 0)
    state = torch.get_rng_state()
    batches = microbatches(Counting(), shape, start=2, stop=6, vocab_size=7, num_workers=num_workers)
    assert next(batches)["tokens"].tolist() == [[2, 3], [3, 4]]
    with pytest.raises(DataFormatError, match="token id 7, but the model's vocabulary has 7 ids"):
        next(batches)  # the last label is in no input
    assert torch.equal(torch.get_rng_state(), state), "loaders leave the run's random numbers alone"


def test_table_of_sources() -> None:
    data = DataConfig(
        train=[SourceConfig(name="big", prefix="big", weight=3.0), SourceConfig(name="tiny", prefix="tiny")]
    )
    infos = {
        "big": SourceInfo("big", 1000, 1_000_000, "x", 100),
        "tiny": SourceInfo("tiny", 5, 2_000, "y", 100),
    }
    shares = source_shares(data, infos, num_train_samples=400, seq_length=100)
    assert [(share.share, share.drawn_tokens, share.epochs) for share in shares] == [
        (0.75, 30_000, 0.03),
        (0.25, 10_000, 5.0),
    ]
    assert [line.split() for line in format_shares(shares)][1:] == [
        ["big", "1,000", "1,000,000", "75.0%", "30,000", "0.03"],
        ["tiny", "5", "2,000", "25.0%", "10,000", "5.00"],
    ]
