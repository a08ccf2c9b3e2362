"""From the sources of a training configuration to its samples: megatron-core's ``GPTDataset``, or rows of
conversations.

Invariant: sample ``n`` of a run is fixed by the sources, their weights and the seed: neither the number of
ranks, nor the number of steps, nor how often the run was interrupted has an influence; a single source's
first epoch and a blend's order are those of Megatron-LM. Rank 0 builds the indexes; if that fails, every rank
raises the same error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

from megatron_tokedit.config.sections import DataConfig, SftConfig, TrainingConfig
from megatron_tokedit.dataset.blend_plan import refuse_beyond_cap
from megatron_tokedit.dataset.blend_state import BlendState, resume_blend
from megatron_tokedit.dataset.index_cache import BlendOrder, IndexCache
from megatron_tokedit.dataset.rank_zero import from_rank_zero
from megatron_tokedit.dataset.sft import ConversationRows, RowIndex
from megatron_tokedit.dataset.sources import SourceInfo, prefix_of
from megatron_tokedit.errors import ConfigError
from megatron_tokedit.log import get_logger

__all__ = ["BlendState", "Datasets", "SampleLocation", "TrainBlend", "build_datasets", "resume_blend"]

logger = get_logger(__name__)

_OPEN_EPOCHS = 2
"""Epochs of a source that are kept open: samples are read in order, but by several workers."""


@dataclass(frozen=True, slots=True)
class SampleLocation:
    """Where a sample of a run comes from; a row of conversations also from which documents of the source."""

    source: str
    epoch: int
    sample_in_epoch: int
    documents: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.source}, epoch {self.epoch}, sample {self.sample_in_epoch}"


class TrainBlend(torch.utils.data.Dataset[dict[str, Any]]):
    """The training samples of a run under the run's own numbers, from ``state.start_sample`` on.

    Attributes:
        state: the stretch that the samples belong to; what a checkpoint records.
    """

    def __init__(
        self,
        state: BlendState,
        infos: Mapping[str, SourceInfo],
        num_samples: int,
        order: BlendOrder | None,
        open_epoch: Callable[[SourceInfo, int], GPTDataset | ConversationRows],
    ) -> None:
        """Take the parts; :func:`build_datasets` makes them.

        Args:
            state: the stretch.
            infos: of its sources, by name.
            num_samples: one past the last sample of the run.
            order: of the stretch, where it has several sources.
            open_epoch: opens the indexes of an epoch.
        """
        self.state = state
        self._num_samples = num_samples
        self._order = order
        self._names = list(state.shares)
        self._infos = [infos[name] for name in self._names]
        self._open_epoch = open_epoch
        self._open: dict[tuple[int, int], GPTDataset | ConversationRows] = {}

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int | None) -> Any:
        """The sample; for None a row of the same form that is left out of the loss."""
        number, drawn = self._draw(self._num_samples - 1 if index is None else index)
        epoch, sample = divmod(drawn, self._infos[number].num_samples)
        return self._epoch(number, epoch)[None if index is None else sample]

    def locate(self, sample: int) -> SampleLocation:
        """Where ``sample`` comes from, without reading it."""
        number, drawn = self._draw(sample)
        epoch, row = divmod(drawn, self._infos[number].num_samples)
        documents: tuple[int, ...] = ()
        if self._infos[number].conversations:
            rows = self._epoch(number, epoch)
            assert isinstance(rows, ConversationRows), "conversations come in rows"
            documents = rows.documents(row)
        return SampleLocation(self._names[number], epoch, row, documents)

    def num_positions(self, first: int, end: int) -> int:
        """Positions of the samples from ``first`` to ``end`` that are not padding; those past the last have
        none.
        """
        total = 0
        for sample in range(first, min(end, self._num_samples)):
            number, drawn = self._draw(sample)
            epoch, row = divmod(drawn, self._infos[number].num_samples)
            rows = self._epoch(number, epoch)
            total += (
                rows.num_positions(row)
                if isinstance(rows, ConversationRows)
                else self._infos[number].seq_length
            )
        return total

    def counters_at(self, sample: int) -> dict[str, int]:
        """Samples drawn from each source before ``sample``; sources that are gone keep theirs."""
        counters = dict(self.state.counters)
        for number, name in enumerate(self._names):
            counters[name] += self._draws_before(number, self._offset(sample, last=self._num_samples))
        return counters

    def nth_draw(self, name: str, number: int) -> int | None:
        """The sample that is draw ``number`` of a source; None where it is not of this stretch."""
        offset = number - self.state.counters[name]
        if offset < 0 or name not in self._names:
            return None
        if self._order is not None:
            draws_N = np.flatnonzero(self._order[0] == self._names.index(name))
            offset = int(draws_N[offset]) if offset < len(draws_N) else self._num_samples
        sample = self.state.start_sample + offset
        return sample if sample < self._num_samples else None

    def _offset(self, sample: int, *, last: int) -> int:
        """The place of a sample in the stretch."""
        if not self.state.start_sample <= sample <= last:
            raise IndexError(f"sample {sample}: expected {self.state.start_sample} to {last}")
        return sample - self.state.start_sample

    def _draw(self, sample: int) -> tuple[int, int]:
        """The number of a sample's source, and the number of the draw from it."""
        offset = self._offset(sample, last=self._num_samples - 1)
        number, earlier = 0, offset
        if self._order is not None:
            number, earlier = int(self._order[0][offset]), int(self._order[1][offset])
        return number, self.state.counters[self._names[number]] + earlier

    def _draws_before(self, number: int, offset: int) -> int:
        """Draws of a source among the first ``offset`` samples of the stretch: its last one says it."""
        if self._order is None:
            return offset
        sources_N, earlier_N = self._order
        width = 1024
        while offset > 0:
            start = max(0, offset - width)
            if len(found := np.flatnonzero(sources_N[start:offset] == number)):
                return int(earlier_N[start + found[-1]]) + 1
            offset, width = start, width * 4
        return 0

    def _epoch(self, number: int, epoch: int) -> GPTDataset | ConversationRows:
        """An epoch's dataset; the last few of a source stay open."""
        if (number, epoch) not in self._open:
            mine = [key for key in self._open if key[0] == number]
            for key in mine[: len(mine) + 1 - _OPEN_EPOCHS]:
                del self._open[key]
            self._open[number, epoch] = self._open_epoch(self._infos[number], epoch)
        return self._open[number, epoch]


