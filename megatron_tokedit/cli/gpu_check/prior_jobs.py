"""The same weights as a Megatron and as a Hugging Face prior, and the corpus that each of them edits."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from megatron_tokedit.cli.gpu_check.data_jobs import HELD_OUT_TEXT, TOKENIZER
from megatron_tokedit.cli.gpu_check.sizes import Scale
from megatron_tokedit.cli.gpu_check.training_jobs import run_folder

HF_PRIOR = "hugging_face_prior"


def write_twin(folder: Path, scale: Scale, *, run: str) -> dict[str, Any]:
    """Write the newest checkpoint of a run as a Hugging Face model.

    A Hugging Face prior reads a document after BOS, a checkpoint of this package after the tokenizer's EOD:
    the twin's embedding of BOS, which no text holds, is therefore that of EOD.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from megatron_tokedit.config.sections import ModelConfig, ParallelConfig, PrecisionConfig
    from megatron_tokedit.conversion.architecture import to_theirs
    from megatron_tokedit.conversion.layouts import Sizes
    from megatron_tokedit.conversion.registry import ARCHITECTURES
    from megatron_tokedit.conversion.settings import hugging_face_config
    from megatron_tokedit.engine import checkpoint, checkpoint_folder
    from megatron_tokedit.engine.initialize import initialize
    from megatron_tokedit.engine.model import build_model, unwrap

    found = checkpoint_folder.require(run_folder(folder, run))
    model = ModelConfig.model_validate(checkpoint_folder.read_json(found, "run_config.json")["model"])
    vocab_size = checkpoint_folder.read_json(found, "state.json")["vocab_size"]
    ctx = initialize(ParallelConfig(), seed=0, standalone=True)
    chunks = build_model(
        model,
        PrecisionConfig(recipe="fp32"),
        ctx,
        vocab_size,
        parallel=ParallelConfig(),
        wrap_with_ddp=False,
        perform_initialization=False,
    )
    checkpoint.load(found, model=chunks, optimizer=None, scheduler=None, ctx=ctx)
    ours = {name: parameter.detach().cpu() for name, parameter in unwrap(chunks[0]).named_parameters()}
    theirs = to_theirs(ARCHITECTURES[model.family], Sizes(model, vocab_size), ours)
    theirs["model.embed_tokens.weight"] = _with_start(folder, theirs["model.embed_tokens.weight"])
    twin = AutoModelForCausalLM.from_config(hugging_face_config(model, vocab_size), dtype=torch.float32)
    twin.load_state_dict(theirs, strict=True)
    twin.save_pretrained(folder / HF_PRIOR)
    return {"parameters": sum(tensor.numel() for tensor in theirs.values())}


def _with_start(folder: Path, embedding_VH: Any) -> Any:
    """The embedding with EOD's row in BOS's place."""
    from megatron_tokedit.tokenizers import load_tokenizer

    tokenizer = load_tokenizer("SentencePieceTokenizer", str(folder / TOKENIZER))
    changed_VH = embedding_VH.clone()
    changed_VH[tokenizer.bos] = embedding_VH[tokenizer.eod]
    return changed_VH


def edit(folder: Path, scale: Scale, *, name: str, prior: str, dtype: str) -> dict[str, Any]:
    """Edit the held-out text through the preprocessing job.

    Args:
        folder: the work folder.
        scale: sizes.
        name: of the output; the dataset is ``edits/NAME_text_document``.
        prior: a run's name, or :data:`HF_PRIOR`.
        dtype: ``--prior-dtype``.

    Returns:
        Counts of the statistics, and the job's seconds (loading the prior included).
    """
    from megatron_tokedit.config.preprocess import preprocess_config
    from megatron_tokedit.pipeline import run

    place = folder / "edits"
    place.mkdir(exist_ok=True)
    source = folder / HF_PRIOR if prior == HF_PRIOR else run_folder(folder, prior)
    settings = {
        "input": [str(folder / HELD_OUT_TEXT)],
        "output_prefix": str(place / name),
        "tokenizer_type": "SentencePieceTokenizer",
        "tokenizer_model": str(folder / TOKENIZER),
        "append_eod": True,
        "workers": 1,
        "edit_strategy": "up_revise",
        "edit_threshold": scale.edit_threshold,
        "prior": str(source),
        "prior_dtype": dtype,
    }
    begin = time.perf_counter()
    result = run(preprocess_config(settings, origin="gpu_check"))
    seconds = time.perf_counter() - begin
    assert result.totals is not None
    counts = result.totals.keys["text"].edit
    assert counts is not None
    return {
        "prefix": result.prefixes["text"],
        "tokens": counts.tokens,
        "eligible": counts.eligible,
        "changed": counts.changed,
        "perplexity": counts.perplexity,
        "seconds": round(seconds, 2),
    }
