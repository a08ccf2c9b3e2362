"""Checkpoints that training wrote, under any layout, as Hugging Face folders."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import conversion_cases as cases
import numpy as np
import pytest

from megatron_tokedit.conversion.architecture import to_ours, to_theirs
from megatron_tokedit.conversion.layouts import Sizes
from megatron_tokedit.conversion.registry import ARCHITECTURES
from megatron_tokedit.conversion.settings import hugging_face_config
from megatron_tokedit.errors import CheckpointError
from megatron_tokedit.testing.models import tiny_model
from megatron_tokedit.tokenizers import load_tokenizer

sys.path.append(str(Path(__file__).resolve().parents[1] / "engine"))
PIECES = cases.DATA / "tiny_sentencepiece.model"
SHAPES = {
    "embedding.word_embeddings.weight": (96, 32),
    "output_layer.weight": (96, 32),
    "decoder.final_layernorm.weight": (32,),
    "input_layernorm.weight": (32,),
    "pre_mlp_layernorm.weight": (32,),
    "self_attention.linear_qkv.weight": (64, 32),
    "self_attention.linear_proj.weight": (32, 32),
    "mlp.linear_fc1.weight": (128, 32),
    "mlp.linear_fc2.weight": (32, 64),
}
"""Shapes of the tiny Llama's weights, by their names inside a layer."""
VOCAB_SIZE = 345  # more than the tokenizer's 340 pieces


def train(folder, model, tokenizer, more=None, **layout):
    import engine_cases

    from megatron_tokedit.engine import checkpoint

    run = engine_cases.start(model, vocab_size=VOCAB_SIZE, **layout)
    run.steps(1)
    checkpoint.save(
        folder / "checkpoints",
        model=run.model,
        optimizer=run.optimizer,
        scheduler=run.scheduler,
        state={"step": 1, "vocab_size": VOCAB_SIZE, "tokenizer": tokenizer} | (more or {}),
        run_config={"model": run.config.model_dump(), "precision": run.precision.model_dump()},
        ctx=run.ctx,
    )


def publish(folder, *flags):
    """Exit code and messages; logits of the checkpoint and of the folder; warnings of transformers."""
    code, shown = cases.convert("--input", folder / "run", "--output", folder / "hf", *flags)
    if code:
        return code, shown
    ids = cases.some_ids(VOCAB_SIZE)
    want = cases.our_logits(folder / "run", ids).float().numpy()
    got, warnings = cases.published_logits(folder / "hf", ids)
    return code, shown, want, got.float().numpy(), warnings


def spec_of(kind, model):
    from megatron_tokedit.tokenizers import tokenizer_spec

    return tokenizer_spec(load_tokenizer(kind, str(model)))


@pytest.mark.parametrize(
    ("family", "layout", "changes"),
    [
        ("llama", {"tp": 2}, {"make_vocab_size_divisible_by": 1}),
        ("gpt2", {"pp": 2, "recipe": "bf16"}, {}),
        ("mixtral", {"layout": {"expert_model_parallel_size": 2}}, {}),
        ("olmo", {"pp": 2}, {"share_embeddings_and_output_weights": True}),
    ],
    ids=["llama-tp2", "gpt2-pp2-bf16", "mixtral-ep2", "olmo-pp2-tied"],
)
def test_any_layout_is_published(ranks, tmp_path, family, layout, changes):
    model = tiny_model(family, init_method_std=0.2, **changes)
    spec = spec_of("SentencePieceTokenizer", PIECES)
    ranks.run(train, tmp_path / "run", model, spec, world_size=2, **layout)
    ((code, shown, want, got, warnings),) = ranks.run(publish, tmp_path, world_size=1)
    assert code == 0, shown
    assert warnings == []
    tolerance = 0.15 if layout.get("recipe") == "bf16" else 1e-4
    np.testing.assert_allclose(got, want, atol=tolerance)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    eod = spec["eod"]
    ids = {name: config[f"{name}_token_id"] for name in ("bos", "eos", "pad")}
    assert ids == {"bos": eod, "eos": eod, "pad": 3}, "training lets a document follow the end of another"
    assert config["dtype"] == ("bfloat16" if layout.get("recipe") == "bf16" else "float32")


def test_a_sentencepiece_model_is_published_as_a_fast_tokenizer(ranks, tmp_path):
    spec = spec_of("SentencePieceTokenizer", PIECES)
    ranks.run(train, tmp_path / "run", tiny_model("llama"), spec, world_size=1)
    (result,) = ranks.run(publish, tmp_path, "--check", "--check-tokens", 300, world_size=1)
    assert result[0] == 0, result[1]
    assert "check: 300 tokens" in result[1]
    assert "encodes some text otherwise" not in result[1]
    pieces, fast = load_tokenizer("SentencePieceTokenizer", str(PIECES)), tmp_path / "hf"
    tokenizer = load_tokenizer("HuggingFaceTokenizer", str(fast))
    assert (fast / "tokenizer.model").read_bytes() == PIECES.read_bytes()
    assert (tokenizer.eod, tokenizer.bos, tokenizer.prefix_ids) == (pieces.eod, pieces.eod, (pieces.eod,))
    for text in ("Hello  world,\n\n  this is  a test.", " lead", "na\u00efve \u4f60\u597d \U0001f600\t x  "):
        assert tokenizer.encode(text) == [pieces.eod, *pieces.encode(text)]


