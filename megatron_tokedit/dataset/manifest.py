"""The manifest beside a dataset: what it was made from, with what, and what its files' checksums are.

Invariant: equal jobs write equal manifests (no times, no host names), and a dataset that has one can be
checked against a tokenizer or a model before a single token is read. The file holds a checksum of itself, so
that ``verify`` finds a changed byte here too; reading does not insist on it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import orjson
from pydantic import ValidationError

from megatron_tokedit.config.base import Section
from megatron_tokedit.dataset.atomic import atomic_write_bytes
from megatron_tokedit.dataset.journal_format import JOURNAL_SUFFIX
from megatron_tokedit.dataset.loss_mask import LOSS_MASK_SUFFIXES
from megatron_tokedit.errors import DataFormatError, TokenizerError

MANIFEST_SUFFIX = ".manifest.json"
MAX_INPUT_RECORDS = 1000
"""Input files that a manifest lists one by one."""
STATISTICS_SUFFIX = ".stats.json"
DATASET_SUFFIXES = (
    ".bin",
    ".idx",
    JOURNAL_SUFFIX,
    *LOSS_MASK_SUFFIXES,
    STATISTICS_SUFFIX,
    MANIFEST_SUFFIX,
)
"""Of all files that make up a dataset; all but the first two need not be there."""
CHECKSUMMED = {
    "bin": ".bin",
    "idx": ".idx",
    "edits": JOURNAL_SUFFIX,
    "loss_mask.bin": LOSS_MASK_SUFFIXES[0],
    "loss_mask.idx": LOSS_MASK_SUFFIXES[1],
}
"""Name of a file in a manifest's checksums -> its suffix."""
_CHECKSUM_KEY = "manifest_sha256"
_CHECKSUM = re.compile(rb'"manifest_sha256": "([0-9a-f]{64})"')
_NO_CHECKSUM = "0" * 64


class InputRecord(Section):
    """One input file of a dataset."""

    path: str
    """As given."""
    format: str
    """``jsonl``, ``text_lines``, ``text_separated`` or ``parquet``."""
    num_bytes: int
    """Size on disk."""
    sha256: str
    num_documents: int


class OmittedInputs(Section):
    """What is left of the input files beyond the first :data:`MAX_INPUT_RECORDS`."""

    num_files: int
    num_bytes: int
    num_documents: int
    sha256: str
    """SHA-256 (hex) over their records, or, of merged datasets, over those of the parts."""


class TokenizerRecord(Section):
    """The tokenizer that the ids in ``.bin`` belong to."""

    type: str
    """``SentencePieceTokenizer`` or ``HuggingFaceTokenizer``."""
    model: str
    """Path or name, as given."""
    vocab_size: int
    eod: int
    fingerprint: str


class ConversationRecord(Section):
    """How the conversations of a dataset for supervised fine-tuning were rendered."""

    chat_template: str
    """The Jinja text of the template; a chat with a model trained on the dataset must use it."""
    chat_template_name: str
    """``tokenizer``, the name of one that is shipped, or the file it was read from."""
    format: str
    """Layout of the records: ``messages``, ``sharegpt``, ...; ``auto``: told record by record."""
    keys: dict[str, str] | None = None
    """Part of a conversation -> the key it was read from, where keys were given."""
    max_tokens: int | None = None
    """Longest conversation; none: no bound."""
    too_long: str = "drop"
    """What became of a longer one: ``drop``, or ``truncate`` by whole turns from the left."""


class Manifest(Section):
    """Identity of a dataset."""

    format_version: int = 1
    """Version of this manifest's fields."""
    versions: dict[str, str]
    """Package -> version, of everything that may change the bytes."""
    inputs: list[InputRecord]
    """Input files, in order; the first of them where there are many."""
    omitted_inputs: OmittedInputs | None = None
    """The other input files."""
    json_key: str
    """The JSON key (or column) the text was taken from."""
    tokenizer: TokenizerRecord
    prior_tokenizer: TokenizerRecord | None = None
    """The prior's tokenizer, where it differs: the edited text was decoded with it and encoded again."""
    append_eod: bool
    """Whether every document ends with the tokenizer's end-of-document id."""
    special_tokens_in_text: str = "encode"
    """What became of text that spells a control token: ``encode``, ``split``; ``error``: there was none."""
    dtype: str
    """``uint16`` or ``int32``."""
    seed: int | None = None
    """Seed of the edit; none where nothing was edited."""
    edit: dict[str, Any] | None = None
    """Every edit setting; none where nothing was edited; ``{"parts": [...]}`` with the settings of each where
    parts that were edited differently were merged."""
    conversation: ConversationRecord | None = None
    """Of a dataset of conversations, which has a loss mask beside it."""
    prior: dict[str, Any] | None = None
    """Path, backend, dtype, windows and fingerprint of the prior; none where nothing was edited."""
    counts: dict[str, int]
    """``num_documents``, ``num_sequences`` and ``num_tokens`` of the dataset, and what else was counted."""
    checksums: dict[str, str]
    """Name of a file (:data:`CHECKSUMMED`) -> its SHA-256 (hex)."""

    @property
    def num_input_files(self) -> int:
        """Input files, the omitted ones included."""
        return len(self.inputs) + (self.omitted_inputs.num_files if self.omitted_inputs else 0)

    @property
    def num_input_bytes(self) -> int:
        """Their size on disk."""
        omitted = self.omitted_inputs.num_bytes if self.omitted_inputs else 0
        return sum(record.num_bytes for record in self.inputs) + omitted


