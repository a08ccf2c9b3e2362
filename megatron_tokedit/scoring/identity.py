"""What a prior is, as far as its files tell without building a model.

Invariant: two folders with the same configuration and weights have the same fingerprint, wherever they lie.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from megatron_tokedit.errors import PriorError

Backend = Literal["hf", "megatron"]
UNLIMITED_TOKENS = 1 << 30
"""``max_context_tokens`` of a model that states no limit."""
_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class PriorFiles:
    """The files that determine a prior's scores, so that unchanged ones need not be read again.

    Attributes:
        states: file name -> [size in bytes, time of change in ns].
        fingerprint: SHA-256 (hex) of their contents.
    """

    states: dict[str, list[int]]
    fingerprint: str

    def to_json(self) -> dict[str, Any]:
        """The fields, as JSON types."""
        return {"states": self.states, "fingerprint": self.fingerprint}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """What :meth:`to_json` gave."""
        return cls(states=value["states"], fingerprint=value["fingerprint"])


@dataclass(frozen=True, slots=True)
class PriorLayout:
    """How many processes hold one copy of a prior.

    Attributes:
        tensor: ranks that share every layer.
        pipeline: stages that share the layers among them.
    """

    tensor: int = 1
    pipeline: int = 1

    @property
    def num_ranks(self) -> int:
        """Processes of a copy."""
        return self.tensor * self.pipeline


ONE_PROCESS = PriorLayout()


@dataclass(frozen=True, slots=True)
class PriorIdentity:
    """What a prior is, from its files alone.

    Attributes:
        path: the folder, as given.
        backend: ``hf`` or ``megatron``.
        files: the configuration and the weights.
        weight_bytes: size of the weights on disk.
        vocab_size: real vocabulary of the model.
        max_context_tokens: longest input.
        tokenizer_fingerprint: of the tokenizer it was trained with, where the folder records it.
        start_id: the id that a document follows in the text it was trained on, where the folder records it (a
            Megatron checkpoint: the end of the document before, a converted one: what its original has);
            None: as the tokenizer says.
    """

    path: str
    backend: Backend
    files: PriorFiles
    weight_bytes: int
    vocab_size: int
    max_context_tokens: int
    tokenizer_fingerprint: str | None
    start_id: int | None = None

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the configuration and the weights."""
        return self.files.fingerprint


def read_files(paths: Sequence[Path], known: PriorFiles | None) -> PriorFiles:
    """Hash files, unless they are as ``known`` says.

    Raises:
        PriorError: a file cannot be read.
    """
    try:
        found = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}
    except OSError as error:
        raise PriorError(f"{error.filename}: cannot be read: {error.strerror}") from error
    if known is not None and known.states == found:
        return known
    return PriorFiles(found, hash_files(paths))


def hash_files(paths: Sequence[Path]) -> str:
    """SHA-256 (hex) over names and contents of files, in constant memory.

    Raises:
        PriorError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                digest.update(f"{path.name} {path.stat().st_size}\n".encode())
                while block := file.read(_BLOCK_BYTES):
                    digest.update(block)
        except OSError as error:
            raise PriorError(f"{path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()