@dataclass(frozen=True, slots=True)
class Datasets:
    """The datasets of a run: ``train`` under the run's sample numbers, validation one epoch each."""

    train: TrainBlend
    validation: dict[str, GPTDataset | ConversationRows]


@dataclass(frozen=True, slots=True)
class _DatasetTokenizer:
    """What megatron-core's datasets want to know of a tokenizer.

    ``pad`` is an id that no dataset contains: with a real one, megatron-core would leave every token of that
    id out of the loss.
    """

    vocab_size: int
    eod: int
    fingerprint: str
    pad: int = -1

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        return {"eod": self.eod, "fingerprint": self.fingerprint}


def build_datasets(
    data: DataConfig,
    infos: Mapping[str, SourceInfo],
    *,
    num_train_samples: int,
    seq_length: int,
    seed: int,
    tokenizer_spec: Mapping[str, Any],
    cache_dir: str | Path,
    blend_state: BlendState | None = None,
    start_sample: int | None = None,
    training: TrainingConfig | None = None,
    sft: SftConfig | None = None,
) -> Datasets:
    """Build, or load from the cache, the datasets of a run.

    Collective over the world where a process group exists; else this process builds them alone.

    Args:
        data: sources and masking options.
        infos: what :func:`megatron_tokedit.dataset.sources.inspect_sources` found, by prefix.
        num_train_samples: sequences that the run will have drawn when it ends, those of earlier starts
            included.
        seq_length: tokens a sample; one more is read for the labels.
        seed: of the document order and the sample order.
        tokenizer_spec: ``vocab_size``, ``eod`` and ``fingerprint`` of the tokenizer.
        cache_dir: a folder on a file system that all ranks share.
        blend_state: from :func:`resume_blend`; default: that of a new run.
        start_sample: first sample that this start of the run reads; epochs that lie before it are not
            indexed. Default: the first of ``blend_state``.
        training: to name the largest ``train_steps`` where a source has ``max_epochs``.
        sft: of a run of stage ``sft``, whose samples are rows of conversations.

    Raises:
        DataFormatError: rank 0 could not build or write the indexes, or a rank does not see them.
        ConfigError: a source would be drawn for more than its ``max_epochs``, or the seed is not the one that
            the run began with.
    """
    state = _with_seed(blend_state or resume_blend(None, 0, data, infos)[0], seed)
    first = state.start_sample if start_sample is None else start_sample
    by_name = {source.name: infos[prefix_of(source)] for source in data.train}

    def build() -> Datasets:
        cache = _open_cache(Path(cache_dir), data, seq_length, seed, tokenizer_spec, sft)
        blend = _open_blend(cache, state, by_name, num_train_samples)
        refuse_beyond_cap(data, by_name, blend, training)
        _ensure_epochs(cache, blend, by_name, first)
        return Datasets(
            train=blend,
            validation={
                source.name: cache.epoch(infos[prefix_of(source)], 0, Split.valid)
                for source in data.validation
            },
        )

    from_rank_zero(lambda: bool(build()))
    return build()


