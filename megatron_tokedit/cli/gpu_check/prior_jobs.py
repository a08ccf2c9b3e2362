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
    """Write the newest checkpoint of a run as a Hugging Face Llama.

    A Hugging Face prior reads a document after BOS, a checkpoint of this package after the tokenizer's EOD:
    the twin's embedding of BOS, which no text holds, is therefore that of EOD.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_tokedit.config.sections import ModelConfig, ParallelConfig, PrecisionConfig
    from megatron_tokedit.engine import checkpoint, checkpoint_folder
    from megatron_tokedit.engine.initialize import initialize
    from megatron_tokedit.engine.model import build_model, unwrap

    found = checkpoint_folder.require(run_folder(folder, run))
    model = ModelConfig.model_validate(checkpoint_folder.read_json(found, "run_config.json")["model"])
    state = checkpoint_folder.read_json(found, "state.json")
    ctx = initialize(ParallelConfig(), seed=0, standalone=True)
    chunks = build_model(
        model,
        PrecisionConfig(recipe="fp32"),
        ctx,
        state["vocab_size"],
        parallel=ParallelConfig(),
        wrap_with_ddp=False,
        perform_initialization=False,
    )
    checkpoint.load(found, model=chunks, optimizer=None, scheduler=None, ctx=ctx)
    ours = {name: parameter.detach().cpu() for name, parameter in unwrap(chunks[0]).named_parameters()}
    twin = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=state["vocab_size"],
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_key_value_heads,
            head_dim=model.head_size,
            max_position_embeddings=model.max_positions,
            rms_norm_eps=model.norm_epsilon,
            tie_word_embeddings=False,
        )
    )
    theirs = their_weights(ours, model.num_layers, model.num_attention_heads, model.num_key_value_heads)
    theirs = {
        name: tensor[: state["vocab_size"]] if "embed" in name or "lm_head" in name else tensor
        for name, tensor in theirs.items()
    }
    theirs["model.embed_tokens.weight"] = _with_start(folder, theirs["model.embed_tokens.weight"])
    twin.load_state_dict(theirs, strict=True)
    twin.to(torch.float32).save_pretrained(folder / HF_PRIOR)
    return {"parameters": sum(tensor.numel() for tensor in theirs.values())}


def _with_start(folder: Path, embedding_VH: Any) -> Any:
    """The embedding with EOD's row in BOS's place."""
    from megatron_tokedit.tokenizers import load_tokenizer

    tokenizer = load_tokenizer("SentencePieceTokenizer", str(folder / TOKENIZER))
    changed_VH = embedding_VH.clone()
    changed_VH[tokenizer.bos] = embedding_VH[tokenizer.eod]
    return changed_VH


def their_weights(ours: dict[str, Any], num_layers: int, num_heads: int, num_groups: int) -> dict[str, Any]:
    """Llama weights under Hugging Face's names.

    Args:
        ours: by megatron-core's names, of local or of Transformer Engine's layers (whose norms are part of
            the linear layers behind them).
        num_layers: of the model.
        num_heads: query heads.
        num_groups: key/value heads.
    """
    theirs = {
        "model.embed_tokens.weight": ours["embedding.word_embeddings.weight"],
        "model.norm.weight": ours["decoder.final_layernorm.weight"],
        "lm_head.weight": ours["output_layer.weight"],
    }
    for layer in range(num_layers):
        source, target = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        attention, mlp = f"{source}self_attention.", f"{source}mlp."
        fused = f"{attention}linear_qkv.layer_norm_weight"
        norms = (
            (fused, f"{mlp}linear_fc1.layer_norm_weight")
            if fused in ours
            else (f"{source}input_layernorm.weight", f"{source}pre_mlp_layernorm.weight")
        )
        qkv = ours[f"{attention}linear_qkv.weight"]
        by_group = qkv.view(num_groups, num_heads // num_groups + 2, -1, qkv.size(1))
        queries, keys, values = by_group[:, :-2], by_group[:, -2], by_group[:, -1]
        gate, up = ours[f"{mlp}linear_fc1.weight"].chunk(2)
        theirs |= {
            f"{target}input_layernorm.weight": ours[norms[0]],
            f"{target}post_attention_layernorm.weight": ours[norms[1]],
            f"{target}self_attn.q_proj.weight": queries.reshape(-1, qkv.size(1)),
            f"{target}self_attn.k_proj.weight": keys.reshape(-1, qkv.size(1)),
            f"{target}self_attn.v_proj.weight": values.reshape(-1, qkv.size(1)),
            f"{target}self_attn.o_proj.weight": ours[f"{attention}linear_proj.weight"],
            f"{target}mlp.gate_proj.weight": gate,
            f"{target}mlp.up_proj.weight": up,
            f"{target}mlp.down_proj.weight": ours[f"{mlp}linear_fc2.weight"],
        }
    return {name: tensor.contiguous() for name, tensor in theirs.items()}


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
