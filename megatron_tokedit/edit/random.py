"""Random numbers keyed by (seed, generation, document, position), whoever draws them and in whatever order.

A document's key is a hash of its text, so it does not depend on files, shards, units or workers (two
documents with the same text are edited alike). From it comes the key of a Philox4x64 counter-based generator,
and the uniform of position t is the generator's t-th output.

Invariant: no state is shared between documents, and a position's number does not depend on which other
positions are edited.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.random.bit_generator import ISeedSequence


def document_key(sequences: Sequence[str]) -> bytes:
    """16 bytes that identify a document by its text alone.

    Args:
        sequences: the document's strings; how the text is divided among them counts.
    """
    digest = hashlib.blake2b(digest_size=16, person=b"tokedit-document")
    for text in sequences:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.digest()


def uniforms(key: bytes, num_tokens: int, *, seed: int, generation: int = 1) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for each position of a document.

    Args:
        key: from :func:`document_key`.
        num_tokens: T, positions of the document.
        seed: the run's seed, any integer >= 0 below 2**64.
        generation: 1 for the first edit of a corpus, 2 for an edit of its result, and so on.

    Returns:
        float64 ``[T]`` with 53 random bits each.
    """
    digest = hashlib.blake2b(key, digest_size=16, person=b"tokedit-uniforms")
    digest.update(seed.to_bytes(8, "little"))
    digest.update(generation.to_bytes(8, "little"))
    seed_sequence: Any = _Key(digest.digest())  # numpy takes any ISeedSequence, its annotations do not
    raw_T = np.random.Philox(seed_sequence).random_raw(num_tokens)
    return (raw_T >> np.uint64(11)).astype(np.float64) * 2.0**-53


class _Key(ISeedSequence):
    """Gives a bit generator its key as it is.

    ``Philox(key=...)`` gives the same generator, but takes longer than all its numbers: it first draws a seed
    from the operating system.
    """

    def __init__(self, key: bytes) -> None:
        self._key = np.frombuffer(key, "<u8")

    def generate_state(self, n_words: int, dtype: npt.DTypeLike = np.uint64) -> npt.NDArray[Any]:
        """The key, two words of 64 bits."""
        assert n_words == len(self._key)
        return self._key.astype(dtype)
