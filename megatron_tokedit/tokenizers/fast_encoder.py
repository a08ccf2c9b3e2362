"""gigatoken in the place of the tokenizers library, where it is installed and gives the same ids.

Invariant: the ids are the tokenizers library's, always. gigatoken is compared with it on a demanding set of
texts before it is used, and texts with characters that the two may treat by different editions of Unicode
never reach it. Its memory is bounded: it remembers every word that it has seen, so it is started afresh now
and then.
"""

from __future__ import annotations

import importlib
import multiprocessing
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_tokedit.log import get_logger
from megatron_tokedit.tokenizers.probes import outside, probe_texts, sure_characters

logger = get_logger(__name__)
EncodeBatch = Callable[[Sequence[str]], list[npt.NDArray[np.int32]]]
_MAX_CHARACTERS = 64 << 20
"""After so much text gigatoken is started afresh. It keeps some ten bytes for every byte of text that is
nothing but new words, far less for natural text."""


class FastEncoder:
    """Encodes with gigatoken on the calling thread, and what it may not see with the standard library.

    Args:
        gigatoken: the module.
        definition: contents of tokenizer.json.
        standard: the tokenizers library's encoding.
        prefix_ids: ids before every text.
        suffix_ids: ids after every text.

    Raises:
        Exception: gigatoken cannot represent the tokenizer.
    """

    def __init__(
        self,
        gigatoken: Any,
        definition: str,
        standard: EncodeBatch,
        prefix_ids: tuple[int, ...],
        suffix_ids: tuple[int, ...],
    ) -> None:
        self.name = f"gigatoken {version('gigatoken')}"
        self._load = gigatoken.Tokenizer.from_json
        self._definition = definition
        self._standard = standard
        self._prefix = np.array(prefix_ids, np.int32)
        self._suffix = np.array(suffix_ids, np.int32)
        self._unsure = outside(sure_characters())
        self._characters = 0
        self._restart()

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """int32 ids of every text, the template's included."""
        arrays = [self._encode(text) if self._may_see(text) else None for text in texts]
        rest = iter(self._standard([text for text, ids in zip(texts, arrays, strict=True) if ids is None]))
        return [next(rest) if ids is None else ids for ids in arrays]

    def _may_see(self, text: str) -> bool:
        return text.isascii() or not self._unsure.search(text)

    def _encode(self, text: str) -> npt.NDArray[np.int32]:
        self._characters += len(text)
        if self._characters > _MAX_CHARACTERS:
            self._restart()
            self._characters = len(text)
        ids: npt.NDArray[np.int32] = self._encode_one(text).view(np.int32)
        if self._prefix.size or self._suffix.size:
            return np.concatenate((self._prefix, ids, self._suffix))
        return ids

    def _restart(self) -> None:
        """Forget all words."""
        self._encode_one = self._load(self._definition).backend.encode
        self._characters = 0


def find_fast_encoder(
    definition: str,
    standard: EncodeBatch,
    prefix_ids: tuple[int, ...],
    suffix_ids: tuple[int, ...],
    added_tokens: Sequence[str],
) -> FastEncoder | None:
    """The encoder of gigatoken, where it is installed and gives the ids of the tokenizers library.

    Where it is installed and of no use here, one message of the main process says why.

    Args:
        definition: contents of tokenizer.json.
        standard: the tokenizers library's encoding.
        prefix_ids: ids that the template puts before every text.
        suffix_ids: ids after every text.
        added_tokens: tokens that the tokenizer looks for in a text.
    """
    try:
        gigatoken = importlib.import_module("gigatoken")
    except ModuleNotFoundError as error:
        if error.name == "gigatoken":
            return None
        reason = f"it cannot be imported ({error})"
    else:
        try:
            encoder = FastEncoder(gigatoken, definition, standard, prefix_ids, suffix_ids)
            different = _first_difference(encoder, standard, added_tokens)
            if different is None:
                return encoder
            reason = f"it gives other ids for {different!a}"
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - a panic in Rust is no Exception
            reason = f"it cannot represent this tokenizer ({error})"
    if multiprocessing.parent_process() is None:
        logger.warning("gigatoken is installed but not used, as %s; the ids are the same, slower", reason)
    return None


def _first_difference(encoder: FastEncoder, standard: EncodeBatch, added_tokens: Sequence[str]) -> str | None:
    """The beginning of the first text of which the two make different ids."""
    probes = [text for text in probe_texts(added_tokens) if encoder._may_see(text)]
    for text, fast, slow in zip(probes, encoder.encode_batch(probes), standard(probes), strict=True):
        if not np.array_equal(fast, slow):
            return text if len(text) <= 20 else text[:20] + "..."
    return None