def shorten_inputs(
    records: Iterable[InputRecord], omitted: Iterable[OmittedInputs] = ()
) -> tuple[list[InputRecord], OmittedInputs | None]:
    """``inputs`` and ``omitted_inputs`` of a manifest, in memory that does not grow with the files.

    Args:
        records: of all input files, in order.
        omitted: of the parts that are merged.
    """
    kept: list[InputRecord] = []
    totals = dict.fromkeys(("num_files", "num_bytes", "num_documents"), 0)
    digest = hashlib.sha256()
    for record in records:
        if len(kept) < MAX_INPUT_RECORDS:
            kept.append(record)
            continue
        totals["num_files"] += 1
        totals["num_bytes"] += record.num_bytes
        totals["num_documents"] += record.num_documents
        digest.update(record.model_dump_json().encode() + b"\n")
    for part in omitted:
        for name in totals:
            totals[name] += getattr(part, name)
        digest.update(part.model_dump_json().encode() + b"\n")
    return kept, OmittedInputs(**totals, sha256=digest.hexdigest()) if totals["num_files"] else None


def write_manifest(prefix: str, manifest: Manifest) -> None:
    """Write ``PREFIX.manifest.json``, by rename, keys sorted.

    Its ``manifest_sha256`` is the SHA-256 of the file with 64 zeros in this place.
    """
    fields = manifest.model_dump(mode="json") | {_CHECKSUM_KEY: _NO_CHECKSUM}
    if manifest.conversation is None:
        del fields["conversation"]
    data = orjson.dumps(fields, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS) + b"\n"
    (match,) = _CHECKSUM.finditer(data)
    digest = hashlib.sha256(data).hexdigest().encode()
    atomic_write_bytes(f"{prefix}{MANIFEST_SUFFIX}", data[: match.start(1)] + digest + data[match.end(1) :])


def read_manifest(prefix: str) -> Manifest | None:
    """Read ``PREFIX.manifest.json``; ``None`` where there is none, as beside Megatron-LM's own datasets.

    Raises:
        DataFormatError: it is there, but unreadable or not a manifest.
    """
    path = Path(f"{prefix}{MANIFEST_SUFFIX}")
    try:
        fields = orjson.loads(path.read_bytes())
        if isinstance(fields, dict):
            fields.pop(_CHECKSUM_KEY, None)
        return Manifest.model_validate(fields)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataFormatError(f"{path}: cannot be read: {error.strerror}") from error
    except orjson.JSONDecodeError as error:
        raise DataFormatError(f"{path}: is not valid JSON: {error}; preprocess the dataset again") from error
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise DataFormatError(f"{path}: is not a manifest of this version: {faults}") from error


def manifest_is_as_written(prefix: str) -> bool:
    """Whether ``PREFIX.manifest.json`` still has the bytes that were written.

    Only for one that :func:`read_manifest` can read. Manifests of earlier versions have no checksum and pass.
    """
    data = Path(f"{prefix}{MANIFEST_SUFFIX}").read_bytes()
    if _CHECKSUM_KEY not in orjson.loads(data):
        return True
    match = _CHECKSUM.search(data)
    if match is None:
        return False
    blanked = data[: match.start(1)] + _NO_CHECKSUM.encode() + data[match.end(1) :]
    return hashlib.sha256(blanked).hexdigest().encode() == match[1]


def refuse_existing(prefix: str) -> None:
    """Refuse an output of which any file is there already.

    Raises:
        DataFormatError: naming the files.
    """
    found = [prefix + suffix for suffix in DATASET_SUFFIXES if os.path.lexists(prefix + suffix)]
    if found:
        raise DataFormatError(
            f"{', '.join(found)}: there already, and nothing is overwritten; "
            "choose another output prefix, or remove them first"
        )


def check_compatible(
    prefix: str,
    manifest: Manifest,
    *,
    tokenizer_fingerprint: str | None = None,
    vocab_size: int | None = None,
) -> None:
    """Refuse a dataset that does not fit a tokenizer or a model.

    Args:
        prefix: of the dataset, for the message.
        manifest: the dataset's.
        tokenizer_fingerprint: of the tokenizer the ids must belong to; ``None`` skips the check.
        vocab_size: of the model; it must hold every id of the dataset's tokenizer. ``None`` skips the check.

    Raises:
        TokenizerError: with every disagreement.
    """
    tokenizer = manifest.tokenizer
    faults = []
    if tokenizer_fingerprint is not None and tokenizer_fingerprint != tokenizer.fingerprint:
        faults.append(
            f"its ids are of {tokenizer.type} {tokenizer.model}, fingerprint {tokenizer.fingerprint[:12]}; "
            f"the tokenizer in use has fingerprint {tokenizer_fingerprint[:12]}"
        )
    if vocab_size is not None and vocab_size < tokenizer.vocab_size:
        faults.append(
            f"its tokenizer has {tokenizer.vocab_size} ids, the model's vocabulary only {vocab_size}"
        )
    if faults:
        raise TokenizerError(
            f"dataset {prefix} does not fit: {'; '.join(faults)}. "
            "Preprocess the corpus with the tokenizer of the model, or train a model for this tokenizer"
        )
