"""The model that makes vectors of documents: sentence-transformers, from a folder or from the hub.

Invariant: a choice names a folder on this machine and the contents of its files, so that what is computed
with it can be kept.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_tokedit import log
from megatron_tokedit.analysis.embedding import Vectors
from megatron_tokedit.errors import ConfigError, PriorError, first_line

logger = log.get_logger(__name__)
DEFAULT_TOKENS = 512
_BATCH_SIZE = 32
_NOT_THE_MODEL = (".md", ".png", ".onnx", ".h5", ".ot", ".msgpack")


@dataclass(frozen=True, slots=True)
class EmbeddingChoice:
    """Which model, and how it is used; picklable.

    Attributes:
        name: as given.
        folder: where its files are.
        fingerprint: SHA-256 (hex) of them.
        device: ``cpu`` or ``cuda``.
        max_tokens: tokens of a document that are read, in the model's own.
    """

    name: str
    folder: str
    fingerprint: str
    device: str
    max_tokens: int


def choose_embedding_model(name: str, device: str, max_tokens: int | None) -> EmbeddingChoice:
    """Find the model's files, on this machine or on the hub.

    Args:
        name: a folder, of sentence-transformers or of transformers (then the mean of the last layer), or a
            name on the hub.
        device: ``auto``, ``cpu`` or ``cuda``.
        max_tokens: of a document that are wanted (default: 512, or the model's limit).

    Raises:
        ConfigError: no such model, or the package is missing.
        PriorError: the device is missing, a file cannot be read, or the model cannot be loaded.
    """
    if importlib.util.find_spec("sentence_transformers") is None:
        raise ConfigError(
            "--embedding-model: needs sentence-transformers: pip install 'megatron_tokedit[embedding]'"
        )
    # imported here: these import torch, which an analysis without a model does not need
    from megatron_tokedit.scoring.identity import hash_files
    from megatron_tokedit.scoring.load import resolve_device

    folder = Path(name) if os.path.isdir(name) else _fetch(name)
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix not in _NOT_THE_MODEL]
    if not (folder / "config.json").is_file() and not (folder / "modules.json").is_file():
        raise ConfigError(f"--embedding-model {name}: has neither config.json nor modules.json")
    kind = resolve_device(device).type
    choice = EmbeddingChoice(name, str(folder), hash_files(files), kind, max_tokens or DEFAULT_TOKENS)
    # loaded here, so that a model that cannot be is known before all the counting
    limit = EmbeddingModel(choice).max_tokens
    if max_tokens and limit < max_tokens:
        logger.warning("--embedding-tokens %d: %s reads %d at most", max_tokens, name, limit)
    return replace(choice, max_tokens=limit)


def _fetch(name: str) -> Path:
    """The folder of a model on the hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(name, ignore_patterns=[f"*{suffix}" for suffix in _NOT_THE_MODEL]))
    except (HFValidationError, HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise ConfigError(
            f"--embedding-model {name}: is no folder here, and the hub does not give it: {first_line(error)}"
        ) from error


class EmbeddingModel:
    """A loaded model.

    Args:
        choice: which.

    Attributes:
        max_tokens: of a document that it reads: what is asked for, or the model's own limit.

    Raises:
        PriorError: the files are no model.
    """

    def __init__(self, choice: EmbeddingChoice) -> None:
        import torch
        from safetensors import SafetensorError
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.models import Pooling
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        if choice.device == "cpu":
            torch.set_num_threads(1)  # workers are processes, and the last bits must not depend on them
        try:
            self._model = SentenceTransformer(choice.folder, device=choice.device)
            if not (Path(choice.folder) / "modules.json").is_file():  # its own choice is the last token
                reader: Any = self._model[0]
                pooling = Pooling(reader.get_embedding_dimension(), pooling_mode="mean")
                self._model = SentenceTransformer(modules=[reader, pooling], device=choice.device)
            tokenizer = self._model.tokenizer
            if tokenizer.pad_token is None:  # models that write text have none
                tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        except (OSError, ValueError, KeyError, RuntimeError, AttributeError, SafetensorError) as error:
            message = f"--embedding-model {choice.name}: cannot be loaded: {first_line(error)}"
            raise PriorError(message) from error
        self.max_tokens = min(self._model.max_seq_length or choice.max_tokens, choice.max_tokens)
        self._model.max_seq_length = self.max_tokens

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Vectors of length 1, float32 ``[len(texts), H]``."""
        vectors: Vectors = self._model.encode(
            list(texts),
            batch_size=_BATCH_SIZE,
            normalize_embeddings=True,
            convert_to_numpy=True,
            show_progress_bar=False,
        ).astype("float32")
        return vectors
