"""From the sources of a training configuration to megatron-core's ``GPTDataset`` and ``BlendedDataset``.

Why not ``BlendedMegatronDatasetBuilder.build``: it keys the index cache by path, so a dataset rebuilt under
the same name would be read through stale indexes; it writes the cache in place; and when rank 0 fails, the
other ranks wait for it until the timeout. The two dataset classes and the sample order are megatron-core's:
the same seed, weights and sizes give the order that Megatron-LM gives.

Invariant: indexes are keyed by the content of a dataset, appear by rename, and are built by rank 0 alone;
if that fails, every rank raises the same error.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch.distributed as dist
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split, normalize

from megatron_tokedit.config.sections import DataConfig, SourceConfig
from megatron_tokedit.dataset.rank_zero import from_rank_zero
from megatron_tokedit.dataset.sources import SourceInfo
from megatron_tokedit.errors import DataFormatError

Dataset: TypeAlias = GPTDataset | BlendedDataset
_Built = TypeVar("_Built", GPTDataset, BlendedDataset)

_SURPLUS = 0.005
"""Extra samples indexed for each source of a blend, as in megatron-core's builder."""


@dataclass(frozen=True, slots=True)
class Datasets:
    """The datasets of a run: ``train`` yields at least the samples asked for, validation one epoch each."""

    train: Dataset
    validation: dict[str, GPTDataset]


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
) -> Datasets:
    """Build, or load from the cache, the datasets of a run.

    Collective over the world; a process group must exist.

    Args:
        data: sources and masking options.
        infos: what :func:`megatron_tokedit.dataset.sources.inspect_sources` found, by prefix.
        num_train_samples: sequences that the run will draw.
        seq_length: tokens a sample; one more is read for the labels.
        seed: of the document order and the sample order.
        tokenizer_spec: ``vocab_size``, ``eod`` and ``fingerprint`` of the tokenizer.
        cache_dir: a folder on a file system that all ranks share.

    Raises:
        DataFormatError: rank 0 could not build or write the indexes, or a rank does not see them.
    """
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend_per_split=[([source.prefix for source in data.train], None), None, None],
        tokenizer=_DatasetTokenizer(
            tokenizer_spec["vocab_size"], tokenizer_spec["eod"], tokenizer_spec["fingerprint"]
        ),
        reset_position_ids=data.reset_position_ids,
        reset_attention_mask=data.reset_attention_mask,
        eod_mask_loss=data.eod_mask_loss,
        create_attention_mask=data.reset_attention_mask,
        drop_last_partial_validation_sequence=False,
        mid_level_dataset_surplus=_SURPLUS,
    )
    cache = _IndexCache(Path(cache_dir), config)

    def build() -> Datasets:
        return Datasets(
            train=_blend(cache, data.train, infos, num_train_samples),
            validation={
                source.name: cache.source(infos[source.prefix], None, Split.valid)
                for source in data.validation
            },
        )

    from_rank_zero(lambda: bool(build()))
    return build()


def _blend(
    cache: _IndexCache, sources: Sequence[SourceConfig], infos: Mapping[str, SourceInfo], num_samples: int
) -> Dataset:
    """The training dataset: one source as it is, several as megatron-core's blend."""
    if len(sources) == 1:
        return cache.source(infos[sources[0].prefix], num_samples, Split.train)
    weights = normalize([source.weight for source in sources])
    targets = [math.ceil(num_samples * weight) for weight in weights]
    datasets = [
        cache.source(infos[source.prefix], math.ceil(target * (1 + _SURPLUS)), Split.train)
        for source, target in zip(sources, targets, strict=True)
    ]
    return cache.blend(datasets, weights, sum(targets))


class _IndexCache:
    """One folder an index, named by a hash of what the index depends on; a folder that exists is complete."""

    def __init__(self, directory: Path, config: GPTDatasetConfig) -> None:
        self.directory = directory
        self.config = config

    def source(self, info: SourceInfo, num_samples: int | None, split: Split) -> GPTDataset:
        """All documents of one dataset; ``num_samples`` None means one epoch."""

        def make(config: GPTDatasetConfig) -> GPTDataset:
            low_level = GPTDataset.build_low_level_dataset(info.prefix, config)
            indices = np.arange(low_level.sequence_lengths.shape[0], dtype=np.int32)
            return GPTDataset(low_level, info.identity, indices, num_samples, split, config)

        return self._load([info.identity, num_samples, split.name], make)

    def blend(self, datasets: list[GPTDataset], weights: list[float], size: int) -> BlendedDataset:
        """A blend of ``size`` samples."""
        description = [[dataset.unique_description for dataset in datasets], weights, size]
        return self._load(description, lambda config: BlendedDataset(datasets, weights, size, config))

    def _load(self, description: list[Any], make: Callable[[GPTDatasetConfig], _Built]) -> _Built:
        """Make a dataset from its cached indexes; rank 0 builds them first where they are missing."""
        config = self.config
        settings = [config.random_seed, config.sequence_length, config.tokenizer.unique_identifiers]
        text = json.dumps([version("megatron-core"), settings, description])
        folder = self.directory / hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        if not folder.is_dir():
            if dist.get_rank() != 0:
                raise DataFormatError(
                    f"{folder}: rank {dist.get_rank()} does not see the index that rank 0 has built; "
                    f"data.cache_dir must be on a file system that all nodes share"
                )
            self._build(folder, make)
        return make(dataclasses.replace(config, path_to_cache=str(folder)))

    def _build(self, folder: Path, make: Callable[[GPTDatasetConfig], object]) -> None:
        """Build in a private folder and rename it; a job that comes second uses the first one's."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            private = Path(tempfile.mkdtemp(prefix=".building-", dir=self.directory))
        except OSError as error:
            raise DataFormatError(
                f"data.cache_dir: {self.directory} cannot be written: {error.strerror}"
            ) from error
        try:
            make(dataclasses.replace(self.config, path_to_cache=str(private)))
            private.chmod(0o755)
            try:
                private.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
        finally:
            shutil.rmtree(private, ignore_errors=True)
