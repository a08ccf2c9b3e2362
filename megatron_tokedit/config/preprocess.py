"""Every setting of ``tools/preprocess_edit.py``, under its flag's name with underscores.

The command line and the ``edit:`` mapping of a training source make the same section, so both have the same
defaults and the same checks. Invariant: all faults are reported together, a value that this version cannot
honour is refused rather than replaced, and a setting that has no effect is named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError, model_validator

from megatron_tokedit.config.base import Section
from megatron_tokedit.config.edit_file import read_edit_file
from megatron_tokedit.errors import ConfigError

SFT_KEY = "sft"
"""Stands for the JSON key in the names of a job's outputs where the input is conversations."""
FP8_DTYPES = ("fp8", "fp8_blockwise", "mxfp8")
DEFAULT_TOP_K = 8
DEFAULT_TEMPERATURE = {"low_drop_up_revise": 1.0}
"""The temperature that a preset's authors used, where it is not 1.5."""


class PreprocessConfig(Section):
    """One preprocessing job."""

    input: list[str] = Field(min_length=1)
    """Files or globs: jsonl, txt (each also .gz or .zst), parquet."""
    json_keys: list[str] = Field(["text"], min_length=1)
    """One output dataset a key. Conversations are whole records: with format ``sft`` it is ``sft`` alone."""
    format: Literal["text", "sft"] = "text"
    """``sft``: records are conversations, the output ``PREFIX_sft_document`` has a loss mask beside it, and
    responses alone are edited.
    """
    sft_format: Literal["auto", "messages", "sharegpt", "alpaca", "self_instruct", "prompt_response"] = "auto"
    """Layout of the records; ``auto``: told by each record's keys."""
    sft_keys: dict[str, str] | None = None
    """Part of a conversation (prompt, response, input, system, messages, tools) -> key, instead of a
    layout.
    """
    sft_chat_template: str | None = None
    """Name of a shipped template, or a Jinja file; default: the tokenizer's own."""
    sft_max_tokens: PositiveInt | None = None
    """Longest conversation; default: the prior's context, or no bound where nothing is edited."""
    sft_too_long: Literal["drop", "truncate"] = "drop"
    """A longer conversation is dropped, or loses its oldest exchanges; both are counted."""
    sft_score_without_prompt: bool = False
    """Score every response by itself, as the authors' script does, instead of given the conversation before
    it.
    """
    output_prefix: str = Field(min_length=1)
    """Outputs are ``PREFIX_KEY_document.*``; the job's own files are in ``PREFIX.work``."""
    tokenizer_type: Literal["SentencePieceTokenizer", "HuggingFaceTokenizer"]
    tokenizer_model: str
    append_eod: bool = False
    workers: PositiveInt | None = None
    """Processes on this machine; changes no byte of the output. Default: the usable cores divided by
    ``prior_threads``, at most one a work unit; one where the prior is on a GPU.
    """
    seed: int = Field(1234, ge=0, lt=2**64)
    log_interval: PositiveInt = 1000
    """Documents between two log lines."""

    output_tokenizer_type: Literal["SentencePieceTokenizer", "HuggingFaceTokenizer"] | None = None
    """The training tokenizer, where it differs from the prior's: edited documents are decoded and encoded
    again.
    """
    output_tokenizer_model: str | None = None
    output_round_trip: Literal["original", "decoded", "drop"] = "original"
    """A document that the prior's tokenizer does not give back exactly when it is not edited: write its
    ``original`` text unedited, or what is ``decoded`` from the edited ids, or ``drop`` it; all are counted.
    """

    edit_strategy: Literal["none", "up_revise", "low_drop_up_revise", "filtering"] = "up_revise"
    edit_threshold: float = Field(0.99, ge=0.0, le=1.0)
    """Tokens with p >= this are resampled."""
    edit_low_threshold: float = Field(0.001, ge=0.0, le=1.0)
    """Tokens with p < this are dropped, in the strategies that drop."""
    edit_sampler: Literal["top_k", "top_p", "rejection"] = "top_k"
    edit_top_k: PositiveInt | None = None
    """Most probable tokens to draw from; default 8, and no bound for the sampler top_p."""
    edit_top_p: float = Field(0.9, gt=0.0, le=1.0)
    """The sampler top_p draws from the fewest tokens that have this probability at the temperature."""
    edit_temperature: PositiveFloat | None = None
    """Default: the preset's, 1.5 for up_revise and 1.0 for low_drop_up_revise; 1.5 for free rules. The
    sampler rejection calls it beta.
    """
    edit_exclude_original: bool = False
    """Never draw the original token again."""
    edit_generations: PositiveInt = 1
    """The edited corpus is edited again until this many edits are done; every one is a dataset."""
    edit_rules: list[dict[str, Any]] | None = None
    """Ordered rules (action, conditions on p) instead of a strategy; what ``--edit-config`` reads."""

    prior: str | None = None
    """A Hugging Face model folder or a Megatron checkpoint folder."""
    prior_backend: Literal["auto", "hf", "megatron"] = "auto"
    prior_dtype: Literal["float32", "bfloat16", "float16", "fp8", "fp8_blockwise", "mxfp8"] = "float32"
    """FP8 is for Megatron checkpoints on a GPU: ``fp8`` is the precision recipe ``fp8_tensorwise``, the other
    two are the recipes of their names.
    """
    prior_device: Literal["auto", "cpu", "cuda"] = "auto"
    prior_context: PositiveInt | None = None
    """Tokens a window; default 2048, or the prior's own limit where that is smaller."""
    prior_overlap: PositiveInt | None = None
    """Tokens of a window that are context only; default 512, or a quarter of the window where that is
    smaller.
    """
    prior_batch_tokens: PositiveInt = 4096
    """Positions a forward, padding included."""
    prior_logits_bytes: PositiveInt = 128 << 20
    """Peak memory of the scoring head."""
    prior_threads: PositiveInt = 1
    """CPU threads of each worker's prior. They change the order of float sums, so they belong to the plan."""
    prior_tensor_parallel: PositiveInt = 1
    """Processes that share every layer of a Megatron prior. They change the order of float sums, so they
    belong to the plan.
    """
    prior_pipeline_parallel: PositiveInt = 1
    """Stages that share the layers of a Megatron prior among them; changes no byte of the output."""

    unit_documents: PositiveInt | None = None
    unit_bytes: PositiveInt | None = None
    """Work-unit size; default: a 64th of the input, at most 16 MiB and at least 256 KiB (4 MiB where nothing
    is edited).
    """
    max_bad_lines: NonNegativeInt = 0
    special_tokens_in_text: Literal["encode", "split", "error"] = "encode"
    """Text that spells a control token: ``encode`` makes it that token, as Megatron-LM does, and counts
    it.
    """

    @model_validator(mode="before")
    @classmethod
    def _name_conversations(cls, given: Any) -> Any:
        """With format ``sft``, what stands for the key is the default."""
        if isinstance(given, Mapping) and given.get("format") == "sft":
            return {"json_keys": [SFT_KEY], **given}
        return given

    @property
    def edits(self) -> bool:
        """Whether a prior is needed at all."""
        return self.edit_rules is not None or self.edit_strategy != "none"

    @property
    def is_sft(self) -> bool:
        """Whether the input is conversations."""
        return self.format == "sft"

    @property
    def strategy(self) -> str:
        """Name of the strategy; ``rules`` for a free list of rules."""
        return self.edit_strategy if self.edit_rules is None else "rules"

    @property
    def temperature(self) -> float:
        """The sampler's temperature, the strategy's default filled in."""
        return self.edit_temperature or DEFAULT_TEMPERATURE.get(self.strategy, 1.5)

    @property
    def top_k(self) -> int | None:
        """Candidates of a draw, the sampler's default filled in; None: no bound."""
        return self.edit_top_k or (None if self.edit_sampler == "top_p" else DEFAULT_TOP_K)

    @property
    def prior_ranks(self) -> int:
        """Processes that hold one copy of the prior."""
        return self.prior_tensor_parallel * self.prior_pipeline_parallel

    @property
    def idle_settings(self) -> list[str]:
        """Settings that were given, other than by their defaults, and have no effect."""
        fields = type(self).model_fields
        given = {name for name in self.model_fields_set if getattr(self, name) != fields[name].default}
        return sorted(given & set(self._idle()))

    def _idle(self) -> Iterator[str]:
        """Names of settings that the others leave without effect."""
        if not self.edits:
            names = type(self).model_fields.keys() - {"edit_strategy"}
            yield from (name for name in names if name.startswith(("edit_", "prior")))
            return
        strategy = self.strategy
        if strategy == "rules":
            yield from ("edit_strategy", "edit_threshold", "edit_low_threshold")
        if strategy == "up_revise":
            yield "edit_low_threshold"
        if strategy == "filtering":
            yield from ("edit_threshold", "edit_sampler", "edit_top_k", "edit_top_p", "edit_temperature")
            yield "edit_exclude_original"
        if self.edit_sampler != "top_p":
            yield "edit_top_p"
        if self.output_tokenizer_model is None:
            yield "output_round_trip"

    def dataset_names(self, key: str) -> list[str]:
        """Names of a key's datasets, one a generation; the last has the key's own."""
        return [*(f"{key}_generation{number}" for number in range(1, self.edit_generations)), key]

    def faults(self) -> Iterator[str]:
        """What is wrong with the settings taken together."""
        if self.edits:
            yield from self._prior_faults()
        yield from self._sft_faults()
        yield from self._output_tokenizer_faults()
        if self.unit_documents is not None and self.unit_bytes is not None:
            yield "unit_documents and unit_bytes: give one of them"
        if len(set(self.json_keys)) != len(self.json_keys):
            yield f"json_keys={' '.join(self.json_keys)}: a key is given twice"
        for key in self.json_keys:
            if "/" in key or not key:
                yield f"json_keys: {key!r} cannot be part of a file name"
            for name in self.dataset_names(key)[:-1]:
                if name in self.json_keys:
                    yield f"json_keys: {name} is also the name of an earlier generation of {key}"
        if self.edit_generations > 1 and not self.edits:
            yield f"edit_generations={self.edit_generations}: edit_strategy none edits nothing"
        if self.strategy == "low_drop_up_revise" and self.edit_low_threshold > self.edit_threshold:
            yield (
                f"edit_low_threshold={self.edit_low_threshold}: above edit_threshold={self.edit_threshold}; "
                "expected it below"
            )

    def _prior_faults(self) -> Iterator[str]:
        """What is wrong with the prior's settings."""
        if self.prior is None:
            yield f"prior: missing; edit_strategy={self.strategy} needs one (or give edit_strategy none)"
        if self.prior_dtype in FP8_DTYPES and self.prior_device == "cpu":
            yield (
                f"prior_dtype={self.prior_dtype}: needs a GPU, and prior_device is cpu; give float32 or "
                "bfloat16, or another device"
            )
        if self.prior_dtype in FP8_DTYPES and self.prior_backend == "hf":
            yield (
                f"prior_dtype={self.prior_dtype}: is for Megatron checkpoints, and prior_backend is hf; give "
                "float32, bfloat16 or float16"
            )

        if self.prior_ranks > 1 and self.prior_backend == "hf":
            yield (
                f"prior_tensor_parallel={self.prior_tensor_parallel}, "
                f"prior_pipeline_parallel={self.prior_pipeline_parallel}: are for Megatron checkpoints, and "
                "prior_backend is hf; make one of the prior:\n  python tools/convert_checkpoint.py --from hf "
                f"--to megatron --input {self.prior} --output CHECKPOINT"
            )
        if self.prior_ranks > 1 and (self.workers or 1) > 1:
            yield (
                f"workers={self.workers}: {self.prior_ranks} processes work on one unit together; for more "
                f"units at a time start a multiple of {self.prior_ranks} processes with torchrun"
            )

    def _sft_faults(self) -> Iterator[str]:
        """What is wrong with the settings of conversations."""
        if not self.is_sft:
            given = sorted(name for name in self.model_fields_set if name.startswith("sft_"))
            yield from (f"{name}: is for format sft (--format sft)" for name in given)
            return
        if self.json_keys != [SFT_KEY]:
            yield (
                "json_keys: format sft reads whole records; name their parts with sft_keys, for example "
                "--sft-keys prompt=question response=answer"
            )
        if self.append_eod:
            yield "append_eod: with format sft the chat template ends the responses; leave it out"
        if self.output_tokenizer_model is not None:
            yield (
                "output_tokenizer_model: format sft writes the ids that the prior read; give the training "
                "tokenizer as tokenizer_type and tokenizer_model, with a prior of that tokenizer: the model "
                "that is to be fine-tuned is one (or write the conversations unedited, with edit_strategy "
                "none)"
            )
        if self.sft_keys is not None:
            yield from self._sft_key_faults(self.sft_keys)
        if self.sft_score_without_prompt and not self.edits:
            yield "sft_score_without_prompt: edit_strategy none scores nothing"

    def _sft_key_faults(self, keys: Mapping[str, str]) -> Iterator[str]:
        """What is wrong with the keys of conversations."""
        parts = ("messages", "tools", "system", "prompt", "input", "response")
        for part in keys:
            if part not in parts:
                yield f"sft_keys: {part!r} is no part of a conversation; parts are {', '.join(parts)}"
        if "messages" not in keys and not {"prompt", "response"} <= keys.keys():
            yield "sft_keys: expected messages=KEY, or both prompt=KEY and response=KEY"
        if "messages" in keys and {"prompt", "response", "input"} & keys.keys():
            yield "sft_keys: messages holds the whole conversation; leave prompt, response and input out"
        if self.sft_format != "auto":
            yield f"sft_format={self.sft_format}: sft_keys takes its place; give one of them"

    def _output_tokenizer_faults(self) -> Iterator[str]:
        """What is wrong with the output tokenizer's settings."""
        if (self.output_tokenizer_type is None) != (self.output_tokenizer_model is None):
            yield "output_tokenizer_type and output_tokenizer_model: give both or none"
        elif self.output_tokenizer_model is not None and not self.edits:
            yield (
                "output_tokenizer_model: where nothing is edited there is one tokenizer only; give it as "
                "tokenizer_type and tokenizer_model"
            )


