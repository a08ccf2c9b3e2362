"""A Hugging Face model folder as a checkpoint of this package.

    OUTPUT/checkpoints/step_00000000/   the checkpoint, weights alone
    OUTPUT/tokenizer/                   the tokenizer's files, and config.json for the way back
    OUTPUT/continue.yaml                the sections of a RUN.yaml that goes on from here

Invariant: what is wrong with the folder is found before any weight is read, all of it at once.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_tokedit.config.model import ModelConfig, ParallelConfig
from megatron_tokedit.conversion.architecture import EMBEDDING, Architecture, Entry, join_rows
from megatron_tokedit.conversion.layouts import VOCABULARY, Sizes
from megatron_tokedit.conversion.output_folder import CONTINUE_FILE, TOKENIZER_FOLDER
from megatron_tokedit.conversion.registry import architecture_of
from megatron_tokedit.conversion.safetensors_files import StoredTensor, list_tensors, read_tensor
from megatron_tokedit.conversion.settings import layout_faults, read_settings, refuse
from megatron_tokedit.conversion.tokenizer_files import (
    CONFIG_FILE,
    find_tokenizer,
    keep_tokenizer,
    start_id,
    stop_ids,
    vocabulary_faults,
)
from megatron_tokedit.engine.streamed_checkpoint import write_checkpoint
from megatron_tokedit.engine.weight_outline import WeightOutline, outline_weights
from megatron_tokedit.errors import CheckpointError
from megatron_tokedit.log import get_logger
from megatron_tokedit.tokenizers import Tokenizer, tokenizer_spec

logger = get_logger(__name__)

_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_COMPARED_BYTES = 64 << 20
_RECORDED_PACKAGES = ("megatron_tokedit", "torch", "megatron-core", "transformers")


@dataclass(frozen=True, slots=True)
class PublishedModel:
    """A Hugging Face folder that can be converted.

    Attributes:
        folder: of the model.
        architecture: of it.
        model: its model section.
        sizes: of it.
        entries: of every weight, by our name.
        tensors: published name -> where it is.
        outline: of the model here.
        dtypes: of every weight here.
        tokenizer: of the model.
        stop_ids: at which the published model ends a text.
    """

    folder: Path
    architecture: Architecture
    model: ModelConfig
    sizes: Sizes
    entries: dict[str, Entry]
    tensors: dict[str, StoredTensor]
    outline: WeightOutline
    dtypes: dict[str, torch.dtype]
    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Of the weights that are read."""
        return sum(self.tensors[name].num_bytes for entry in self.entries.values() for name in entry.theirs)

    @property
    def start_id(self) -> int | None:
        """The id that a document follows."""
        return start_id(self.tokenizer)

    @property
    def dtype(self) -> torch.dtype:
        """Of the embedding, which stands for the model."""
        return self.dtypes[EMBEDDING]


def open_published(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    seq_length: int | None = None,
    tokenizer_type: str | None = None,
    tokenizer_model: str | None = None,
    parallel: ParallelConfig = ParallelConfig(),  # noqa: B008 - frozen
) -> PublishedModel:
    """Read everything of a folder but its weights.

    Args:
        folder: with ``config.json`` and safetensors files.
        dtype: of the checkpoint; default: as in the files, float16 as float32, which loses nothing.
        seq_length: longest text the model will see; default: what it was made for.
        tokenizer_type: see :func:`find_tokenizer`.
        tokenizer_model: likewise.
        parallel: a layout that the model is to be split in.

    Raises:
        CheckpointError: with everything that is wrong with the folder.
        TokenizerError: its tokenizer cannot be loaded.
    """
    architecture, config = _read_config(folder)
    model, faults = read_settings(architecture, config, seq_length=seq_length)
    if getattr(config, "quantization_config", None):
        faults.append("quantization_config: quantized weights are not converted; take the unquantized model")
    refuse(folder / CONFIG_FILE, "cannot be converted", faults)
    assert model is not None
    sizes = Sizes(model, config.vocab_size)
    tensors, faults = list_tensors(folder)
    tensors = _with_prefix(architecture, tensors)
    outline = outline_weights(model, config.vocab_size)
    entries = {entry.ours: entry for entry in architecture.entries(model)}
    assert entries.keys() == outline.shapes.keys(), "the architecture's rules do not cover the model"
    faults += _tensor_faults(architecture, sizes, entries, outline, tensors)
    tokenizer = find_tokenizer(folder, tokenizer_type, tokenizer_model)
    faults += vocabulary_faults(tokenizer, config.vocab_size) + layout_faults(model, parallel)
    refuse(folder, "cannot be converted", faults)
    _warn_of_ids(tokenizer, config)
    stored = {
        name: reduce(torch.promote_types, (tensors[part].dtype for part in entry.theirs))
        for name, entry in entries.items()
    }
    dtypes = {
        name: dtype or (torch.float32 if kind == torch.float16 else kind) for name, kind in stored.items()
    }
    return PublishedModel(
        folder,
        architecture,
        model,
        sizes,
        entries,
        tensors,
        outline,
        dtypes,
        tokenizer,
        stop_ids(folder),
    )


def _read_config(folder: Path) -> tuple[Architecture, Any]:
    from transformers import AutoConfig

    file = folder / CONFIG_FILE
    try:
        content = json.loads(file.read_text())
        model_type = content.get("model_type")
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{file}: is not a JSON object ({error})") from error
    architecture = architecture_of(model_type, str(file))
    try:
        return architecture, AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{file}: transformers does not take it: {reason[:500]}") from error


