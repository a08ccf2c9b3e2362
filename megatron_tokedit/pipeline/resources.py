"""What a job works with, found and checked before any document is read: tokenizers and prior.

Invariant: a tokenizer and a prior that do not belong together never meet a document.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tokedit.config.preprocess import PreprocessConfig
from megatron_tokedit.errors import ConfigError, TokenizerError
from megatron_tokedit.pipeline.conversations import first_id
from megatron_tokedit.tokenizers import ChatTemplate, Tokenizer, load_chat_template, load_tokenizer

if TYPE_CHECKING:  # these import torch, which a job that edits nothing does not need
    from megatron_tokedit.scoring.identity import PriorFiles, PriorIdentity, PriorLayout
    from megatron_tokedit.scoring.scorer import CausalScorer, ScoringOptions

_PROBE = (
    "The quick brown fox jumps over the lazy dog. One day, a little girl named Lily found 12 apples;\n"
    "she said: \"There's more (and better) in the house.\" In 1987, the European Union's parliament met."
)
_PROCESS_BYTES = 1 << 30
"""An interpreter with torch, and the activations of a batch."""


@dataclass(frozen=True, slots=True)
class PriorPlan:
    """The prior of a job and how it is used; picklable, so that workers load what the plan says.

    Attributes:
        identity: which model.
        options: windows and batches.
        dtype: precision.
        threads: torch threads on CPU.
        layout: processes that hold a copy.
        device: ``cpu`` or ``cuda``. Not in :meth:`settings`: a merge may run where the device is not; that
            the units agree is checked by :func:`megatron_tokedit.pipeline.unit.check_devices`.
    """

    identity: PriorIdentity
    options: ScoringOptions
    dtype: str
    threads: int
    device: str
    layout: PriorLayout

    @property
    def memory_bytes(self) -> int:
        """What a process is expected to need: its part of the weights in their precision, and buffers."""
        weights = self.identity.weight_bytes * (
            2 if self.dtype == "float32" else 1
        )  # files may hold bfloat16
        return weights // self.layout.num_ranks + self.options.logits_bytes + _PROCESS_BYTES

    def settings(self) -> dict[str, Any]:
        """What of it determines the bytes, for the plan and the manifest.

        Tensor-parallel ranks add up parts of sums, which changes their last bits as ``threads`` does: a job
        that was begun with one number of them is not gone on with by another. Pipeline stages and the number
        of replicas change nothing.
        """
        of_layout = {"tensor_parallel": self.layout.tensor} if self.layout.tensor > 1 else {}
        return {
            "backend": self.identity.backend,
            "fingerprint": self.identity.fingerprint,
            "vocab_size": self.identity.vocab_size,
            "dtype": self.dtype,
            "threads": self.threads,
            **of_layout,
            "context_tokens": self.options.context_tokens,
            "overlap_tokens": self.options.overlap_tokens,
            "start_id": self.options.start_id,
            "batch_tokens": self.options.batch_tokens,
            "logits_bytes": self.options.logits_bytes,
        }


@dataclass(frozen=True, slots=True)
class JobTokenizers:
    """The tokenizers of a job.

    Attributes:
        text: reads the text; the prior's, where there is one.
        output: the training tokenizer, where it is another.
        template: the chat template, where the input is conversations.
    """

    text: Tokenizer
    output: Tokenizer | None = None
    template: ChatTemplate | None = None

    @property
    def written(self) -> Tokenizer:
        """The tokenizer whose ids are written."""
        return self.output or self.text


def load_tokenizers(config: PreprocessConfig) -> JobTokenizers:
    """Load the tokenizers of a configuration.

    Raises:
        TokenizerError: one cannot be loaded, or cannot split control tokens that a text spells, or there is
            no usable chat template for conversations.
    """
    split = config.special_tokens_in_text == "split"
    text = load_tokenizer(config.tokenizer_type, config.tokenizer_model, split_special_tokens=split)
    if config.is_sft:
        if split:
            _refuse_user_defined_pieces(config)
        template = load_chat_template(
            config.sft_chat_template, text.chat_template, text.special_tokens, text.tokenizer_model
        )
        return JobTokenizers(text, template=template)
    if config.output_tokenizer_type is None or config.output_tokenizer_model is None:
        return JobTokenizers(text)
    output = load_tokenizer(
        config.output_tokenizer_type, config.output_tokenizer_model, split_special_tokens=split
    )
    if output.fingerprint == text.fingerprint:
        raise TokenizerError(
            f"the output tokenizer {output.tokenizer_model} is the prior's tokenizer {text.tokenizer_model}; "
            "leave --output-tokenizer-type and --output-tokenizer-model out"
        )
    return JobTokenizers(text, output)


def _refuse_user_defined_pieces(config: PreprocessConfig) -> None:
    """Refuse to split a sentencepiece model's user-defined pieces where a template may write them.

    Raises:
        TokenizerError: it has some.
    """
    if config.tokenizer_type != "SentencePieceTokenizer":
        return
    if load_tokenizer(config.tokenizer_type, config.tokenizer_model).spellable_ids:
        raise TokenizerError(
            f"{config.tokenizer_model} has user-defined pieces, which sentencepiece cannot split in a "
            "message and leave in the template; take --special-tokens-in-text encode or error"
        )


def find_prior(
    config: PreprocessConfig,
    tokenizer: Tokenizer,
    *,
    template: ChatTemplate | None = None,
    only_merges: bool = False,
    known: PriorFiles | None = None,
) -> PriorPlan | None:
    """Identify the prior, check that it fits the tokenizer and settle its windows; None where nothing is
    edited.

    Args:
        config: the job.
        tokenizer: its tokenizer, the one that reads the text.
        template: its chat template, where the input is conversations.
        only_merges: this process scores nothing, so the device need not be here.
        known: the prior's files as an earlier run found them, so that unchanged ones are not read again.

    Raises:
        PriorError: the prior is not usable.
        TokenizerError: it does not belong to the tokenizer.
        ConfigError: a window that it cannot take, a device that is not there, a precision that the prior or
            this machine does not have, or sizes that the prior cannot be divided by.
    """
    if not config.edits or config.prior is None:
        return None
    from megatron_tokedit.scoring.identity import PriorLayout
    from megatron_tokedit.scoring.load import (
        DEFAULT_CONTEXT_TOKENS,
        check_dtype,
        identify_prior,
        resolve_device,
        scoring_options,
    )

    device = config.prior_device if only_merges else resolve_device(config.prior_device).type
    identity = identify_prior(config.prior, config.prior_backend, known=known)
    _check_tokenizer(tokenizer, identity)
    layout = PriorLayout(config.prior_tensor_parallel, config.prior_pipeline_parallel)
    if not only_merges:
        check_dtype(identity, config.prior_dtype, layout)
    options = scoring_options(
        identity,
        start_id=_start_id(config, tokenizer, identity, template),
        context_tokens=config.prior_context or min(DEFAULT_CONTEXT_TOKENS, identity.max_context_tokens),
        overlap_tokens=config.prior_overlap,
        batch_tokens=config.prior_batch_tokens,
        logits_bytes=config.prior_logits_bytes,
    )
    _check_conversation_limit(config, options)
    return PriorPlan(identity, options, config.prior_dtype, config.prior_threads, device, layout)


def _check_conversation_limit(config: PreprocessConfig, options: ScoringOptions) -> None:
    """Refuse conversations that the prior cannot see whole.

    Raises:
        ConfigError: they may be longer than its windows.
    """
    limit, context = config.sft_max_tokens, options.context_tokens
    if limit is not None and limit > context and not config.sft_score_without_prompt:
        raise ConfigError(
            f"sft_max_tokens={limit}: the prior sees {context} tokens at a time, and a response is scored "
            f"given all of the conversation before it; give at most {context}, or a larger "
            "--prior-context if the prior takes it"
        )


def conversation_limit(config: PreprocessConfig, prior: PriorPlan | None) -> int | None:
    """Tokens of the longest conversation; None: no bound."""
    if config.sft_max_tokens is not None or prior is None:
        return config.sft_max_tokens
    return prior.options.context_tokens


def conversation_settings(
    config: PreprocessConfig, template: ChatTemplate, prior: PriorPlan | None
) -> dict[str, Any]:
    """How conversations are read and rendered, as the manifest records it."""
    return {
        "chat_template": template.source,
        "chat_template_name": template.name,
        "format": config.sft_format,
        "keys": config.sft_keys,
        "max_tokens": conversation_limit(config, prior),
        "too_long": config.sft_too_long,
    }


def conversation_identity(
    config: PreprocessConfig, template: ChatTemplate, prior: PriorPlan | None
) -> dict[str, Any]:
    """What of it determines the bytes: the template's text, whatever its name, as a checksum."""
    settings = conversation_settings(config, template, prior)
    del settings["chat_template_name"]
    return settings | {"chat_template": hashlib.sha256(template.source.encode()).hexdigest()}


