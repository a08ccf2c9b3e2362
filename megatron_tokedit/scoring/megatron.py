"""A Megatron checkpoint of this package as a backbone, in one process or in the processes of a replica.

In FP8 the linear layers of the transformer layers are Transformer Engine's, under the recipe of the dtype's
name; the output layer and the log-probabilities are as in bfloat16.

Invariant: hidden states come from the same model code that training runs, but for what ``megatron_layers``
replaces on a CPU; rows of the output layer beyond the real vocabulary (padding for tensor parallelism) never
take part in a softmax.
"""

from __future__ import annotations

import hashlib

import orjson
import torch

from megatron_tokedit.engine import checkpoint_folder
from megatron_tokedit.engine.inference import LanguageModel, load_language_model, scoring_faults
from megatron_tokedit.errors import CheckpointError, ConfigError, PriorError
from megatron_tokedit.scoring.head import OutputHead
from megatron_tokedit.scoring.identity import PriorFiles, PriorIdentity, PriorLayout, read_files
from megatron_tokedit.scoring.megatron_layers import speed_up
from megatron_tokedit.scoring.scorer import ModelSize
from megatron_tokedit.scoring.vocabulary import VocabularyShard

RECIPES = {
    "float32": "fp32",
    "bfloat16": "bf16",
    "fp8": "fp8_tensorwise",
    "fp8_blockwise": "fp8_blockwise",
    "mxfp8": "mxfp8",
}
"""Precision of a prior -> recipe of the engine."""


def identify_checkpoint(path: str, known: PriorFiles | None = None) -> PriorIdentity:
    """Describe the newest complete checkpoint under ``path`` without loading it.

    Args:
        path: a step folder or a run folder.
        known: its files as they were found before; unchanged ones are not hashed again.

    Raises:
        PriorError: there is no complete checkpoint, or it does not say what model it holds.
    """
    try:
        folder = checkpoint_folder.require(path)
        run_config = checkpoint_folder.read_json(folder, checkpoint_folder.RUN_CONFIG_FILE)
        state = checkpoint_folder.read_json(folder, checkpoint_folder.STATE_FILE)
        model = run_config["model"]
        vocab_size = int(state["vocab_size"])
        max_context_tokens = int(model.get("max_position_embeddings") or model["seq_length"])
    except (CheckpointError, KeyError) as error:
        raise PriorError(f"prior {path}: not a usable Megatron checkpoint: {error}") from error
    tokenizer = state.get("tokenizer") or {}
    files = orjson.loads((folder / checkpoint_folder.MARKER).read_bytes())["files"]
    return PriorIdentity(
        path=str(folder),
        backend="megatron",
        files=read_files([folder / name for name in sorted(files)], known),
        weight_bytes=sum((folder / name).stat().st_size for name in files if name.endswith(".distcp")),
        vocab_size=vocab_size,
        max_context_tokens=max_context_tokens,
        tokenizer_fingerprint=tokenizer.get("fingerprint"),
        start_id=state["start_id"] if "start_id" in state else tokenizer.get("eod"),
    )


def check_dtype(identity: PriorIdentity, dtype: str, layout: PriorLayout) -> None:
    """Refuse a precision that a checkpoint is not scored in or that this machine does not have, and sizes
    that do not divide the model.

    Raises:
        ConfigError: with every reason.
        PriorError: the checkpoint is damaged.
    """
    if dtype not in RECIPES:
        raise ConfigError(
            f"prior_dtype={dtype}: the Megatron checkpoint {identity.path} is scored in "
            f"{' or '.join(RECIPES)}; give one of these"
        )
    try:
        faults = scoring_faults(identity.path, RECIPES[dtype], tensor=layout.tensor, pipeline=layout.pipeline)
    except CheckpointError as error:
        raise PriorError(f"prior {identity.path}: {error}") from error
    of_layout = [fault.problem for fault in faults if fault.path[:1] == ("parallel",)]
    if of_layout:
        raise ConfigError(
            f"prior_tensor_parallel={layout.tensor}, prior_pipeline_parallel={layout.pipeline}: "
            f"{'; '.join(of_layout)} (the model of {identity.path})"
        )
    if faults:
        problems = "; ".join(fault.problem for fault in faults)
        raise ConfigError(f"prior_dtype={dtype}: {problems} (prior_dtype bfloat16 is the recipe bf16)")


def load_part(
    identity: PriorIdentity, *, dtype: str, device: torch.device, layout: PriorLayout
) -> LanguageModel:
    """This process's part of a checkpoint: all of it, or that of a rank of the process group.

    Args:
        identity: from :func:`identify_checkpoint`.
        dtype: one of ``RECIPES``, checked.
        device: where it runs; a CUDA device is the process's current one.
        layout: processes of a copy; more than one need a process group of as many. Collective over it.

    Raises:
        PriorError: the checkpoint cannot be loaded.
        ConfigError: a precision that checkpoints are not scored in, that this machine does not have, or sizes
            that do not fit.
    """
    try:
        return load_language_model(
            identity.path,
            device=device.type,
            precision=RECIPES[dtype],
            tensor=layout.tensor,
            pipeline=layout.pipeline,
        )
    except CheckpointError as error:
        raise PriorError(f"prior {identity.path}: {error}") from error


class MegatronBackbone:
    """A loaded checkpoint, or the part of a rank of the last stage; see :class:`Backbone` for the members.

    Args:
        identity: from :func:`identify_checkpoint`.
        model: from :func:`load_part`.
        dtype: that it was loaded in.
    """

    def __init__(self, identity: PriorIdentity, model: LanguageModel, *, dtype: str) -> None:
        self.model = model
        """As it was given, but for what is faster now."""
        self.device = model.device
        self.max_context_tokens = model.max_context_tokens
        self.fingerprint = hashlib.sha256(f"{identity.fingerprint} {dtype}".encode()).hexdigest()
        self.size = ModelSize(*model.count_parameters())
        speed_up(model)
        first_id, shard = model.first_output_id, None
        if model.ctx.tp_size > 1:
            shard = VocabularyShard(first_id, model.vocab_size, model.tensor_parallel_group)
        self.head = OutputHead(model.output_weight[: max(0, model.vocab_size - first_id)], shard=shard)

    def hidden_states(self, ids_BL: torch.Tensor) -> torch.Tensor:
        """Final hidden states ``[B, L, H]``."""
        return self.model.hidden_states(ids_BL)
