"""The files of a dataset and the tokenizer of its ids, as the inspection commands need them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tqdm import tqdm

from megatron_tokedit.dataset import Manifest, TokenizerRecord
from megatron_tokedit.dataset.manifest import CHECKSUMMED, DATASET_SUFFIXES
from megatron_tokedit.errors import ConfigError, DataFormatError, TokenizerError
from megatron_tokedit.log import get_logger
from megatron_tokedit.tokenizers import TOKENIZER_TYPES, Tokenizer, load_tokenizer

logger = get_logger(__name__)


def sizes_on_disk(prefix: str) -> dict[str, int]:
    """Suffix -> bytes of the files that are there."""
    return {
        suffix: os.path.getsize(prefix + suffix)
        for suffix in DATASET_SUFFIXES
        if os.path.isfile(prefix + suffix)
    }


def size_on_disk(prefix: str) -> int:
    """Bytes of what a verification reads."""
    sizes = sizes_on_disk(prefix)
    return sum(sizes.get(suffix, 0) for suffix in CHECKSUMMED.values())


@contextmanager
def progress_bar(description: str, total: int, unit: str, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, nothing elsewhere; yields what is to be told of progress."""
    disable = quiet or not sys.stderr.isatty()
    with tqdm(
        total=total, unit=unit, unit_scale=True, desc=description, disable=disable, leave=False, delay=0.5
    ) as bar:

        def advance(number: int) -> None:
            bar.update(number)

        yield advance


def document_indices(asked: Sequence[int] | None, num_documents: int) -> list[int] | None:
    """The documents asked for, counted from 0; negative ones count from the end. None where none is.

    Raises:
        DataFormatError: there is no such document.
    """
    if asked is None:
        return None
    for index in asked:
        if not -num_documents <= index < num_documents:
            raise DataFormatError(
                f"there is no document {index}; there are {num_documents}"
                + (f", numbered 0 to {num_documents - 1}" if num_documents else "")
            )
    return [index % num_documents for index in asked]


def add_tokenizer_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name a tokenizer."""
    parser.add_argument(
        "--tokenizer-type",
        choices=TOKENIZER_TYPES,
        help="default: the manifest's; without any, ids are shown",
    )
    parser.add_argument("--tokenizer-model", metavar="PATH")


def tokenizer_of(arguments: argparse.Namespace, manifest: Manifest | None) -> Tokenizer | None:
    """The tokenizer given on the command line, else the manifest's, else none.

    Raises:
        ConfigError: a type without a model, or the other way round, and no manifest to complete it.
        TokenizerError: the one given cannot be loaded.
    """
    record = manifest.tokenizer if manifest else None
    if arguments.tokenizer_type is None and arguments.tokenizer_model is None:
        return _recorded_tokenizer(record) if record else None
    tokenizer_type = arguments.tokenizer_type or (record and record.type)
    tokenizer_model = arguments.tokenizer_model or (record and record.model)
    if not tokenizer_type or not tokenizer_model:
        raise ConfigError("there is no manifest: give both --tokenizer-type and --tokenizer-model")
    tokenizer = load_tokenizer(tokenizer_type, tokenizer_model)
    if record is not None:
        _warn_of_another(tokenizer, record)
    return tokenizer


def _recorded_tokenizer(record: TokenizerRecord) -> Tokenizer | None:
    """The manifest's tokenizer, if it is still where it was."""
    try:
        tokenizer = load_tokenizer(record.type, record.model)
    except TokenizerError as error:
        logger.warning("showing ids: %s. Say where it is now with --tokenizer-model", error)
        return None
    _warn_of_another(tokenizer, record)
    return tokenizer


def _warn_of_another(tokenizer: Tokenizer, record: TokenizerRecord) -> None:
    if tokenizer.fingerprint != record.fingerprint:
        logger.warning(
            "%s is not the tokenizer that wrote the ids (%s, fingerprint %s): the text may be wrong",
            tokenizer.tokenizer_model,
            record.model,
            record.fingerprint[:12],
        )
