"""What the data sources of a run hold, before anything is trained on: sizes, tokenizer check, table.

Invariant: a source whose manifest disagrees with the run's tokenizer is never trained on, and all faults of
all sources are in one message.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tokedit.config.raw_sources import preprocessing_of
from megatron_tokedit.config.sections import DataConfig, RunConfig, SourceConfig
from megatron_tokedit.dataset.atomic import sha256_of_file
from megatron_tokedit.dataset.manifest import Manifest, check_compatible, read_manifest
from megatron_tokedit.dataset.reader import IndexedDataset
from megatron_tokedit.errors import DataFormatError, TokeditError
from megatron_tokedit.log import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class SourceInfo:
    """One dataset on disk.

    Attributes:
        prefix: of ``.bin`` and ``.idx``.
        num_documents: documents in it.
        num_tokens: tokens in it.
        identity: what indexes over it are keyed by; changes with its content.
    """

    prefix: str
    num_documents: int
    num_tokens: int
    identity: str


@dataclass(frozen=True, slots=True)
class SourceShare:
    """What a run draws from one training source."""

    name: str
    num_documents: int
    num_tokens: int
    share: float
    drawn_tokens: int

    @property
    def epochs(self) -> float:
        """Passes over the source."""
        return self.drawn_tokens / self.num_tokens


def all_sources(data: DataConfig) -> Iterator[tuple[str, SourceConfig]]:
    """Every source with its place in the configuration (``data.train.0``)."""
    for split, sources in (("train", data.train), ("validation", data.validation)):
        for index, source in enumerate(sources):
            yield f"data.{split}.{index}", source


def dataset_exists(prefix: str) -> bool:
    """Whether ``prefix`` names a dataset (the ``.idx`` file appears last)."""
    return Path(f"{prefix}.idx").is_file() and Path(f"{prefix}.bin").is_file()


def missing_sources(config: RunConfig) -> list[SourceConfig]:
    """The sources with raw ``input`` whose dataset is not there, one a preprocessing job."""
    found: dict[str, SourceConfig] = {}
    for _, source in all_sources(config.data):
        if source.input is not None and not dataset_exists(source.prefix):
            job = preprocessing_of(source, config.tokenizer)
            found.setdefault(job.output_prefix, source)
    return list(found.values())


def inspect_sources(
    data: DataConfig, *, tokenizer_spec: Mapping[str, Any], seq_length: int, require_all: bool = True
) -> dict[str, SourceInfo]:
    """Read the headers of all sources and check them against the tokenizer.

    Args:
        data: the sources.
        tokenizer_spec: of the run's tokenizer (``vocab_size`` and ``fingerprint`` count).
        seq_length: tokens a sample; a source must hold at least one more.
        require_all: without it, a source that has raw ``input`` may still be missing and is left out.

    Returns:
        By prefix.

    Raises:
        DataFormatError: lists every source that is missing, damaged, too small, or of another tokenizer.
    """
    infos: dict[str, SourceInfo] = {}
    faults = []
    for place, source in all_sources(data):
        if not require_all and source.input is not None and not dataset_exists(source.prefix):
            continue
        try:
            infos[source.prefix] = _inspect(source, tokenizer_spec, seq_length)
        except TokeditError as error:
            faults.append(f"{place} ({source.name}): {error}")
    if faults:
        raise DataFormatError("\n  - ".join(["data sources that cannot be used:", *faults]))
    return infos


def _inspect(source: SourceConfig, tokenizer_spec: Mapping[str, Any], seq_length: int) -> SourceInfo:
    if not dataset_exists(source.prefix):
        raise DataFormatError(
            f"{source.prefix}.bin and .idx are not there; make them with tools/preprocess_edit.py, or give "
            f"the source its raw text as `input`"
        )
    dataset = IndexedDataset(source.prefix)
    dataset.refuse_truncated()
    manifest = read_manifest(source.prefix)
    if manifest is None:
        logger.warning(
            "%s has no manifest: whether this run's tokenizer wrote it cannot be checked",
            source.prefix,
        )
    else:
        check_compatible(
            source.prefix,
            manifest,
            tokenizer_fingerprint=tokenizer_spec["fingerprint"],
            vocab_size=tokenizer_spec["vocab_size"],
        )
    if dataset.num_tokens <= seq_length:
        raise DataFormatError(
            f"{source.prefix} holds {dataset.num_tokens} tokens, one sample needs model.seq_length + 1 = "
            f"{seq_length + 1}"
        )
    return SourceInfo(
        source.prefix, dataset.num_documents, dataset.num_tokens, _identity(source.prefix, manifest)
    )


def _identity(prefix: str, manifest: Manifest | None) -> str:
    """The manifest's checksums; without one, the hash of ``.idx`` and the size and time of ``.bin``.

    Raises:
        DataFormatError: the manifest belongs to other files.
    """
    idx_sha256 = sha256_of_file(f"{prefix}.idx")
    if manifest is None:
        stat = Path(f"{prefix}.bin").stat()
        return f"{idx_sha256}:{stat.st_size}:{stat.st_mtime_ns}"
    if manifest.checksums["idx"] != idx_sha256:
        raise DataFormatError(
            f"{prefix}.manifest.json does not belong to {prefix}.idx: one of them was replaced after they "
            f"were made; preprocess again, or remove the manifest if the dataset is meant to be this one"
        )
    return f"{idx_sha256}:{manifest.checksums['bin']}"


def source_shares(
    data: DataConfig, infos: Mapping[str, SourceInfo], *, num_train_samples: int, seq_length: int
) -> list[SourceShare]:
    """What a run of ``num_train_samples`` sequences draws from each training source that is in ``infos``."""
    total_weight = sum(source.weight for source in data.train)
    shares = []
    for source in data.train:
        if info := infos.get(source.prefix):
            share = source.weight / total_weight
            drawn = round(num_train_samples * share) * seq_length
            shares.append(SourceShare(source.name, info.num_documents, info.num_tokens, share, drawn))
    return shares


def format_shares(shares: Sequence[SourceShare]) -> list[str]:
    """The table that is shown before step 1, as lines."""
    rows = [("source", "documents", "tokens", "share", "tokens drawn", "epochs")]
    rows += [
        (
            share.name,
            f"{share.num_documents:,}",
            f"{share.num_tokens:,}",
            f"{share.share:.1%}",
            f"{share.drawn_tokens:,}",
            f"{share.epochs:.2f}",
        )
        for share in shares
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