def _start_id(
    config: PreprocessConfig, tokenizer: Tokenizer, identity: PriorIdentity, template: ChatTemplate | None
) -> int | None:
    """The id put before each window: the prior's own, else BOS where the tokenizer's models expect it.

    A tokenizer that writes BOS itself needs none, nor does a chat template that does; a prior trained on
    ``.bin`` files never saw BOS, there a document follows the end of the one before.
    """
    if template is not None:
        start_id = identity.start_id
        if start_id is None and tokenizer.prepends_bos:
            start_id = tokenizer.bos
        is_written = not config.sft_score_without_prompt and first_id(tokenizer, template) == start_id
        return None if is_written else start_id
    if identity.start_id is not None:
        return None if identity.start_id in tokenizer.prefix_ids else identity.start_id
    return tokenizer.bos if tokenizer.prepends_bos and tokenizer.bos not in tokenizer.prefix_ids else None


def load_prior(prior: PriorPlan) -> CausalScorer:
    """Load the prior of a plan into this process, or into the replica that it leads, and set the number of
    torch threads.

    Raises:
        PriorError: it cannot be loaded.
        ConfigError: a prior of several processes, and this one leads no replica.
    """
    import torch

    if prior.layout.num_ranks > 1:
        from megatron_tokedit.pipeline.replicas import own_replica
        from megatron_tokedit.scoring import replica

        return replica.load_scorer(
            own_replica(prior.layout),
            prior.identity,
            prior.options,
            dtype=prior.dtype,
            threads=prior.threads,
        )
    from megatron_tokedit.scoring.load import load_scorer

    torch.set_num_threads(prior.threads)
    scorer = load_scorer(prior.identity, prior.options, dtype=prior.dtype, device=prior.device)
    torch.set_num_threads(prior.threads)  # megatron's initialisation may have chosen its own
    return scorer


