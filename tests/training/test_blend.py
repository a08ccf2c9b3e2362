"""Blends give Megatron-LM's samples from an index cache that follows the content; loaders cut them up."""

from __future__ import annotations

from pathlib import Path

import blend_cases
import pytest
import torch
from training_cases import SPEC, write_dataset

from megatron_tokedit.config.sections import DataConfig, SourceConfig
from megatron_tokedit.dataset.batches import BatchShape, MicrobatchSampler, microbatches
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
def test_samples_are_megatron_cores(ranks: RankPool, folder: Path, names: dict[str, float]) -> None:
    ours = ranks.run(blend_cases.samples, folder, names, 300, {}, world_size=2)
    theirs = ranks.run(blend_cases.megatron_samples, folder, names, 300, world_size=1)[0]
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
    infos = {"big": SourceInfo("big", 1000, 1_000_000, "x"), "tiny": SourceInfo("tiny", 5, 2_000, "y")}
    shares = source_shares(data, infos, num_train_samples=400, seq_length=100)
    assert [(share.share, share.drawn_tokens, share.epochs) for share in shares] == [
        (0.75, 30_000, 0.03),
        (0.25, 10_000, 5.0),
    ]
    assert [line.split() for line in format_shares(shares)][1:] == [
        ["big", "1,000", "1,000,000", "75.0%", "30,000", "0.03"],
        ["tiny", "5", "2,000", "25.0%", "10,000", "5.00"],
    ]
