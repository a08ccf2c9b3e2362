"""What ``tools/evaluate.py perplexity`` evaluates on: datasets, and text files that each checkpoint's own
tokenizer reads.

Invariant: every checkpoint gets the same documents in the same order, so results can be compared document by
document; a text file is streamed, a batch of documents at a time.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from megatron_tokedit import log
from megatron_tokedit.corpus import BadLine, expand_inputs, plan_units, read_unit
from megatron_tokedit.corpus.inputs import classify
from megatron_tokedit.dataset import IndexedDataset, check_compatible, read_manifest
from megatron_tokedit.dataset.loss_mask import has_loss_mask, open_loss_mask
from megatron_tokedit.dataset.sources import dataset_exists
from megatron_tokedit.errors import ConfigError, DataFormatError, TokenizerError
from megatron_tokedit.tokenizers import Tokenizer, encode_documents, load_tokenizer

if TYPE_CHECKING:
    from megatron_tokedit.evaluation import TextCounts
    from megatron_tokedit.scoring.identity import PriorIdentity

logger = log.get_logger(__name__)

_DOCUMENTS_PER_CALL = 256
Ids = npt.NDArray[np.int32]
Responses = tuple[Ids, npt.NDArray[np.bool_]]


class Domain(ABC):
    """Documents under a name.

    Attributes:
        name: in the tables.
        path: where they are, as given.
        num_tokens: of all documents; None where that depends on the tokenizer.
        is_conversations: the documents are conversations as fine-tuning sees them: nothing stands before
            one but what its template writes.
    """

    name: str
    path: str
    num_tokens: int | None
    is_conversations: bool = False

    @abstractmethod
    def tokenizer_of(self, identity: PriorIdentity, own: Tokenizer | None) -> Tokenizer | None:
        """The tokenizer of the ids that a checkpoint gets; None where it is not known.

        Args:
            identity: of the checkpoint.
            own: the checkpoint's tokenizer; loaded where there are text files.

        Raises:
            TokenizerError: the checkpoint cannot take the ids.
        """

    @abstractmethod
    def documents(self, tokenizer: Tokenizer | None) -> Iterator[Ids | Responses]:
        """The ids of every document, or its ids and which of them count."""

    @property
    @abstractmethod
    def text(self) -> TextCounts | None:
        """Words and bytes of every document; None where they are not known."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """What it is, for the report."""


class DatasetDomain(Domain):
    """An indexed dataset: ids of the tokenizer that its manifest names."""

    def __init__(self, name: str, prefix: str) -> None:
        """Open the dataset.

        Raises:
            DataFormatError: it is missing or damaged.
        """
        self.name, self.path = name, prefix
        self._dataset = IndexedDataset(prefix)
        self._dataset.refuse_truncated()
        self._manifest = read_manifest(prefix)
        self.num_tokens = self._dataset.num_tokens
        self._mask = open_loss_mask(self._dataset) if has_loss_mask(prefix) else None
        self.is_conversations = self._mask is not None

    def tokenizer_of(self, identity: PriorIdentity, own: Tokenizer | None) -> Tokenizer | None:
        """See :class:`Domain`; the checkpoint's own tokenizer is not used."""
        if self._manifest is None:
            logger.warning(
                "%s has no manifest: whether its tokenizer fits %s is not checked, and its words and bytes "
                "are not known",
                self.path,
                identity.path,
            )
            return None
        check_compatible(
            self.path,
            self._manifest,
            tokenizer_fingerprint=identity.tokenizer_fingerprint,
            vocab_size=identity.vocab_size,
        )
        return self._tokenizer

    def documents(self, tokenizer: Tokenizer | None) -> Iterator[Ids | Responses]:
        """See :class:`Domain`; of conversations the tokens of responses count."""
        from megatron_tokedit.evaluation import dataset_documents, dataset_responses

        if self._mask is not None:
            return dataset_responses(self._dataset, self._mask)
        return dataset_documents(self._dataset)

    @cached_property
    def text(self) -> TextCounts | None:
        """See :class:`Domain`; decoded. None of conversations, of which only the responses count."""
        from megatron_tokedit.evaluation import count_texts, dataset_texts

        if self._mask is not None or self._manifest is None or self._tokenizer is None:
            return None
        return count_texts(
            dataset_texts(self._dataset, self._tokenizer, append_eod=self._manifest.append_eod)
        )

    def to_json(self) -> dict[str, Any]:
        """See :class:`Domain`."""
        manifest = self._manifest
        return {
            "domain": self.name,
            "kind": "dataset" if self._mask is None else "conversations",
            "path": self.path,
            "append_eod": manifest and manifest.append_eod,
            "tokenizer": manifest and manifest.tokenizer.model_dump(),
        }

    @cached_property
    def _tokenizer(self) -> Tokenizer | None:
        """The one that the manifest names, if it is still there."""
        assert self._manifest is not None
        record = self._manifest.tokenizer
        try:
            tokenizer = load_tokenizer(record.type, record.model)
        except TokenizerError as error:
            logger.warning("%s: its words and bytes are not known: %s", self.path, error)
            return None
        if tokenizer.fingerprint != record.fingerprint:
            logger.warning(
                "%s: its words and bytes are not known: %s is no more the tokenizer that it was made with",
                self.path,
                record.model,
            )
            return None
        return tokenizer