def _with_seed(state: BlendState, seed: int) -> BlendState:
    """The stretch with its seed.

    Raises:
        ConfigError: it is not the one that the run began with.
    """
    if state.seed not in (None, seed):
        raise ConfigError(
            f"seed: got {seed}, but the samples drawn so far are in the order of seed {state.seed}: others "
            f"would come twice or never; put it back, or start a new run by giving another run_dir"
        )
    return replace(state, seed=seed)


def _open_cache(
    directory: Path,
    data: DataConfig,
    seq_length: int,
    seed: int,
    tokenizer_spec: Mapping[str, Any],
    sft: SftConfig | None,
) -> IndexCache | RowIndex:
    """The indexes of documents, or of conversations."""
    if sft is not None:
        return RowIndex(directory, row_length=seq_length, seed=seed, sft=sft)
    return IndexCache(directory, _dataset_config(data, seq_length, seed, tokenizer_spec))


def _dataset_config(
    data: DataConfig, seq_length: int, seed: int, tokenizer_spec: Mapping[str, Any]
) -> GPTDatasetConfig:
    """megatron-core's settings; the blend in it is only there because it must be."""
    return GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend_per_split=[([prefix_of(source) for source in data.train], None), None, None],
        tokenizer=_DatasetTokenizer(
            tokenizer_spec["vocab_size"], tokenizer_spec["eod"], tokenizer_spec["fingerprint"]
        ),
        reset_position_ids=data.reset_position_ids,
        reset_attention_mask=data.reset_attention_mask,
        eod_mask_loss=data.eod_mask_loss,
        create_attention_mask=data.reset_attention_mask,
        drop_last_partial_validation_sequence=False,
    )


def _open_blend(
    cache: IndexCache | RowIndex, state: BlendState, infos: Mapping[str, SourceInfo], num_samples: int
) -> TrainBlend:
    order = None
    if len(state.shares) > 1:
        order = cache.order([*state.shares.values()], max(0, num_samples - state.start_sample))
    open_epoch = partial(cache.epoch, split=Split.train)  # picklable, for loaders that do not fork
    return TrainBlend(state, infos, num_samples, order, open_epoch)


def _ensure_epochs(
    cache: IndexCache | RowIndex, blend: TrainBlend, infos: Mapping[str, SourceInfo], start_sample: int
) -> None:
    """Have the indexes of all epochs that are read from ``start_sample`` on."""
    started, built = time.perf_counter(), 0
    for name, epochs in _epochs_to_read(blend, infos, start_sample):
        for epoch in epochs:
            built += cache.ensure_epoch(infos[name], epoch, Split.train)
    if built:
        logger.info("built %d epoch indexes in %.1f s", built, time.perf_counter() - started)


def _epochs_to_read(
    blend: TrainBlend, infos: Mapping[str, SourceInfo], start_sample: int
) -> Iterator[tuple[str, range]]:
    first, last = blend.counters_at(start_sample), blend.counters_at(len(blend))
    for name in blend.state.shares:
        samples = infos[name].num_samples
        yield name, range(first[name] // samples, -(-last[name] // samples))