def preprocess_config(settings: Mapping[str, Any], *, origin: str = "preprocess") -> PreprocessConfig:
    """Build and check the section.

    Args:
        settings: field name -> value; None means the default.
        origin: where the settings come from, for the message (``data.train.0.edit``).

    Raises:
        ConfigError: one message with every fault.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if "edit_config" in given:
        path = given["edit_config"]
        given = _with_edit_file(given, origin)
        origin = f"{origin} with edit_config {path}"
    try:
        config = PreprocessConfig.model_validate(given, strict=True)
    except ValidationError as error:
        raise _all_faults(origin, [_schema_fault(dict(detail)) for detail in error.errors()]) from error
    if faults := list(config.faults()):
        raise _all_faults(origin, faults)
    return config


def _with_edit_file(given: dict[str, Any], origin: str) -> dict[str, Any]:
    """Settings with the content of ``edit_config``, which stands instead of the single settings.

    Raises:
        ConfigError: the file is unusable, or a setting is given beside it that belongs into it.
    """
    path = given.pop("edit_config")
    beside = sorted(name for name in given if name.startswith("edit_"))
    if beside:
        raise _all_faults(
            origin, [f"{name}: edit_config={path} takes its place; write it there" for name in beside]
        )
    return given | read_edit_file(path)


def _all_faults(origin: str, faults: list[str]) -> ConfigError:
    """One error for all faults."""
    if len(faults) == 1:
        return ConfigError(f"{origin}: {faults[0]}")
    return ConfigError("\n  ".join([f"{origin}: {len(faults)} settings are wrong:", *faults]))


def _schema_fault(detail: Mapping[str, Any]) -> str:
    """One pydantic error as one line: field, what was got, what was expected."""
    name = ".".join(map(str, detail["loc"]))
    if detail["type"] == "missing":
        return f"{name}: missing"
    if detail["type"] == "extra_forbidden":
        near = get_close_matches(name, PreprocessConfig.model_fields, n=1)
        return f"{name}: unknown setting" + (f"; did you mean {near[0]}?" if near else "")
    return f"{name}={detail['input']!r}: {detail['msg'].replace('Input should be', 'expected')}"
