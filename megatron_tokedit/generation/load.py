"""A model, its tokenizer and its document start, together: what is needed to continue a text.

A document start is what stood before every document in training: for a checkpoint of this package the end of
the document before (EOD), for one converted from a Hugging Face model, and for that model, mostly a beginning
of sequence (BOS). Without it the first token of a text has no context, which a model never saw in training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tokedit.engine import checkpoint_folder, preflight
from megatron_tokedit.errors import CheckpointError, ConfigError, DataFormatError, TokenizerError
from megatron_tokedit.generation.base import Decoder
from megatron_tokedit.tokenizers import Tokenizer, load_tokenizer, tokenizer_spec

if TYPE_CHECKING:
    from megatron_tokedit.engine.inference import LanguageModel

RECIPES = {"float32": "fp32", "bfloat16": "bf16"}
"""Precision of generation -> recipe of the engine."""


@dataclass(frozen=True, slots=True)
class TextModel:
    """A loaded model that continues texts.

    Attributes:
        path: the step folder or model folder.
        tokenizer: its tokenizer.
        start_id: put before a document; None: nothing, or what the tokenizer itself puts there.
        stop_ids: ids that end a document: its end, and the start of the next one, by which alone some models
            (llama2.c's) were taught where documents end.
        vocab_size: ids below it may be drawn: those that model and tokenizer both have.
        max_positions: ids that the model takes.
        make_decoder: a decoder without rows; several may be in use.
        chat_template: Jinja text of the chat template that the model was taught, or else its tokenizer's.
        chat_template_name: what it is called.
    """

    path: str
    tokenizer: Tokenizer
    start_id: int | None
    stop_ids: frozenset[int]
    vocab_size: int
    max_positions: int
    make_decoder: Callable[[], Decoder]
    chat_template: str | None = None
    chat_template_name: str = "tokenizer"

    def prompt_ids(self, text: str, *, document_start: bool = True) -> list[int]:
        """Ids of a text that is to be continued.

        Args:
            text: may be empty, with a document start.
            document_start: put in front what stood before every document in training; False: nothing, for a
                text that is taken from the middle of a document.

        Raises:
            DataFormatError: the text is not Unicode: bytes that were not UTF-8.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:  # Python keeps such bytes of its arguments as lone surrogates
            raise DataFormatError(f"the prompt {text[:80]!r} is not UTF-8 text ({error.reason})") from error
        ids = self.tokenizer.encode(text)
        prefix, suffix = self.tokenizer.prefix_ids, self.tokenizer.suffix_ids
        if suffix and tuple(ids[-len(suffix) :]) == suffix:
            ids = ids[: -len(suffix)]  # or the text would be at its end
        if not document_start:
            return ids[len(prefix) :] if tuple(ids[: len(prefix)]) == prefix else ids
        return ids if self.start_id is None else [self.start_id, *ids]


def load_text_model(
    path: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    tokenizer_type: str | None = None,
    tokenizer_model: str | None = None,
) -> TextModel:
    """Load a checkpoint (a run folder, its ``checkpoints``, a step folder) or a Hugging Face model folder.

    Args:
        path: the folder, told apart by content.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: ``float32``, ``bfloat16``, or ``auto``: bfloat16 on a GPU, float32 elsewhere.
        tokenizer_type: instead of what the folder says, together with ``tokenizer_model``.
        tokenizer_model: file, folder or name; with a checkpoint also alone, where it lies elsewhere now.

    Raises:
        CheckpointError: no usable model is there.
        TokenizerError: no usable tokenizer, or not the model's.
        ConfigError: a device or precision that cannot be had.
    """
    device_type, dtype = resolve_machine(device, dtype)
    tokenizer, start_id = find_tokenizer(path, tokenizer_type, tokenizer_model)
    folder = Path(path)
    if (folder / "config.json").is_file():
        from megatron_tokedit.generation.huggingface import load_model

        published = from_huggingface_model(load_model(folder, device_type, dtype), folder, tokenizer)
        return replace(published, chat_template=tokenizer.chat_template)
    from megatron_tokedit.engine.inference import load_language_model

    folder = checkpoint_folder.require(folder)
    model = load_language_model(folder, device=device, precision=RECIPES[dtype])
    state = checkpoint_folder.read_json(folder, checkpoint_folder.STATE_FILE)
    return replace(
        from_language_model(model, tokenizer, start_id=start_id),
        chat_template=state.get("chat_template", tokenizer.chat_template),
        chat_template_name=state.get("chat_template_name", "tokenizer"),
    )


def find_tokenizer(
    path: str | Path, tokenizer_type: str | None = None, tokenizer_model: str | None = None
) -> tuple[Tokenizer, int | None]:
    """The tokenizer of a checkpoint or of a model folder, as :func:`load_text_model` finds it.

    Returns:
        The tokenizer, and the id that stood before every document in training; None: nothing did.

    Raises:
        CheckpointError: no usable model is there.
        TokenizerError: no usable tokenizer, or not the model's.
        ConfigError: one of the two arguments without the other, with a model folder.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{path}: no such folder; give a run folder, a step folder or a model folder")
    if (folder / "config.json").is_file():
        tokenizer = _folder_tokenizer(folder, tokenizer_type, tokenizer_model)
        return tokenizer, tokenizer.bos if tokenizer.prepends_bos else None
    folder = checkpoint_folder.require(folder)
    state = checkpoint_folder.read_json(folder, checkpoint_folder.STATE_FILE)
    tokenizer = _recorded_tokenizer(folder, state.get("tokenizer") or {}, tokenizer_type, tokenizer_model)
    return tokenizer, state.get("start_id", tokenizer.eod)  # null where a converted model has none


def resolve_machine(device: str, dtype: str) -> tuple[str, str]:
    """What :func:`load_text_model` takes ``auto`` for: the kind of device, and the precision.

    Raises:
        ConfigError: a device or precision that cannot be had.
    """
    if dtype not in ("auto", *RECIPES):
        raise ConfigError(f"dtype: {dtype!r}, expected auto, {' or '.join(RECIPES)}")
    device_type, _ = preflight.resolve_device(device)
    if dtype == "auto":
        dtype = "bfloat16" if device_type == "cuda" else "float32"
    return device_type, dtype


def from_language_model(model: LanguageModel, tokenizer: Tokenizer, *, start_id: int | None) -> TextModel:
    """A checkpoint that is loaded already, also over tensor-parallel ranks; it stays as it is for others.

    Args:
        model: from ``engine.inference``.
        tokenizer: the model's.
        start_id: what stood before every document in training; None: nothing.

    Raises:
        TokenizerError: the tokenizer has more ids than the model.
        ConfigError: when a text is begun, a layout or precision that no text is written in (see
            ``engine.decoding``).
    """
    from megatron_tokedit.engine.decoding import CachedDecoder

    path = str(model.checkpoint or "the model")
    _check_vocabulary(path, tokenizer, model.vocab_size)
    return TextModel(
        path=path,
        tokenizer=tokenizer,
        start_id=None if start_id in tokenizer.prefix_ids else start_id,
        stop_ids=frozenset(i for i in (tokenizer.eod, start_id, *model.stop_ids) if i is not None),
        vocab_size=min(model.vocab_size, tokenizer.vocab_size),
        max_positions=model.max_context_tokens,
        make_decoder=lambda: CachedDecoder(model),
    )


def from_huggingface_model(model: Any, folder: Path, tokenizer: Tokenizer) -> TextModel:
    """A transformers model that is loaded already; it stays as it is for others.

    Args:
        model: a causal language model.
        folder: that it came from.
        tokenizer: the model's.

    Raises:
        TokenizerError: the tokenizer has more ids than the model.
    """
    from megatron_tokedit.generation.huggingface import HuggingFaceDecoder

    config = model.config
    _check_vocabulary(str(folder), tokenizer, config.vocab_size)
    ends = getattr(model.generation_config, "eos_token_id", None)
    other_ends = ends if isinstance(ends, list) else [ends]
    bos = tokenizer.bos if tokenizer.prepends_bos else None
    return TextModel(
        path=str(folder),
        tokenizer=tokenizer,
        start_id=None if bos in tokenizer.prefix_ids else bos,
        stop_ids=frozenset(i for i in (tokenizer.eod, bos, *other_ends) if i is not None),
        vocab_size=min(config.vocab_size, tokenizer.vocab_size),
        max_positions=getattr(config, "max_position_embeddings", None) or 1 << 30,
        make_decoder=lambda: HuggingFaceDecoder(model),
    )


def _check_vocabulary(path: str, tokenizer: Tokenizer, vocab_size: int) -> None:
    if tokenizer.vocab_size > vocab_size:
        raise TokenizerError(
            f"{tokenizer.tokenizer_model}: has {tokenizer.vocab_size} ids, and the model {path} only "
            f"{vocab_size}; it is not the tokenizer of this model"
        )


def _recorded_tokenizer(
    folder: Path, recorded: dict[str, Any], tokenizer_type: str | None, tokenizer_model: str | None
) -> Tokenizer:
    """The tokenizer that a checkpoint was trained with, from where it lies now."""
    kind, model = tokenizer_type or recorded.get("type"), tokenizer_model or recorded.get("model")
    if kind is None or model is None:
        raise TokenizerError(
            f"{folder / checkpoint_folder.STATE_FILE}: records no tokenizer; give --tokenizer-type and "
            "--tokenizer-model"
        )
    try:
        tokenizer = load_tokenizer(kind, model)
    except TokenizerError as error:
        if tokenizer_model is not None:
            raise
        raise TokenizerError(
            f"{error} (recorded in {folder / checkpoint_folder.STATE_FILE}); give --tokenizer-model where it "
            "lies now"
        ) from error
    expected, found = recorded.get("fingerprint"), tokenizer_spec(tokenizer)["fingerprint"]
    if expected is not None and found != expected:
        raise TokenizerError(
            f"{model}: is not the tokenizer that {folder} was trained with (fingerprint {found[:12]}, "
            f"expected {expected[:12]})"
        )
    return tokenizer


def _folder_tokenizer(folder: Path, tokenizer_type: str | None, tokenizer_model: str | None) -> Tokenizer:
    """The tokenizer of a Hugging Face folder, or the one that is given."""
    if (tokenizer_type is None) != (tokenizer_model is None):
        raise ConfigError("with a Hugging Face folder, give --tokenizer-type and --tokenizer-model together")
    if tokenizer_type is not None and tokenizer_model is not None:
        return load_tokenizer(tokenizer_type, tokenizer_model)
    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return load_tokenizer("HuggingFaceTokenizer", str(folder.absolute()))
    if (folder / "tokenizer.model").is_file():
        return load_tokenizer("SentencePieceTokenizer", str(folder))
    raise TokenizerError(
        f"{folder}: has no tokenizer (tokenizer.json or tokenizer.model); give --tokenizer-type and "
        "--tokenizer-model"
    )
