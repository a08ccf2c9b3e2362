"""Finding out what a prior is, cheaply, and loading it.

:func:`identify_prior` reads configuration and hashes weights, without building a model: enough to plan a job,
to check a tokenizer and to recognise that a rerun uses the same prior. :func:`load_scorer` builds the model.

Invariant: the two agree; the scorer's fingerprint starts from the identity's.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch

from megatron_tokedit.errors import ConfigError, PriorError
from megatron_tokedit.scoring.identity import (
    ONE_PROCESS,
    UNLIMITED_TOKENS,
    Backend,
    PriorFiles,
    PriorIdentity,
    PriorLayout,
    read_files,
)
from megatron_tokedit.scoring.scorer import Backbone, CausalScorer, ScoringOptions

DEFAULT_CONTEXT_TOKENS = 2048
DEFAULT_OVERLAP_TOKENS = 512


def detect_backend(path: str) -> Backend:
    """Tell a Hugging Face model folder from a Megatron checkpoint folder by its content.

    Raises:
        PriorError: it is neither.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise PriorError(f"{path}: no such folder")
    if (folder / "config.json").is_file():
        return "hf"
    if any((folder / name).exists() for name in ("COMPLETE.json", "latest", "checkpoints")):
        return "megatron"
    raise PriorError(
        f"{path}: neither a Hugging Face model folder (no config.json) nor a Megatron checkpoint "
        "(a step folder with COMPLETE.json, or a run folder with checkpoints/)"
    )


def identify_prior(
    path: str, backend: Literal["auto", "hf", "megatron"] = "auto", *, known: PriorFiles | None = None
) -> PriorIdentity:
    """Describe a prior without loading its weights into a model.

    Args:
        path: the folder.
        backend: what it is; ``auto``: as its content tells.
        known: its files as they were found before; unchanged ones are not hashed again.

    Raises:
        PriorError: the folder is not a usable prior.
    """
    if (detect_backend(path) if backend == "auto" else backend) == "megatron":
        from megatron_tokedit.scoring.megatron import identify_checkpoint

        return identify_checkpoint(path, known)
    from megatron_tokedit.scoring.huggingface import context_limit, load_config, weight_files

    config = load_config(path)
    files = weight_files(path)
    return PriorIdentity(
        path=path,
        backend="hf",
        files=read_files(files, known),
        weight_bytes=sum(file.stat().st_size for file in files[1:]),
        vocab_size=config.vocab_size,
        max_context_tokens=context_limit(config),
        tokenizer_fingerprint=None,
    )


def scoring_options(
    identity: PriorIdentity,
    *,
    start_id: int | None,
    context_tokens: int | None = None,
    overlap_tokens: int | None = None,
    batch_tokens: int,
    logits_bytes: int,
) -> ScoringOptions:
    """How a prior is used, with defaults that fit it.

    Args:
        identity: the prior.
        start_id: id put before each window.
        context_tokens: tokens a window; default: the model's limit, 2048 where it states none.
        overlap_tokens: of them context only; default: 512, or a quarter of a smaller window.
        batch_tokens: positions a forward.
        logits_bytes: memory of the head.

    Raises:
        ConfigError: a window that the model cannot take, or an overlap as long as the window.
    """
    limit = identity.max_context_tokens
    context = context_tokens or (limit if limit < UNLIMITED_TOKENS else DEFAULT_CONTEXT_TOKENS)
    overlap = overlap_tokens or min(DEFAULT_OVERLAP_TOKENS, max(1, context // 4))
    if context > limit:
        raise ConfigError(f"a context of {context} tokens: the model {identity.path} takes at most {limit}")
    if overlap >= context:
        raise ConfigError(f"an overlap of {overlap} tokens: expected less than the context of {context}")
    return ScoringOptions(context, overlap, start_id, batch_tokens, logits_bytes)


def load_scorer(
    identity: PriorIdentity, options: ScoringOptions, *, dtype: str = "float32", device: str = "auto"
) -> CausalScorer:
    """Load a prior into this process; ``replica.load_scorer`` loads one into several.

    Args:
        identity: from :func:`identify_prior`.
        options: windows and batches.
        dtype: ``float32``, ``bfloat16`` or, of a Hugging Face model, ``float16``; of a Megatron checkpoint
            also ``fp8``, ``fp8_blockwise`` and ``mxfp8``.
        device: ``auto`` (CUDA where there is a device), ``cpu`` or ``cuda``.

    Raises:
        PriorError: the model cannot be loaded or does not fit the scorer.
        ConfigError: options that the model cannot honour, or a device that is not there.
    """
    target = resolve_device(device)
    check_dtype(identity, dtype)
    backbone: Backbone
    if identity.backend == "megatron":
        from megatron_tokedit.scoring.megatron import MegatronBackbone, load_part

        model = load_part(identity, dtype=dtype, device=target, layout=ONE_PROCESS)
        backbone = MegatronBackbone(identity, model, dtype=dtype)
    else:
        from megatron_tokedit.scoring.huggingface import HuggingFaceBackbone

        backbone = HuggingFaceBackbone(
            identity.path, fingerprint=identity.fingerprint, dtype=dtype, device=target
        )
    return CausalScorer(backbone, options)


def check_dtype(identity: PriorIdentity, dtype: str, layout: PriorLayout = ONE_PROCESS) -> None:
    """Refuse a precision or a layout that a prior cannot be scored in here, without loading it.

    Raises:
        ConfigError: with the reason.
        PriorError: a checkpoint is damaged.
    """
    if identity.backend == "megatron":
        from megatron_tokedit.scoring import megatron

        megatron.check_dtype(identity, dtype, layout)
        return
    if layout.num_ranks > 1:
        raise ConfigError(
            f"prior_tensor_parallel={layout.tensor}, prior_pipeline_parallel={layout.pipeline}: the Hugging "
            f"Face prior {identity.path} runs in one process; make a Megatron checkpoint of it and give it:\n"
            f"  python tools/convert_checkpoint.py --from hf --to megatron --input {identity.path} "
            "--output CHECKPOINT"
        )
    from megatron_tokedit.scoring.huggingface import DTYPES

    if dtype not in DTYPES:
        raise ConfigError(
            f"prior_dtype={dtype}: the Hugging Face prior {identity.path} is scored in "
            f"{' or '.join(DTYPES)}; FP8 is for Megatron checkpoints: give one of these or such a checkpoint"
        )


def resolve_device(device: str) -> torch.device:
    """The device a name stands for; of several GPUs the one that LOCAL_RANK says, else the first.

    Raises:
        ConfigError: CUDA is asked for and not there.
    """
    num_gpus = torch.cuda.device_count()
    if device == "cpu" or (device == "auto" and not num_gpus):
        return torch.device("cpu")
    if not num_gpus:
        raise ConfigError(f"prior_device={device}: no CUDA device is usable here; give cpu or auto")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % num_gpus)
