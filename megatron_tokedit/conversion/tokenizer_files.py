"""The tokenizer that goes with a converted model: which one, its files, and the ids that depend on it.

Invariant: the tokenizer of the output gives the ids of the tokenizer of the input (equal fingerprints); where
a format change makes that impossible to prove, it is tried on text, and said.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_tokedit.errors import TokenizerError
from megatron_tokedit.log import get_logger
from megatron_tokedit.tokenizers import Tokenizer, load_tokenizer

logger = get_logger(__name__)

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
SENTENCEPIECE_FILE = "tokenizer.model"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", SENTENCEPIECE_FILE, CHAT_TEMPLATE_FILE, "chat_template.json",
)  # fmt: skip
_PROBES = (
    "The quick  brown fox, 3.14 + 2 = 5;\n\n  def f(x):\n\treturn x ** 2\n",
    " leading space, caf\u00e9 \u4f60\u597d \U0001f600 and trailing ",
)


def find_tokenizer(folder: Path, kind: str | None, model: str | None) -> Tokenizer:
    """The tokenizer of a Hugging Face model folder.

    Args:
        folder: of the model.
        kind: Megatron-LM's name of the type; default: Hugging Face's where its files are there.
        model: instead of the folder's own.

    Raises:
        TokenizerError: there is none, or it cannot be loaded.
    """
    place = Path(model) if model else folder
    if kind is None:
        has_fast = (place / "tokenizer.json").is_file() or (place / "vocab.json").is_file()
        has_pieces = place.is_file() or (place / SENTENCEPIECE_FILE).is_file()
        if not has_fast and not has_pieces:
            raise TokenizerError(
                f"{place}: holds no tokenizer (tokenizer.json, or vocab.json and merges.txt, or "
                "tokenizer.model); give --tokenizer-model, and --tokenizer-type if need be"
            )
        kind = "HuggingFaceTokenizer" if has_fast else "SentencePieceTokenizer"
    return load_tokenizer(kind, str(place))


def vocabulary_faults(tokenizer: Tokenizer, vocab_size: int) -> list[str]:
    """What keeps a tokenizer from being a model's."""
    if tokenizer.vocab_size > vocab_size:
        return [
            f"tokenizer {tokenizer.tokenizer_model}: has {tokenizer.vocab_size} ids, the model has "
            f"{vocab_size}: it is another model's; give the right one with --tokenizer-model"
        ]
    return []


def start_id(tokenizer: Tokenizer) -> int | None:
    """The id that a published model expects before a document; None where it expects none."""
    return tokenizer.bos if tokenizer.prepends_bos else None


def stop_ids(folder: Path) -> tuple[int, ...]:
    """The ids at which a published model ends a text: those of its generation settings where it has them, or
    else those that its configuration names.

    Args:
        folder: of the model.
    """
    settings = read_generation_settings(folder)
    if settings is None:
        ends = json.loads((folder / CONFIG_FILE).read_text()).get("eos_token_id")
    else:
        ends = settings.eos_token_id
    return tuple(ends) if isinstance(ends, list | tuple) else () if ends is None else (ends,)


def read_generation_settings(folder: Path) -> Any:
    """The ``GenerationConfig`` of a folder; None where there is none, or none that transformers takes."""
    from transformers import GenerationConfig

    file = folder / GENERATION_FILE
    if not file.is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        logger.warning("%s: left out: %s", file, " ".join(str(error).split())[:300])
        return None


def keep_tokenizer(tokenizer: Tokenizer, folder: Path, source: Path) -> Tokenizer:
    """Copy a published model's tokenizer and its settings into a folder beside a checkpoint.

    Args:
        tokenizer: of the model.
        folder: made here.
        source: the model's folder, whose token ids and generation settings are kept for the way back.

    Returns:
        The tokenizer of the copy.

    Raises:
        TokenizerError: the copy is another tokenizer.
    """
    folder.mkdir()
    for name in (CONFIG_FILE, GENERATION_FILE):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    _copy_files(tokenizer, folder)
    return _same(tokenizer, folder)


