"""A checkpoint as a Hugging Face model folder.

Invariant: the folder is complete: ``AutoModelForCausalLM`` and ``AutoTokenizer`` load it without this
package, and it scores text as the checkpoint does, after the same start token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from megatron_tokedit.conversion.architecture import EMBEDDING, Architecture, Entry
from megatron_tokedit.conversion.layouts import Sizes
from megatron_tokedit.conversion.output_folder import TOKENIZER_FOLDER
from megatron_tokedit.conversion.registry import ARCHITECTURES
from megatron_tokedit.conversion.safetensors_files import MAX_SHARD_BYTES, ShardWriter
from megatron_tokedit.conversion.settings import hugging_face_config, hugging_face_faults, refuse
from megatron_tokedit.conversion.tokenizer_files import (
    CONFIG_FILE,
    read_generation_settings,
    vocabulary_faults,
    write_chat_template,
    write_tokenizer,
)
from megatron_tokedit.engine.streamed_checkpoint import StoredWeights
from megatron_tokedit.errors import TokenizerError
from megatron_tokedit.log import get_logger
from megatron_tokedit.tokenizers import Tokenizer, load_tokenizer

logger = get_logger(__name__)

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """A checkpoint that can be converted.

    Attributes:
        weights: of it.
        architecture: to write.
        entries: of every weight.
        dtypes: to write, by our name of a weight.
        tokenizer: that the model was trained with.
        start_id: the id that a document follows.
    """

    weights: StoredWeights
    architecture: Architecture
    entries: tuple[Entry, ...]
    dtypes: dict[str, torch.dtype]
    tokenizer: Tokenizer
    start_id: int | None

    @property
    def sizes(self) -> Sizes:
        """Of the model."""
        return Sizes(self.weights.model, self.weights.vocab_size)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Published name -> shape, in the order of writing."""
        ours = self.weights.outline.shapes
        return {
            name: shape
            for entry in self.entries
            for name, shape in zip(
                entry.theirs, entry.layout.shapes(ours[entry.ours], self.sizes), strict=True
            )
        }

    @property
    def dtype(self) -> torch.dtype:
        """Of the embedding, which stands for the model."""
        return self.dtypes[EMBEDDING]

    @property
    def num_bytes(self) -> int:
        """Of the weights that are read."""
        shapes = self.shapes
        return sum(
            torch.Size(shapes[name]).numel() * self.weights.dtype(entry.ours).itemsize
            for entry in self.entries
            for name in entry.theirs
        )


def open_trained(
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    tokenizer_type: str | None = None,
    tokenizer_model: str | None = None,
) -> TrainedModel:
    """Read everything of a checkpoint but its weights.

    Args:
        path: a run folder or a step folder.
        dtype: to write; default: of every weight what it is stored in.
        tokenizer_type: default: as recorded.
        tokenizer_model: where the recorded tokenizer lies now, if it was moved.

    Raises:
        CheckpointError: with everything that is wrong with the checkpoint.
        TokenizerError: its tokenizer is not there, or is another one.
    """
    weights = StoredWeights(path)
    refuse(weights.folder, "no Hugging Face model computes this", hugging_face_faults(weights.model))
    hugging_face_config(weights.model, weights.vocab_size)
    architecture = ARCHITECTURES[weights.model.family]
    entries = architecture.entries(weights.model)
    assert {entry.ours for entry in entries} == weights.outline.shapes.keys()
    tokenizer = _recorded_tokenizer(weights, tokenizer_type, tokenizer_model)
    refuse(weights.folder, "cannot be converted", vocabulary_faults(tokenizer, weights.vocab_size))
    dtypes = {entry.ours: dtype or weights.dtype(entry.ours) for entry in entries}
    start = weights.state.get("start_id", tokenizer.eod)
    return TrainedModel(weights, architecture, entries, dtypes, tokenizer, start)


def _recorded_tokenizer(weights: StoredWeights, kind: str | None, model: str | None) -> Tokenizer:
    """The checkpoint's tokenizer: where the user says, where it was, or beside the checkpoint."""
    spec = weights.state.get("tokenizer") or {}
    kind = kind or spec.get("type")
    beside = weights.folder.parent.parent / TOKENIZER_FOLDER
    place = model or spec.get("model")
    if model is None and place is not None and not Path(place).exists() and beside.is_dir():
        place = str(beside)
    if kind is None or place is None:
        raise TokenizerError(
            f"{weights.folder}: does not record its tokenizer; give --tokenizer-type and --tokenizer-model"
        )
    tokenizer = load_tokenizer(kind, str(place))
    recorded = spec.get("fingerprint")
    if recorded not in (None, tokenizer.fingerprint):
        raise TokenizerError(
            f"tokenizer {place}: is not the one that {weights.folder} was trained with "
            f"({spec.get('model')}); give that one with --tokenizer-model"
        )
    return tokenizer