class TextDomain(Domain):
    """Text files, such as ``tools/preprocess_edit.py`` reads; no end-of-document token is appended."""

    num_tokens = None

    def __init__(self, name: str, path: str, json_key: str) -> None:
        """Scan the files.

        Args:
            name: of the domain.
            path: a file or a glob.
            json_key: key or column of the text.

        Raises:
            DataFormatError: a file is missing, empty, damaged or of an unknown kind.
        """
        self.name, self.path = name, path
        self._key = json_key
        self._files, self._units = plan_units(expand_inputs([path]))

    def tokenizer_of(self, identity: PriorIdentity, own: Tokenizer | None) -> Tokenizer | None:
        """See :class:`Domain`; the checkpoint's own."""
        assert own is not None
        if own.vocab_size > identity.vocab_size:
            raise TokenizerError(
                f"{own.tokenizer_model}: has {own.vocab_size} ids, and the model {identity.path} only "
                f"{identity.vocab_size}; it is not the tokenizer of this model"
            )
        return own

    def documents(self, tokenizer: Tokenizer | None) -> Iterator[Ids]:
        """See :class:`Domain`."""
        assert tokenizer is not None
        texts = self._texts()
        while batch := list(itertools.islice(texts, _DOCUMENTS_PER_CALL)):
            for sequences in encode_documents(tokenizer, batch):
                yield _joined(sequences, tokenizer)

    @cached_property
    def text(self) -> TextCounts:
        """See :class:`Domain`."""
        from megatron_tokedit.evaluation import count_texts

        return count_texts(self._texts())

    def to_json(self) -> dict[str, Any]:
        """See :class:`Domain`."""
        return {
            "domain": self.name,
            "kind": "text",
            "path": self.path,
            "json_key": self._key,
            "files": [file.to_json() for file in self._files],
        }

    def _texts(self) -> Iterator[list[str]]:
        """The sequences of every document.

        Raises:
            DataFormatError: a line that is no document, or a file that changed since it was scanned.
        """
        for unit in self._units:
            for document in read_unit(unit, [self._key], on_bad=_refuse):
                yield document.fields[self._key]


def open_domains(places: dict[str, str], json_key: str) -> list[Domain]:
    """The domains by name: a dataset where the place is a prefix of one, else text files.

    Raises:
        DataFormatError: what is not there or cannot be used.
    """
    return [
        TextDomain(name, place, json_key) if _is_text(place) else DatasetDomain(name, _prefix(place))
        for name, place in places.items()
    ]


def given_domains(pairs: Sequence[str], places: dict[str, str]) -> dict[str, str]:
    """The places by name, and those of ``--data`` added to them.

    Raises:
        ConfigError: a pair that is not NAME=PLACE, or a name given twice.
    """
    places = dict(places)
    for pair in pairs:
        name, equals, place = pair.partition("=")
        if not (name and equals and place):
            raise ConfigError(f"--data {pair}: expected NAME=PREFIX or NAME=FILE")
        if name in places:
            raise ConfigError(f"--data: the name {name!r} is given twice")
        if name == "average":
            raise ConfigError("--data: the name 'average' is that of the last row; give another")
        places[name] = place
    return places


def _is_text(place: str) -> bool:
    """Whether a place is a text file: by its suffix, unless a dataset has that prefix."""
    if dataset_exists(_prefix(place)):
        return False
    try:
        classify(place)
    except DataFormatError:
        return False
    return True


def _prefix(place: str) -> str:
    return place.removesuffix(".bin").removesuffix(".idx")


def _joined(sequences: Sequence[Ids], tokenizer: Tokenizer) -> Ids:
    """One document, with what the tokenizer puts before a text at its beginning only."""
    prefix, suffix = len(tokenizer.prefix_ids), len(tokenizer.suffix_ids)
    parts = [ids[prefix if number else 0 : len(ids) - suffix] for number, ids in enumerate(sequences)]
    return np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, np.int32)


def _refuse(line: BadLine) -> None:
    raise DataFormatError(f"{line}; mend or remove it: what is left out cannot be compared")