def write_tokenizer(tokenizer: Tokenizer, folder: Path, start: int | None) -> None:
    """Put a tokenizer into a Hugging Face folder.

    Beside a sentencepiece model stands a ``tokenizer.json`` that puts ``start`` before every text: the one
    that came with it, if it does, or else one that is made of the model.

    Raises:
        TokenizerError: the copy is another tokenizer.
    """
    _copy_files(tokenizer, folder)
    if tokenizer.tokenizer_type != "SentencePieceTokenizer":
        _same(tokenizer, folder)
        return
    prefix = () if start is None else (start,)
    if (folder / "tokenizer.json").is_file():
        if load_tokenizer("HuggingFaceTokenizer", str(folder)).prefix_ids == prefix:
            return
        for name in TOKENIZER_FILES:
            if name != SENTENCEPIECE_FILE:
                (folder / name).unlink(missing_ok=True)
    _write_fast_tokenizer(tokenizer, folder, start)


def write_chat_template(source: str, tokenizer: Tokenizer, folder: Path) -> None:
    """Put a chat template beside a written tokenizer, in place of its own, so that ``apply_chat_template``
    gives the text that the model was taught.

    Special tokens that the template names and the folder's tokenizer calls otherwise are set in the template.

    Args:
        source: Jinja text.
        tokenizer: that the model was taught with.
        folder: with the written tokenizer.
    """
    from jinja2 import nodes
    from transformers import AutoTokenizer
    from transformers.utils.chat_template_utils import _compile_jinja_template

    settings_file = folder / "tokenizer_config.json"
    if settings_file.is_file():
        settings = json.loads(settings_file.read_text())
        if settings.pop("chat_template", None) is not None:
            settings_file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    (folder / "chat_template.json").unlink(missing_ok=True)
    written = AutoTokenizer.from_pretrained(folder, local_files_only=True).special_tokens_map
    names = {
        name.name for name in _compile_jinja_template(source).environment.parse(source).find_all(nodes.Name)
    }
    lines = [
        f"{{% set {name} = {json.dumps(text)} %}}\n"  # the line end is Jinja's, not the text's
        for name, text in sorted(tokenizer.special_tokens.items())
        if name in names and written.get(name) != text
    ]
    (folder / CHAT_TEMPLATE_FILE).write_text("".join(lines) + source, encoding="utf-8")


def _copy_files(tokenizer: Tokenizer, folder: Path) -> None:
    place = Path(tokenizer.tokenizer_model)
    if place.is_file():
        shutil.copyfile(place, folder / SENTENCEPIECE_FILE)
    elif place.is_dir():
        for name in TOKENIZER_FILES:
            if (place / name).is_file():
                shutil.copyfile(place / name, folder / name)
    else:
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(tokenizer.tokenizer_model).save_pretrained(folder)


def _same(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    copy = load_tokenizer(tokenizer.tokenizer_type, str(folder))
    if copy.fingerprint != tokenizer.fingerprint:
        raise TokenizerError(
            f"tokenizer {tokenizer.tokenizer_model}: its files alone give another tokenizer than it does "
            "where it is; save it with save_pretrained and give that folder as --tokenizer-model"
        )
    return copy


def _write_fast_tokenizer(tokenizer: Tokenizer, folder: Path, start: int | None) -> None:
    """``tokenizer.json`` that encodes as the sentencepiece model does, which is tried."""
    from tokenizers import Tokenizer as RustTokenizer
    from transformers import LlamaTokenizer

    pieces = [tokenizer.decode([i]) for i in (tokenizer.eod, start) if i is not None]
    loaded = LlamaTokenizer.from_pretrained(str(folder), legacy=False, add_bos_token=False)
    definition = json.loads(loaded.backend_tokenizer.to_str())
    definition["pre_tokenizer"] = None
    definition["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        ],
    }
    text = {"Sequence": {"id": "A", "type_id": 0}}
    definition["post_processor"] = None
    if start is not None:
        first = {"SpecialToken": {"id": pieces[-1], "type_id": 0}}
        definition["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [first, text],
            "pair": [first, text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {pieces[-1]: {"id": pieces[-1], "ids": [start], "tokens": [pieces[-1]]}},
        }
    fast = RustTokenizer.from_str(json.dumps(definition))
    fast.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": pieces[0],
        "clean_up_tokenization_spaces": False,
    }
    if start is not None:
        settings["bos_token"] = pieces[-1]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    for probe in _PROBES:
        if fast.encode(probe, add_special_tokens=False).ids != tokenizer.encode(probe):
            logger.warning(
                "%s: tokenizer.json encodes some text otherwise than the sentencepiece model %s, which lies "
                "beside it: use that",
                folder,
                SENTENCEPIECE_FILE,
            )
            return
