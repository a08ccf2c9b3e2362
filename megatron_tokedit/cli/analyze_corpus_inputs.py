"""From the arguments of ``tools/analyze_corpus.py`` to corpora, tokenizer, prior and pairs that fit together.

Invariant: what does not fit together is refused here, before any text is counted.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tokedit import log
from megatron_tokedit.analysis.sources import (
    JOURNAL_SUFFIX,
    Corpus,
    is_indexed,
    open_indexed,
    open_raw,
    prefix_of,
)
from megatron_tokedit.analysis.worker import PriorChoice, TokenizerChoice
from megatron_tokedit.dataset import Manifest, check_compatible, read_manifest
from megatron_tokedit.errors import ConfigError, TokenizerError
from megatron_tokedit.tokenizers import Tokenizer

if TYPE_CHECKING:
    from megatron_tokedit.scoring.identity import PriorIdentity

logger = log.get_logger(__name__)
_ORIGINAL = "{} (original)"


def open_corpora(inputs: Sequence[str], json_keys: Sequence[str], *, with_originals: bool) -> list[Corpus]:
    """Open the corpora of ``--input``; before an edited one its original, where a journal gives it back.

    Raises:
        ConfigError: an argument that is not NAME=PATH, or names that clash.
        DataFormatError: a corpus that cannot be read.
    """
    paths: dict[str, list[str]] = {}
    for argument in inputs:
        name, equals, path = argument.partition("=")
        if not (name and equals and path):
            raise ConfigError(f"--input {argument}: expected NAME=FILE_OR_PREFIX")
        paths.setdefault(name, []).append(path)
    keys = _keys(json_keys, list(paths))
    corpora: list[Corpus] = []
    for name, files in paths.items():
        indexed = [path for path in files if is_indexed(path)]
        if not indexed:
            corpora.append(open_raw(name, files, keys.get(name, keys[""])))
            continue
        if len(files) > 1:
            raise ConfigError(
                f"--input {name}: is given {len(files)} times, and {indexed[0]} is an indexed dataset; join "
                "datasets with tools/inspect_dataset.py merge, or give each a name of its own"
            )
        prefix = prefix_of(files[0])
        original = _ORIGINAL.format(name)
        if with_originals and os.path.isfile(prefix + JOURNAL_SUFFIX) and original not in paths:
            corpora.append(open_indexed(original, prefix, original_of=name))
        corpora.append(open_indexed(name, prefix))
    return corpora


def _keys(arguments: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """JSON key by corpus; that of all others under the empty name."""
    keys = {"": "text"}
    for argument in arguments:
        name, equals, key = argument.rpartition("=")
        if equals and name not in names:
            raise ConfigError(f"--json-key {argument}: there is no --input {name}")
        keys[name] = key
    return keys


def find_pairs(arguments: Sequence[str], corpora: Sequence[Corpus]) -> tuple[tuple[str, str], ...]:
    """(edited, original) of ``--pair``, and of every original that a journal gave back.

    Raises:
        ConfigError: a pair that names no corpus.
    """
    names = [corpus.name for corpus in corpora]
    pairs = [(corpus.original_of, corpus.name) for corpus in corpora if corpus.original_of]
    for argument in arguments:
        edited, original = named_pair("--pair", argument, names)
        pairs.append((edited, original))
    return tuple(pairs)


def named_pair(flag: str, argument: str, names: Sequence[str]) -> tuple[str, str]:
    """The two corpora of NAME=NAME.

    Raises:
        ConfigError: it is none, or names no corpus.
    """
    first, equals, second = argument.partition("=")
    for name in (first, second):
        if not equals or name not in names:
            raise ConfigError(
                f"{flag} {argument}: expected two names of --input with = between them; there are "
                f"{', '.join(names)}"
            )
    if first == second:
        raise ConfigError(f"{flag} {argument}: names one corpus twice")
    return first, second


def choose_tokenizer(arguments: argparse.Namespace, corpora: Sequence[Corpus]) -> TokenizerChoice:
    """``--tokenizer-type`` and ``--tokenizer-model``; else what a manifest names; else the prior's own.

    Raises:
        ConfigError: none of them is there.
    """
    if (arguments.tokenizer_type is None) != (arguments.tokenizer_model is None):
        raise ConfigError("give --tokenizer-type and --tokenizer-model together")
    if arguments.tokenizer_type is not None:
        return TokenizerChoice(arguments.tokenizer_type, arguments.tokenizer_model)
    for corpus in corpora:
        if (manifest := _manifest(corpus)) is not None:
            logger.info("tokenizer of %s: %s", corpus.name, manifest.tokenizer.model)
            return TokenizerChoice(manifest.tokenizer.type, manifest.tokenizer.model)
    own = own_tokenizer(arguments.prior) if arguments.prior else None
    if own is None:
        raise ConfigError("give --tokenizer-type and --tokenizer-model: in whose tokens is to be counted?")
    return own


def check_tokenizer(corpora: Sequence[Corpus], tokenizer: Tokenizer) -> None:
    """Refuse indexed corpora of another tokenizer; warn of those whose tokenizer is not known.

    Raises:
        TokenizerError: the ids of a corpus are another tokenizer's.
    """
    for corpus in corpora:
        if corpus.kind != "indexed":
            continue
        if (manifest := _manifest(corpus)) is None:
            logger.warning(
                "%s has no manifest: that its ids are of %s is not checked",
                corpus.paths[0],
                tokenizer.tokenizer_model,
            )
        else:
            check_compatible(corpus.paths[0], manifest, tokenizer_fingerprint=tokenizer.fingerprint)


def _manifest(corpus: Corpus) -> Manifest | None:
    return None if corpus.kind == "raw" else read_manifest(corpus.paths[0])


def own_tokenizer(prior: str) -> TokenizerChoice | None:
    """The tokenizer in a prior's folder; None: there is none."""
    folder = Path(prior)
    if (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file():
        return TokenizerChoice("HuggingFaceTokenizer", prior)
    if (folder / "tokenizer.model").is_file():
        return TokenizerChoice("SentencePieceTokenizer", prior)
    return None


def choose_prior(
    arguments: argparse.Namespace, choice: TokenizerChoice, tokenizer: Tokenizer
) -> PriorChoice | None:
    """The prior of ``--prior``, its tokenizer and its windows; None: none is asked for.

    Its tokenizer: that of ``--prior-tokenizer-*``; else the one of the corpora, where it is the prior's by
    its fingerprint or lies in the prior's folder; else the one in the prior's folder.

    Raises:
        TokeditError: a prior that cannot be used, or that does not fit its tokenizer.
    """
    if arguments.prior is None:
        return None
    # imported here: it imports torch, which an analysis without a prior does not need
    from megatron_tokedit.scoring.load import check_dtype, identify_prior, resolve_device, scoring_options

    device = resolve_device(arguments.prior_device).type
    identity = identify_prior(arguments.prior, arguments.prior_backend)
    check_dtype(identity, arguments.prior_dtype)
    prior_choice = _prior_tokenizer(arguments, identity, choice, tokenizer)
    loaded = tokenizer if prior_choice == choice else prior_choice.load()
    _check_prior(identity, loaded)
    start_id = identity.start_id
    if start_id is None and loaded.prepends_bos:
        start_id = loaded.bos
    options = scoring_options(
        identity,
        start_id=None if start_id in loaded.prefix_ids else start_id,
        context_tokens=arguments.prior_context,
        overlap_tokens=arguments.prior_overlap,
        batch_tokens=arguments.prior_batch_tokens,
        logits_bytes=arguments.prior_logits_bytes,
    )
    return PriorChoice(identity, options, prior_choice, arguments.prior_dtype, device)


def _prior_tokenizer(
    arguments: argparse.Namespace, identity: PriorIdentity, choice: TokenizerChoice, tokenizer: Tokenizer
) -> TokenizerChoice:
    if (arguments.prior_tokenizer_type is None) != (arguments.prior_tokenizer_model is None):
        raise ConfigError("give --prior-tokenizer-type and --prior-tokenizer-model together")
    if arguments.prior_tokenizer_type is not None:
        return TokenizerChoice(arguments.prior_tokenizer_type, arguments.prior_tokenizer_model)
    folder, model = Path(identity.path).resolve(), Path(choice.model).resolve()
    if identity.tokenizer_fingerprint == tokenizer.fingerprint or folder in (model, model.parent):
        return choice
    own = own_tokenizer(identity.path)
    if own is None and identity.tokenizer_fingerprint is None:
        logger.warning("%s: that its tokenizer is %s is not checked", identity.path, choice.model)
        return choice
    if own is None:
        raise ConfigError(
            f"--prior {identity.path}: was trained with another tokenizer than {choice.model}; name it with "
            "--prior-tokenizer-type and --prior-tokenizer-model"
        )
    return own


def _check_prior(identity: PriorIdentity, tokenizer: Tokenizer) -> None:
    if identity.tokenizer_fingerprint not in (None, tokenizer.fingerprint):
        raise TokenizerError(
            f"the prior {identity.path} was trained with a tokenizer of fingerprint "
            f"{str(identity.tokenizer_fingerprint)[:12]}; {tokenizer.tokenizer_model} has "
            f"{tokenizer.fingerprint[:12]}"
        )
    if tokenizer.vocab_size > identity.vocab_size:
        raise TokenizerError(
            f"the tokenizer {tokenizer.tokenizer_model} has {tokenizer.vocab_size} ids, the prior "
            f"{identity.path} only {identity.vocab_size}; name the prior's with --prior-tokenizer-type and "
            "--prior-tokenizer-model"
        )
