"""The indexes of megatron-core's ``GPTDataset`` and of its blends, on disk.

Why not ``BlendedMegatronDatasetBuilder.build``: it keys the index cache by path, so a dataset rebuilt under
the same name would be read through stale indexes; it writes the cache in place; and when rank 0 fails, the
other ranks wait for it until the timeout.

Invariant: an index is keyed by what it depends on (a dataset's content, the seed, the sequence length; never
the number of ranks), appears by rename, and is built by rank 0 or by a process without ranks. Any number of
jobs may share a cache.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_tokedit.dataset.sources import SourceInfo
from megatron_tokedit.errors import DataFormatError

_PRIVATE = ".building-"
_ABANDONED_SECONDS = 24 * 3600.0
"""A private folder that nothing was added to for so long is of a build that was killed."""

BlendOrder = tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]
"""For every sample of a stretch: the number of its source, and how many of this source came before it."""


def epoch_seed(seed: int, epoch: int) -> int:
    """Seed of the order of one epoch; that of epoch 0 is ``seed``, so it has Megatron-LM's order."""
    return seed if epoch == 0 else int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


def blend_order(shares: Sequence[float], num_samples: int) -> BlendOrder:
    """megatron-core's order of a blend: always the source that is furthest behind its share.

    The order of the first samples does not depend on how many there are in all. 10 bytes a sample.
    """
    sources_N = np.zeros(num_samples, dtype=np.int16)
    earlier_N = np.zeros(num_samples, dtype=np.int64)
    helpers.build_blending_indices(sources_N, earlier_N, np.array(shares), len(shares), num_samples, False)
    return sources_N, earlier_N


@functools.cache
def _core_version() -> str:
    return version("megatron-core")


class IndexFolders:
    """One folder an index, named by a hash of what the index depends on; a folder that exists is complete."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def order(self, shares: Sequence[float], num_samples: int) -> BlendOrder:
        """:func:`blend_order`, from the cache."""

        def make(folder: Path) -> None:
            sources_N, earlier_N = blend_order(shares, num_samples)
            np.save(folder / "sources.npy", sources_N)
            np.save(folder / "earlier.npy", earlier_N)

        folder, _ = self.ensure(["blend", list(shares), num_samples], make)
        return np.load(folder / "sources.npy", mmap_mode="r"), np.load(folder / "earlier.npy", mmap_mode="r")

    def ensure(self, description: list[Any], make: Callable[[Path], object]) -> tuple[Path, bool]:
        """The folder of an index, and whether it was built now."""
        text = json.dumps([_core_version(), description])
        folder = self.directory / hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        if folder.is_dir():
            return folder, False
        rank = dist.get_rank() if dist.is_initialized() else 0
        if rank != 0:
            raise DataFormatError(
                f"{folder}: rank {rank} does not see the index that rank 0 has built; data.cache_dir must be "
                f"on a file system that all nodes share"
            )
        self._build(folder, make)
        return folder, True

    def _build(self, folder: Path, make: Callable[[Path], object]) -> None:
        """Build in a private folder and rename it; a job that comes second uses the first one's."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._remove_abandoned()
            private = Path(tempfile.mkdtemp(prefix=_PRIVATE, dir=self.directory))
        except OSError as error:
            raise DataFormatError(
                f"data.cache_dir: {self.directory} cannot be written: {error.strerror}"
            ) from error
        try:
            make(private)
            private.chmod(0o755)
            try:
                private.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
        finally:
            shutil.rmtree(private, ignore_errors=True)

    def _remove_abandoned(self) -> None:
        """Remove what killed builds have left."""
        for path in self.directory.glob(f"{_PRIVATE}*"):
            with suppress(FileNotFoundError):  # another job was faster
                if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)


class IndexCache(IndexFolders):
    """The indexes of megatron-core's ``GPTDataset``."""

    def __init__(self, directory: Path, config: GPTDatasetConfig) -> None:
        super().__init__(directory)
        self.config = config
        self._open: dict[str, tuple[IndexedDataset, npt.NDArray[np.int32]]] = {}

    def ensure_epoch(self, info: SourceInfo, epoch: int, split: Split = Split.train) -> bool:
        """Have the index of one epoch of a dataset in the cache; whether it had to be built."""
        return self.ensure(*self._epoch(info, epoch, split))[1]

    def epoch(self, info: SourceInfo, epoch: int, split: Split = Split.train) -> GPTDataset:
        """All samples of one epoch of a dataset; its index is in the cache or gets built."""
        description, make = self._epoch(info, epoch, split)
        return make(self.ensure(description, make)[0])

    def _epoch(
        self, info: SourceInfo, epoch: int, split: Split
    ) -> tuple[list[Any], Callable[[Path], GPTDataset]]:
        """What the index of an epoch depends on, and how to make (or load) it in a folder."""
        config = self.config
        seed = epoch_seed(config.random_seed, epoch)

        def make(folder: Path) -> GPTDataset:
            sequences, numbers = self._sequences(info)
            settings = dataclasses.replace(config, random_seed=seed, path_to_cache=str(folder))
            return GPTDataset(sequences, info.identity, numbers, None, split, settings)

        ids = config.tokenizer.unique_identifiers
        return [info.identity, seed, config.sequence_length, ids, split.name], make

    def _sequences(self, info: SourceInfo) -> tuple[IndexedDataset, npt.NDArray[np.int32]]:
        """A dataset's memory maps and the numbers of its sequences, shared by its epochs."""
        if info.prefix not in self._open:
            sequences = GPTDataset.build_low_level_dataset(info.prefix, self.config)
            numbers = np.arange(sequences.sequence_lengths.shape[0], dtype=np.int32)
            self._open[info.prefix] = sequences, numbers
        return self._open[info.prefix]