def _with_prefix(architecture: Architecture, tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors under full names, where a folder has those of the base model alone."""
    if any(name.startswith(architecture.prefix) for name in tensors):
        return tensors
    return {
        name if name.startswith("lm_head.") else architecture.prefix + name: tensor
        for name, tensor in tensors.items()
    }


def _tensor_faults(
    architecture: Architecture,
    sizes: Sizes,
    entries: dict[str, Entry],
    outline: WeightOutline,
    tensors: dict[str, StoredTensor],
) -> list[str]:
    """Missing, misshapen and surplus tensors."""
    wanted = {
        name: shape
        for entry in entries.values()
        for name, shape in zip(
            entry.theirs, entry.layout.shapes(outline.shapes[entry.ours], sizes), strict=True
        )
    }
    faults = [f"tensor {name}: missing" for name in wanted if name not in tensors]
    for name, tensor in tensors.items():
        if name in wanted and tensor.shape != wanted[name]:
            faults.append(f"tensor {name}: of shape {list(tensor.shape)}, expected {list(wanted[name])}")
        if name in wanted and tensor.dtype not in _WEIGHT_DTYPES:
            faults.append(f"tensor {name}: of {tensor.dtype}, expected float32, bfloat16 or float16")
    tied = architecture.tied_name(sizes.model)
    for name, tensor in tensors.items():
        if name in wanted or architecture.is_ignored(name):
            continue
        if name != tied:
            faults.append(f"tensor {name}: surplus, the model of {CONFIG_FILE} has none of this name")
        elif not _are_equal(tensor, tensors.get(entries[EMBEDDING].theirs[0])):
            faults.append(f"tensor {name}: differs from the embedding, to which {CONFIG_FILE} ties it")
    return faults


def _are_equal(left: StoredTensor, right: StoredTensor | None) -> bool:
    """Whether two tensors hold the same bytes, in constant memory."""
    if right is None or (left.shape, left.dtype) != (right.shape, right.dtype):
        return False
    for begin in range(0, left.num_bytes, _COMPARED_BYTES):
        size = min(_COMPARED_BYTES, left.num_bytes - begin)
        blocks = (
            read_tensor(
                dataclasses.replace(tensor, dtype=torch.uint8, shape=(size,), start=tensor.start + begin)
            )
            for tensor in (left, right)
        )
        if not torch.equal(*blocks):
            return False
    return True


def _warn_of_ids(tokenizer: Tokenizer, config: Any) -> None:
    known = config.eos_token_id
    if known is not None and tokenizer.eod not in (known if isinstance(known, list) else [known]):
        logger.warning(
            "the tokenizer's end of text is id %d, %s says %s: is it the model's tokenizer?",
            tokenizer.eod,
            CONFIG_FILE,
            known,
        )


def _template_state(tokenizer: Tokenizer) -> dict[str, Any]:
    """What the checkpoint records of the chat template, which training hands on."""
    if tokenizer.chat_template is None:
        return {}
    return {"chat_template": tokenizer.chat_template, "chat_template_name": "tokenizer"}


def write_checkpoint_folder(
    published: PublishedModel, staging: Path, output: Path, *, on_bytes: Callable[[int], object]
) -> None:
    """Convert the weights and write all files.

    Args:
        published: the model.
        staging: an empty folder.
        output: the name that it will have.
        on_bytes: called with the bytes of every weight that was read, from several threads.

    Raises:
        CheckpointError: a file cannot be read or written.
        TokenizerError: the tokenizer cannot be copied.
    """
    tokenizer = keep_tokenizer(published.tokenizer, staging / TOKENIZER_FOLDER, published.folder)
    spec = tokenizer_spec(tokenizer) | {"model": str((output / TOKENIZER_FOLDER).resolve())}
    model = published.model.model_dump(mode="json")
    recipe = "bf16" if published.dtype == torch.bfloat16 else "fp32"

    def read(name: str, first_row: int, num_rows: int) -> torch.Tensor:
        entry, shape = published.entries[name], published.outline.shapes[name]
        padded_rows = shape[0] if entry.layout is VOCABULARY else None

        def fetch(theirs: str) -> torch.Tensor:
            on_bytes(published.tensors[theirs].num_bytes)
            return read_tensor(published.tensors[theirs], num_rows=padded_rows)

        rows = range(first_row, first_row + num_rows)
        return join_rows(entry, published.sizes, shape, rows, fetch, published.dtypes[name])

    write_checkpoint(
        staging / "checkpoints",
        published.outline,
        dtypes=published.dtypes,
        read=read,
        state=_template_state(published.tokenizer)
        | {
            "step": 0,
            "consumed_samples": 0,
            "consumed_tokens": 0,
            "vocab_size": published.sizes.vocab_size,
            "tokenizer": spec,
            "start_id": published.start_id,
            "stop_ids": list(published.stop_ids),
            "converted_from": {"path": str(published.folder.resolve())},
            "versions": {name: version(name) for name in _RECORDED_PACKAGES},
        },
        run_config={"run_dir": str(output.resolve()), "model": model, "precision": {"recipe": recipe}},
    )
    sections = {
        "stage": "continue",
        "init_from": {"checkpoint": str(output.resolve()), "optimizer": "fresh"},
        "tokenizer": {"type": spec["type"], "model": spec["model"]},
        "model": {"family": published.model.family, **published.model.model_dump(exclude_defaults=True)},
        "precision": {"recipe": recipe},
    }
    text = yaml.safe_dump(sections, sort_keys=False, width=100)
    (staging / CONTINUE_FILE).write_text(f"# What a RUN.yaml that goes on from {output.name} needs\n{text}")