def environment(device: str) -> str:
    """The device's name and the versions that decide how a prior's floats round."""
    import torch

    name = "CPU" if device == "cpu" else torch.cuda.get_device_name()
    packages = ("transformers", *(() if device == "cpu" else ("transformer-engine",)))
    versions = [f"torch {torch.__version__}"]
    for package in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join([name, *versions])


def _check_tokenizer(tokenizer: Tokenizer, identity: PriorIdentity) -> None:
    """Refuse a tokenizer that the prior was not trained with, as far as the prior's folder tells."""
    name = f"tokenizer {tokenizer.tokenizer_model}"
    if tokenizer.vocab_size > identity.vocab_size:
        raise TokenizerError(
            f"{name} has {tokenizer.vocab_size} ids, but the prior {identity.path} has a vocabulary of "
            f"{identity.vocab_size}; give the tokenizer that the prior was trained with"
        )
    if identity.tokenizer_fingerprint not in (None, tokenizer.fingerprint):
        raise TokenizerError(
            f"{name} is not the one that the prior {identity.path} was trained with (their fingerprints "
            "differ); give that one"
        )
    own = _own_tokenizer(identity) if identity.backend == "hf" else None
    if own is None:
        return
    ids, own_ids = set(tokenizer.encode(_PROBE)), set(own.encode(_PROBE))
    if len(ids & own_ids) < len(ids | own_ids) / 2:
        raise TokenizerError(
            f"{name} gives other ids than the tokenizer in the prior's folder {identity.path} for the same "
            "text; give the tokenizer that the prior was trained with"
        )


def _own_tokenizer(identity: PriorIdentity) -> Tokenizer | None:
    """The tokenizer in a Hugging Face model folder, where there is one."""
    folder = Path(identity.path)
    if (folder / "tokenizer.model").is_file():
        return load_tokenizer("SentencePieceTokenizer", str(folder / "tokenizer.model"))
    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return load_tokenizer("HuggingFaceTokenizer", str(folder))
    return None
