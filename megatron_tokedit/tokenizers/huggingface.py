"""Hugging Face tokenizers behind the :class:`Tokenizer` protocol.

Invariant: ``encode`` gives ``AutoTokenizer(text).input_ids`` as Megatron-LM's ``HuggingFaceTokenizer`` does:
what the tokenizer's template adds (a Llama tokenizer: BOS) is written too, and text that spells a special
token becomes that token, unless the tokenizer is loaded to split it. ``encode_batch`` uses gigatoken where
that gives the same ids. ``decode`` works on the Rust tokenizer below transformers, which never cleans up
spaces.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as RustTokenizer
from transformers import AutoTokenizer

from megatron_tokedit.errors import TokenizerError
from megatron_tokedit.log import get_logger
from megatron_tokedit.tokenizers.base import PlacedIds
from megatron_tokedit.tokenizers.fast_encoder import FastEncoder, find_fast_encoder
from megatron_tokedit.tokenizers.incomplete import incomplete_byte_fallback, incomplete_byte_level
from megatron_tokedit.tokenizers.segments import split_at_ids, widened

_EOD_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")
_PROBE = (
    'The quick brown fox, 3.14159 + 2 = 5; it\'s "so"\tfar\n\n  def f(x):\n    return x ** 2\r\n'
    "na\u00efve caf\u00e9 \u4f60\u597d \u0417\u0434\u0440\u0430 \u0645\u0631\u062d \U0001f600 \ufb01 \u00bd"
)
_RARE = "\U00012000\ua4d0\u1400\u07c0\U0001f70a\U0010fffd\x07"
"""Characters that hardly a vocabulary has: they become the unknown id, where a tokenizer gives that."""


class HuggingFaceTokenizer:
    """A fast Hugging Face tokenizer; its members are those of :class:`Tokenizer` in ``base.py``."""

    tokenizer_type = "HuggingFaceTokenizer"

    def __init__(self, tokenizer_model: str, *, split_special_tokens: bool = False) -> None:
        """Load a local folder, or a model name that transformers resolves.

        Raises:
            TokenizerError: nothing loadable there, no fast tokenizer, no end-of-text token, or a control
                token that text spells even where it is to be split.
        """
        self.tokenizer_model = tokenizer_model
        loaded = _load(tokenizer_model)
        self._backend = loaded.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        added = self._backend.get_added_tokens_decoder()
        self.vocab_size: int = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        self.eod: int = _eod(loaded, added, tokenizer_model)
        self.bos: int | None = loaded.bos_token_id
        self.pad: int | None = loaded.pad_token_id
        special = {i for i, token in added.items() if token.special} | set(loaded.all_special_ids)
        self.special_ids = frozenset(special | {self.eod})
        self.prefix_ids, self.suffix_ids = self._template()
        self.prepends_bos = self.bos is not None and self.bos in self.prefix_ids
        self.chat_template: str | None = _chat_template(loaded)
        self.special_tokens: Mapping[str, str] = dict(loaded.special_tokens_map)
        self.control_tokens: Mapping[str, int] = {
            self._backend.id_to_token(i): i for i in sorted(self.special_ids)
        }
        self._added_ids = np.array(sorted(added), np.int32)
        self._decodes_by_segment = self._segments_are_exact()
        self._encoding = (
            _splitting(self._backend, self.special_ids) if split_special_tokens else self._backend
        )
        self._splits = split_special_tokens
        self.spellable_ids = self._spelled_control_ids()
        if split_special_tokens and self.spellable_ids:
            tokens = ", ".join(self._backend.id_to_token(i) for i in sorted(self.spellable_ids)[:5])
            raise TokenizerError(
                f"{tokenizer_model}: text that spells {tokens} becomes that token even where it is to be "
                "split, as the vocabulary itself holds it; take --special-tokens-in-text encode or error"
            )

    @cached_property
    def incomplete_utf8(self) -> Mapping[int, bytes]:
        """Ids that stand for parts of characters -> their bytes; byte-level and byte-fallback decoders."""
        kinds = _kinds(json.loads(self._backend.to_str())["decoder"])
        literal = set(self._added_ids.tolist()) if self._decodes_by_segment else set()
        pieces = [
            (p, i) for p, i in self._backend.get_vocab(with_added_tokens=True).items() if i not in literal
        ]
        if "ByteLevel" in kinds:
            return incomplete_byte_level(pieces)
        return incomplete_byte_fallback(pieces) if "ByteFallback" in kinds else {}

    @property
    def encoder(self) -> str:
        """``gigatoken`` or ``tokenizers``, with the version; the first call compares the two."""
        return self._fast.name if self._fast else f"tokenizers {version('tokenizers')}"

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of type, vocabulary, merges, special ids and the ids of a fixed probe text.

        Equal for the same tokenizer saved in another form (vocab.json + merges.txt, or tokenizer.json).
        """
        model = json.loads(self._backend.to_str())["model"]
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", [])]
        identity = {
            "type": self.tokenizer_type,
            "vocab": sorted(self._backend.get_vocab(with_added_tokens=True).items()),
            "scores": model["vocab"] if isinstance(model["vocab"], list) else None,
            "merges": merges,
            "special": [self.eod, self.bos, self.pad, sorted(self.special_ids)],
            "template": [self.prefix_ids, self.suffix_ids],
            "probe": [self._backend.encode(p).ids for p in (_PROBE, self._probe_of_added_tokens())],
        }
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, with what the tokenizer's template adds."""
        ids: list[int] = self._encoding.encode(text).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """``encode`` of every text; int32 arrays.

        Threads: with gigatoken one, else as ``TOKENIZERS_PARALLELISM`` says.
        """
        return self._fast.encode_batch(texts) if self._fast else self._encode_standard(texts)

    def _encode_standard(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        return [
            np.array(encoding.ids, np.int32) for encoding in self._encoding.encode_batch_fast(list(texts))
        ]

    @cached_property
    def _fast(self) -> FastEncoder | None:
        definition = json.loads(self._encoding.to_str())
        added = definition["added_tokens"]
        if self._encoding.encode_special_tokens:
            definition["added_tokens"] = [token for token in added if not token["special"]]
        return find_fast_encoder(
            json.dumps(definition),
            self._encode_standard,
            self.prefix_ids,
            self.suffix_ids,
            [token["content"] for token in added],
        )

    def encode_chat(self, text: str, foreign: Sequence[tuple[int, int]]) -> PlacedIds:
        """The ids of ``AutoTokenizer.apply_chat_template``; of its ``sanitize_control_tokens=True`` where
        control tokens in the text are split.
        """
        whole, literal = self._bare_backends
        if not (self._splits and foreign):
            return _placed([(whole, text, 0)])
        bounds = [0, *(bound for span in foreign for bound in span), len(text)]
        pieces = zip(itertools.cycle((whole, literal)), itertools.pairwise(bounds))
        return _placed([(backend, text[start:stop], start) for backend, (start, stop) in pieces])

    @cached_property
    def _bare_backends(self) -> tuple[Any, Any]:
        """The tokenizer without its template, and one that splits control tokens too."""
        definition = json.loads(self._backend.to_str()) | {"post_processor": None}
        bare = RustTokenizer.from_str(json.dumps(definition))
        return bare, _splitting(bare, self.special_ids)

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        """The exact text of ``ids`` without the template's ids; special tokens are spelled out."""
        body = self._without_template(np.asarray(ids, np.int32))
        if not self._decodes_by_segment:
            return self._decode_run(body)
        parts = []
        for segment, special in split_at_ids(body, self._added_ids):
            parts.append(self._decode_run(segment))
            if special is not None:
                parts.append(self._backend.id_to_token(special))
        return "".join(parts)

    def _decode_run(self, ids: npt.NDArray[np.int32]) -> str:
        text: str = self._backend.decode(ids.tolist(), skip_special_tokens=False)
        return text

    def _template(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids that the template puts before and after a text."""
        bare = self._backend.encode("a", add_special_tokens=False).ids
        full = self._backend.encode("a").ids
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return tuple(full[:start]), tuple(full[start + len(bare) :])
        raise TokenizerError(
            f"{self.tokenizer_model} changes a text's own tokens when it adds special tokens"
        )

    def _without_template(self, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        prefix, suffix = self.prefix_ids, self.suffix_ids
        if prefix and tuple(ids[: len(prefix)].tolist()) == prefix:
            ids = ids[len(prefix) :]
        if suffix and tuple(ids[-len(suffix) :].tolist()) == suffix:
            ids = ids[: -len(suffix)]
        return ids

    def _segments_are_exact(self) -> bool:
        """Whether text between added tokens must be decoded on its own.

        True for tokenizers that put a space before every segment (Llama's), false for those that do so only
        at the start of a text; found by trying, as the answer hides in several fields of several versions.
        """
        if not self._added_ids.size:
            return False
        probe = self._probe_of_added_tokens()
        ids = self._without_template(np.array(self._backend.encode(probe).ids, np.int32))
        return self._decode_run(ids) != probe

    def _spelled_control_ids(self) -> frozenset[int]:
        """Control ids that the text of a control token gives, alone or beside other text."""
        contents = [self._backend.id_to_token(i) for i in sorted(self.special_ids)]
        texts = [text for content in contents for text in (content, f"a{content}b", f" {content} ")]
        found = {i for ids in self._bare_ids(texts) for i in ids} & self.special_ids
        return frozenset(found - (set(self._bare_ids([_RARE])[0]) - {self.eod}))

    def _bare_ids(self, texts: list[str]) -> list[list[int]]:
        encodings = self._encoding.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _probe_of_added_tokens(self) -> str:
        token = self._backend.id_to_token(int(self._added_ids[0])) if self._added_ids.size else ""
        return f"a{token} b{token}c"


def _placed(pieces: Sequence[tuple[Any, str, int]]) -> PlacedIds:
    """Encode pieces of a text, each with a tokenizer of its own, given with where it begins.

    As in transformers, a piece but the first is encoded after a line end that is then removed, so that it
    does not get the space that some tokenizers put before a text.
    """
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    for backend, piece, start in pieces:
        if not piece:
            continue
        encoding = backend.encode("\n" + piece if start else piece, add_special_tokens=False)
        line_end = backend.encode("\n", add_special_tokens=False).ids if start else []
        skipped = len(line_end)
        if encoding.ids[:skipped] != line_end:
            encoding, skipped = backend.encode(piece, add_special_tokens=False), 0
        shift = start - (1 if skipped else 0)
        ids += encoding.ids[skipped:]
        offsets += [(begin + shift, end + shift) for begin, end in encoding.offsets[skipped:]]
    starts_T, ends_T = np.array(offsets, np.int64).reshape(-1, 2).T
    return PlacedIds(np.array(ids, np.int32), starts_T, widened(starts_T, ends_T))


def _chat_template(loaded: Any) -> str | None:
    """The chat template of a tokenizer; of several the one named ``default``."""
    template = loaded.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None


def _splitting(backend: Any, special_ids: frozenset[int]) -> Any:
    """A copy of a Rust tokenizer that does not look for special tokens in the text."""
    definition = json.loads(backend.to_str())
    for token in definition["added_tokens"]:
        token["special"] = token["special"] or token["id"] in special_ids
    splitting = RustTokenizer.from_str(json.dumps(definition))
    splitting.encode_special_tokens = True
    return splitting


def _kinds(decoder: dict[str, Any] | None) -> set[str]:
    """The types of a decoder and of those inside it."""
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*(_kinds(inner) for inner in decoder.get("decoders", [])))


def _load(tokenizer_model: str) -> Any:
    path = Path(tokenizer_model)
    looks_local = path.is_absolute() or tokenizer_model.startswith(".") or tokenizer_model.count("/") > 1
    if path.is_file() or (looks_local and not path.is_dir()):
        raise TokenizerError(
            f"{tokenizer_model} {'is a file' if path.is_file() else 'does not exist'}; HuggingFaceTokenizer "
            "takes a folder with tokenizer.json (or vocab.json and merges.txt), or a model name of the hub"
        )
    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer_model, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        raise TokenizerError(
            f"cannot load a Hugging Face tokenizer from {tokenizer_model}: {error}"
        ) from error
    if not loaded.is_fast:
        raise TokenizerError(
            f"{tokenizer_model} has no fast tokenizer (tokenizer.json); "
            "if it has a tokenizer.model, use --tokenizer-type SentencePieceTokenizer"
        )
    return loaded


def _eod(loaded: Any, added: dict[int, Any], tokenizer_model: str) -> int:
    """The EOS id, as Megatron-LM takes it; where none is configured, the one token with a usual name."""
    if loaded.eos_token_id is not None:
        return int(loaded.eos_token_id)
    found = [i for i, token in added.items() if token.content in _EOD_NAMES]
    if len(found) != 1:
        raise TokenizerError(
            f'{tokenizer_model} names no end-of-text token; add "eos_token" to its tokenizer_config.json'
        )
    get_logger(__name__).warning(
        "%s names no eos_token; taking %s (id %d) as end of document",
        tokenizer_model,
        added[found[0]].content,
        found[0],
    )
    return found[0]
