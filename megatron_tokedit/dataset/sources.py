"""What the data sources of a run hold, before anything is trained on: sizes, tokenizer check, table.

Sources are named in messages, tables and checkpoints, and found on disk by prefix.

Invariant: a source whose manifest disagrees with the run's tokenizer is never trained on, and all faults of
all sources are in one message.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tokedit.config.raw_sources import preprocessing_of
from megatron_tokedit.config.sections import DataConfig, RunConfig, SftConfig, SourceConfig
from megatron_tokedit.dataset.atomic import sha256_of_file
from megatron_tokedit.dataset.conversations import ConversationCounts, count_conversations
from megatron_tokedit.dataset.loss_mask import loss_mask_prefix
from megatron_tokedit.dataset.manifest import Manifest, check_compatible, read_manifest
from megatron_tokedit.dataset.reader import IndexedDataset
from megatron_tokedit.dataset.source_table import aligned, conversation_table
from megatron_tokedit.errors import ConfigError, DataFormatError, TokeditError
from megatron_tokedit.log import get_logger

if TYPE_CHECKING:
    from megatron_tokedit.dataset.blend_state import BlendState

logger = get_logger(__name__)


_HASHED_WHOLE_BYTES = 64 << 20
_SAMPLED_BLOCKS, _BLOCK_BYTES = 64, 1 << 20


@dataclass(frozen=True, slots=True)
class SourceInfo:
    """One dataset on disk.

    Attributes:
        prefix: of ``.bin`` and ``.idx``.
        num_documents: documents in it.
        num_tokens: tokens in it.
        identity: what indexes over it are keyed by; changes with its content.
        seq_length: tokens of a sample.
        conversations: what there is to learn in stage ``sft``; None in the other stages.
    """

    prefix: str
    num_documents: int
    num_tokens: int
    identity: str
    seq_length: int
    conversations: ConversationCounts | None = None

    @property
    def num_samples(self) -> int:
        """Training samples in one epoch: rows of conversations, or as many as the tokens fill."""
        if self.conversations is not None:
            return self.conversations.num_rows
        return (self.num_tokens - 1) // self.seq_length


@dataclass(frozen=True, slots=True)
class SourceShare:
    """What a run draws from one training source, as its shares say.

    Attributes:
        name: of the source.
        num_documents: documents in it.
        num_tokens: tokens in it.
        share: of the samples that are still to be drawn.
        drawn_tokens: in all, when the run ends.
        drawn_before_tokens: of them before this start of the run.
        budget_tokens: its token budget.
        max_epochs: its cap.
        conversations: what there is to learn in stage ``sft``.
    """

    name: str
    num_documents: int
    num_tokens: int
    share: float
    drawn_tokens: int
    drawn_before_tokens: int = 0
    budget_tokens: int | None = None
    max_epochs: float | None = None
    conversations: ConversationCounts | None = None

    @property
    def epochs(self) -> float:
        """Passes over the source."""
        if self.conversations is not None:
            return self.drawn_tokens / (self.conversations.num_rows * self.conversations.row_length)
        return self.drawn_tokens / self.num_tokens


def prefix_of(source: SourceConfig) -> str:
    """The prefix of a source whose place is known.

    Raises:
        ConfigError: it is not: the dataset has to be made from ``input`` first.
    """
    if source.prefix is None:
        raise ConfigError(
            f"source {source.name}: has no `prefix` and its dataset was not looked for yet; tools/train.py "
            f"does that, and makes it (--prepare) where it is not there"
        )
    return source.prefix


def asked_shares(
    data: DataConfig, infos: Mapping[str, SourceInfo] | None = None, train_epochs: float | None = None
) -> tuple[dict[str, float], bool]:
    """Weight or token budget of every training source by name, and whether they are budgets.

    In stage ``sft``, where ``infos`` (by prefix) hold conversations, epochs are budgets of whole rows, and
    without epochs and weights every conversation is drawn equally often. Sources that are not in ``infos``
    are left out there.
    """
    known = {source.name: (infos or {}).get(source.prefix or "") for source in data.train}
    rows = {name: info.num_samples for name, info in known.items() if info and info.conversations}
    if rows and not any(source.weight for source in data.train):
        epochs = {source.name: source.epochs or train_epochs for source in data.train}
        row_lengths = {name: info.seq_length for name, info in known.items() if info}
        if not any(epochs.values()):
            return {name: float(count) for name, count in rows.items()}, False
        return {
            name: float(max(1, round((epochs[name] or 1.0) * count)) * row_lengths[name])
            for name, count in rows.items()
        }, True
    by_tokens = any(source.tokens is not None for source in data.train)
    return {
        source.name: float((source.tokens if by_tokens else source.weight) or 1.0) for source in data.train
    }, by_tokens


def domains_of(data: DataConfig) -> dict[str, list[str]]:
    """Domain -> names of its validation sources; only sources that have a domain."""
    domains: dict[str, list[str]] = {}
    for source in data.validation:
        if source.domain is not None:
            domains.setdefault(source.domain, []).append(source.name)
    return domains


def all_sources(data: DataConfig) -> Iterator[tuple[str, SourceConfig]]:
    """Every source with its place in the configuration (``data.train.0``)."""
    for split, sources in (("train", data.train), ("validation", data.validation)):
        for index, source in enumerate(sources):
            yield f"data.{split}.{index}", source


def dataset_exists(prefix: str | None) -> bool:
    """Whether ``prefix`` names a dataset (the ``.idx`` file appears last); not where it is not known yet."""
    return prefix is not None and Path(f"{prefix}.idx").is_file() and Path(f"{prefix}.bin").is_file()


def missing_sources(config: RunConfig) -> list[SourceConfig]:
    """The sources with raw ``input`` whose dataset is not there, one a preprocessing job."""
    found: dict[str, SourceConfig] = {}
    for _, source in all_sources(config.data):
        if source.input is not None and not dataset_exists(source.prefix):
            job = preprocessing_of(source, config.tokenizer)
            found.setdefault(job.model_dump_json() if source.prefix is None else job.output_prefix, source)
    return list(found.values())


def inspect_sources(
    data: DataConfig,
    *,
    tokenizer_spec: Mapping[str, Any],
    seq_length: int,
    require_all: bool = True,
    sft: SftConfig | None = None,
) -> dict[str, SourceInfo]:
    """Read the headers of all sources and check them against the tokenizer.

    Args:
        data: the sources.
        tokenizer_spec: of the run's tokenizer (``vocab_size`` and ``fingerprint`` count).
        seq_length: tokens a sample; a source must hold at least one more.
        require_all: without it, a source that has raw ``input`` may still be missing and is left out.
        sft: of a run of stage ``sft``, whose sources are conversations; None in the other stages.

    Returns:
        By prefix.

    Raises:
        DataFormatError: lists every source that is missing, damaged, too small, or of another tokenizer; or
            that has conversations which cannot be learned from.
    """
    infos: dict[str, SourceInfo] = {}
    faults = []
    for place, source in all_sources(data):
        if not require_all and source.input is not None and not dataset_exists(source.prefix):
            continue
        try:
            infos[prefix_of(source)] = _inspect(prefix_of(source), tokenizer_spec, seq_length, sft)
        except TokeditError as error:
            faults.append(f"{place} ({source.name}): {error}")
    if faults:
        raise DataFormatError("\n  - ".join(["data sources that cannot be used:", *faults]))
    return infos


def _inspect(
    prefix: str, tokenizer_spec: Mapping[str, Any], seq_length: int, sft: SftConfig | None
) -> SourceInfo:
    if not dataset_exists(prefix):
        raise DataFormatError(
            f"{prefix}.bin and .idx are not there; make them with tools/preprocess_edit.py, or give the "
            f"source its raw text as `input`"
        )
    dataset = IndexedDataset(prefix)
    dataset.refuse_truncated()
    manifest = read_manifest(prefix)
    if manifest is None:
        logger.warning(
            "%s has no manifest: whether this run's tokenizer wrote it cannot be checked",
            prefix,
        )
    else:
        check_compatible(
            prefix,
            manifest,
            tokenizer_fingerprint=tokenizer_spec["fingerprint"],
            vocab_size=tokenizer_spec["vocab_size"],
        )
    identity = _identity(prefix, manifest)
    if sft is not None:
        counts = count_conversations(dataset, seq_length, sft)
        identity += f":{_mask_identity(loss_mask_prefix(prefix), manifest)}"
        return SourceInfo(prefix, dataset.num_documents, dataset.num_tokens, identity, seq_length, counts)
    if manifest is not None and manifest.conversation is not None:
        logger.warning(
            "%s holds conversations; outside of stage sft its loss mask is not used, and prompts and the "
            "chat template are learned like the responses",
            prefix,
        )
    if dataset.num_tokens <= seq_length:
        raise DataFormatError(
            f"{prefix} holds {dataset.num_tokens} tokens, one sample needs model.seq_length + 1 = "
            f"{seq_length + 1}"
        )
    return SourceInfo(prefix, dataset.num_documents, dataset.num_tokens, identity, seq_length)


def _identity(prefix: str, manifest: Manifest | None) -> str:
    """The manifest's checksums; without one, the hashes of ``.idx`` and of (a sample of) ``.bin``.

    Raises:
        DataFormatError: the manifest belongs to other files.
    """
    idx_sha256 = sha256_of_file(f"{prefix}.idx")
    if manifest is None:
        return f"{idx_sha256}:{_sampled_sha256(f'{prefix}.bin')}"
    if manifest.checksums["idx"] != idx_sha256:
        raise DataFormatError(
            f"{prefix}.manifest.json does not belong to {prefix}.idx: one of them was replaced after they "
            f"were made; preprocess again, or remove the manifest if the dataset is meant to be this one"
        )
    return f"{idx_sha256}:{manifest.checksums['bin']}"


def _mask_identity(prefix: str, manifest: Manifest | None) -> str:
    """The hashes of a loss mask.

    Raises:
        DataFormatError: the manifest belongs to another mask (told of small ones, which are hashed whole).
    """
    identity = _identity(prefix, None)
    recorded = manifest.checksums.get("loss_mask.bin") if manifest is not None else None
    is_whole = Path(f"{prefix}.bin").stat().st_size <= _HASHED_WHOLE_BYTES
    if recorded is not None and is_whole and not identity.endswith(f":{recorded}"):
        raise DataFormatError(
            f"{prefix}.bin is not the mask that the dataset's manifest names: it was changed or replaced; "
            f"preprocess the conversations again"
        )
    return identity


def _sampled_sha256(path: str) -> str:
    """SHA-256 (hex) over the size and the content of a file; of a large one over blocks spread evenly."""
    size = Path(path).stat().st_size
    if size <= _HASHED_WHOLE_BYTES:
        return sha256_of_file(path)
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for block in range(_SAMPLED_BLOCKS):
            file.seek((size - _BLOCK_BYTES) * block // (_SAMPLED_BLOCKS - 1))
            digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


def source_shares(
    data: DataConfig,
    infos: Mapping[str, SourceInfo],
    *,
    num_train_samples: int,
    seq_length: int,
    state: BlendState | None = None,
    start_sample: int = 0,
    train_epochs: float | None = None,
) -> list[SourceShare]:
    """What a run draws from each training source that is in ``infos``.

    Args:
        data: the sources.
        infos: from :func:`inspect_sources`.
        num_train_samples: sequences that the run will have drawn when it ends.
        seq_length: tokens of a sequence.
        state: from ``resume_blend``, where the run has begun.
        start_sample: sequences that were drawn before.
        train_epochs: of stage ``sft``.
    """
    asked, _ = asked_shares(data, infos, train_epochs)
    total = sum(asked.values())
    shares = {name: value / total for name, value in asked.items()}
    before = dict.fromkeys(asked, 0.0)
    in_all = {name: share * num_train_samples for name, share in shares.items()}
    if state is not None:
        shares = state.shares
        before, in_all = state.expected_at(start_sample), state.expected_at(num_train_samples)
    found = []
    for source in data.train:
        if info := infos.get(source.prefix or ""):
            found.append(
                SourceShare(
                    name=source.name,
                    num_documents=info.num_documents,
                    num_tokens=info.num_tokens,
                    share=shares.get(source.name, 0.0),
                    drawn_tokens=round(in_all[source.name]) * seq_length,
                    drawn_before_tokens=round(before[source.name]) * seq_length,
                    budget_tokens=source.tokens,
                    max_epochs=source.max_epochs,
                    conversations=info.conversations,
                )
            )
    return found


def format_shares(shares: Sequence[SourceShare]) -> list[str]:
    """The table that is shown before step 1, as lines; columns that say nothing are left out."""
    if conversations := [(share, share.conversations) for share in shares if share.conversations]:
        return conversation_table(conversations)
    columns: list[tuple[str, list[str]]] = [
        ("source", [share.name for share in shares]),
        ("documents", [f"{share.num_documents:,}" for share in shares]),
        ("tokens", [f"{share.num_tokens:,}" for share in shares]),
        ("share", [f"{share.share:.1%}" for share in shares]),
    ]
    if any(share.budget_tokens for share in shares):
        columns.append(("budget", [f"{share.budget_tokens or 0:,}" for share in shares]))
    if any(share.drawn_before_tokens for share in shares):
        columns.append(("drawn before", [f"{share.drawn_before_tokens:,}" for share in shares]))
    columns.append(("tokens drawn", [f"{share.drawn_tokens:,}" for share in shares]))
    columns.append(("epochs", [f"{share.epochs:.2f}" for share in shares]))
    if any(share.max_epochs for share in shares):
        columns.append(
            ("at most", [f"{share.max_epochs:g}" if share.max_epochs else "-" for share in shares])
        )
    return aligned(columns) + _budget_lines(shares)


def _budget_lines(shares: Sequence[SourceShare]) -> list[str]:
    """How far the run goes through its token budgets."""
    budget = sum(share.budget_tokens or 0 for share in shares)
    if not budget:
        return []
    drawn = sum(share.drawn_tokens for share in shares)
    beyond = "; training.train_steps goes beyond the budgets" if drawn > budget else ""
    return [f"the run draws {drawn:,} of {budget:,} budgeted tokens ({drawn / budget:.1%}){beyond}"]