def write_hugging_face_folder(
    trained: TrainedModel,
    folder: Path,
    *,
    on_bytes: Callable[[int], object],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Convert the weights and write all files.

    Args:
        trained: the checkpoint.
        folder: empty.
        on_bytes: called with the bytes of every weight that was read.
        max_shard_bytes: largest file of weights.

    Raises:
        CheckpointError: a file cannot be read or written.
        TokenizerError: the tokenizer cannot be copied.
    """
    _write_settings(trained, folder)  # the weights last: what can be wrong is known before they are read
    write_tokenizer(trained.tokenizer, folder, trained.start_id)
    template = trained.weights.state.get("chat_template", trained.tokenizer.chat_template)
    if template is not None:
        write_chat_template(template, trained.tokenizer, folder)
    dtypes = {name: trained.dtypes[entry.ours] for entry in trained.entries for name in entry.theirs}
    with ShardWriter(folder, trained.shapes, dtypes, max_shard_bytes=max_shard_bytes) as writer:
        for entry, ours in _weights(trained):
            on_bytes(ours.nbytes)
            for name, part in zip(entry.theirs, entry.layout.split(ours, trained.sizes), strict=True):
                writer.write(name, part)


def _weights(trained: TrainedModel) -> Iterator[tuple[Entry, torch.Tensor]]:
    """Every weight of the checkpoint; while one is written, the next is read."""
    with ThreadPoolExecutor(max_workers=1) as reader:
        upcoming: Future[torch.Tensor] | None = None
        for entry, after in zip_longest(trained.entries, trained.entries[1:]):
            ours = (upcoming or reader.submit(trained.weights.read, entry.ours)).result()
            upcoming = reader.submit(trained.weights.read, after.ours) if after is not None else None
            yield entry, ours
            del ours


def _write_settings(trained: TrainedModel, folder: Path) -> None:
    origin = _origin_folder(trained)
    ids = _token_ids(trained, origin)
    config = hugging_face_config(
        trained.weights.model,
        trained.weights.vocab_size,
        token_ids=ids,
        dtype=str(trained.dtype).removeprefix("torch."),
    )
    config.save_pretrained(folder)
    _add_old_rope_settings(folder / CONFIG_FILE)
    _generation_settings(trained, origin, ids).save_pretrained(folder)


def _generation_settings(trained: TrainedModel, origin: Path | None, ids: dict[str, Any]) -> Any:
    """The published model's ``GenerationConfig``, but for a start token of training's own."""
    from transformers import GenerationConfig

    kept = None if origin is None else read_generation_settings(origin)
    if origin is None or kept is None:
        ends = list(trained.weights.state.get("stop_ids") or ())
        return GenerationConfig(**ids | ({"eos_token_id": ends if ends[1:] else ends[0]} if ends else {}))
    if ids["bos_token_id"] != _published_ids(origin).get("bos_token_id"):
        kept.bos_token_id = ids["bos_token_id"]
    return kept


def _add_old_rope_settings(file: Path) -> None:
    """Say the rotary positions in the words of transformers 4 too, which reads no ``rope_parameters`` and
    would rotate by its default base, without a warning; transformers 5 takes either.
    """
    content = json.loads(file.read_text())
    if rope := content.get("rope_parameters"):
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        content["rope_theta"] = rope["rope_theta"]
        content["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
        file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _origin_folder(trained: TrainedModel) -> Path | None:
    """Where the settings of the published model lie that this one comes from: beside its tokenizer."""
    place = Path(trained.tokenizer.tokenizer_model)
    place = place if place.is_dir() else place.parent
    try:
        content = json.loads((place / CONFIG_FILE).read_text())
    except (OSError, ValueError):
        return None
    fits = content.get("model_type") in trained.architecture.model_types
    return place if fits and content.get("vocab_size") == trained.weights.vocab_size else None


def _token_ids(trained: TrainedModel, origin: Path | None) -> dict[str, Any]:
    """Ids of ``config.json``: the published model's or else the tokenizer's, but for a start token that
    training has changed.
    """
    tokenizer = trained.tokenizer
    says = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eod, "pad_token_id": tokenizer.pad}
    ids = says | (_published_ids(origin) if origin is not None else {"bos_token_id": None})
    if tokenizer.bos is not None and tokenizer.bos in tokenizer.prefix_ids:
        ids["bos_token_id"] = tokenizer.bos
    elif trained.start_id is not None:
        ids["bos_token_id"] = trained.start_id
    return ids


def _published_ids(origin: Path) -> dict[str, Any]:
    """Ids that a ``config.json`` names; others have a default of their family in transformers, whatever the
    tokenizer.
    """
    content = json.loads((origin / CONFIG_FILE).read_text())
    return {name: content[name] for name in _IDS if name in content}