def test_the_start_token_is_the_checkpoints(ranks, tmp_path):
    """Beside the tokenizer lie a fast one that puts another token before a text, and a model's settings."""
    model = tiny_model("llama")
    ranks.run(train, tmp_path / "a" / "run", model, spec_of("SentencePieceTokenizer", PIECES), world_size=1)
    ranks.run(publish, tmp_path / "a", world_size=1)
    origin = tmp_path / "a" / "hf"
    for file in ("config.json", "generation_config.json"):
        settings = json.loads((origin / file).read_text()) | {"eos_token_id": [2, 4], "bos_token_id": 1}
        (origin / file).write_text(json.dumps(settings))
    for start, part in ((1, "b"), (2, "c"), (None, "d")):
        spec, more = spec_of("SentencePieceTokenizer", origin), {"start_id": start}
        ranks.run(train, tmp_path / part / "run", model, spec, more, world_size=1)
        ((code, shown, *_),) = ranks.run(publish, tmp_path / part, world_size=1)
        assert code == 0, shown
        folder = tmp_path / part / "hf"
        for file in ("config.json", "generation_config.json"):
            settings = json.loads((folder / file).read_text())
            assert (settings["bos_token_id"], settings["eos_token_id"]) == (start or 1, [2, 4])
        tokenizer = load_tokenizer("HuggingFaceTokenizer", str(folder))
        assert tokenizer.prefix_ids == (() if start is None else (start,))


def test_the_tokenizer_must_be_the_recorded_one(ranks, tmp_path):
    moved = shutil.copyfile(PIECES, tmp_path / "gone.model")
    ranks.run(
        train, tmp_path / "run", tiny_model("llama"), spec_of("SentencePieceTokenizer", moved), world_size=1
    )
    moved.unlink()
    other = (
        "--tokenizer-type",
        "HuggingFaceTokenizer",
        "--tokenizer-model",
        cases.DATA / "tiny_byte_level_bpe",
    )
    common = ("--input", tmp_path / "run", "--output", tmp_path / "hf")
    calls = [common, (*common, *other), (*common, "--tokenizer-model", PIECES)]
    (((gone, missing), (wrong, different), (right, shown)),) = ranks.run(
        cases.convert_all, calls, world_size=1
    )
    assert (gone, wrong, right) == (1, 1, 0), shown
    assert "gone.model: No such file" in missing
    assert "is not the one that" in different
    assert "give that one with --tokenizer-model" in different


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gpt2", {"num_query_groups": 2}, "num_query_groups: 2; GPT-2 has as many key/value heads as"),
        ("gpt2", {"kv_channels": 16}, "kv_channels: 4 heads of 16 make 64; GPT-2's make hidden_size = 32"),
        ("olmo", {"norm_epsilon": 1e-6}, "norm_epsilon: 1e-06; published models of family olmo have 1e-05"),
        (
            "llama",
            {"rope_scaling": True, "seq_len_interpolation_factor": 2.0},
            "seq_len_interpolation_factor: no published model has it beside rope_scaling",
        ),
    ],
)
def test_what_no_published_model_computes(family, changes, message):
    with pytest.raises(CheckpointError, match="no Hugging Face model computes this: 1 problem") as caught:
        hugging_face_config(tiny_model(family, **changes), 90)
    assert message in str(caught.value)


def test_a_configuration_for_others():
    config = hugging_face_config(tiny_model("llama"), 90, token_ids={"eos_token_id": 3}, use_cache=False)
    assert (type(config).__name__, config.vocab_size, config.head_dim) == ("LlamaConfig", 90, 8)
    assert (config.eos_token_id, config.bos_token_id, config.use_cache) == (3, None, False)


def _inside_layer(name):
    return re.sub(r"decoder\.layers\.\d+\.", "", name)


def test_weights_of_transformer_engines_layers_in_memory():
    """Its norms are part of the linear layers behind them."""
    import torch

    sizes = Sizes(tiny_model("llama"), 90)
    published = {
        name: torch.randn(shape)
        for entry in ARCHITECTURES["llama"].entries(sizes.model)
        for name, shape in zip(
            entry.theirs, entry.layout.shapes(SHAPES[_inside_layer(entry.ours)], sizes), strict=True
        )
    }
    ours = to_ours(ARCHITECTURES["llama"], sizes, published, padded_vocab_size=96)
    assert ours["output_layer.weight"].shape == (96, 32)
    fused = {
        name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_").replace(
            "pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"
        ): tensor
        for name, tensor in ours.items()
    }
    assert fused.keys() != ours.keys()
    theirs = to_theirs(ARCHITECTURES["llama"], sizes, fused)
    assert theirs.keys() == published.keys()
    assert all(torch.equal(theirs[name], published[name]) for name in published)
