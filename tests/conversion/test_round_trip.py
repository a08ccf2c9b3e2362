"""Published models of every family, built by transformers: same logits here, same bits on the way back."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import conversion_cases as cases
import numpy as np
import pytest
import yaml

from megatron_tokedit.config.model import ModelConfig
from megatron_tokedit.engine import checkpoint_folder
from megatron_tokedit.tokenizers import load_tokenizer, tokenizer_spec
from megatron_tokedit.training.resume import check_continuable

sys.path.append(str(Path(__file__).resolve().parents[1] / "engine"))
STORIES = Path(__file__).resolve().parents[3] / "shared" / "data" / "priors" / "stories260K"


def there_and_back(folder, name):
    """Logits of the published model, of the checkpoint, and of the model that is published again."""
    import torch

    source = cases.write_published(folder / "source", name)
    for origin, target in (("source", "checkpoint"), ("checkpoint", "back")):
        code, shown = cases.convert("--input", folder / origin, "--output", folder / target)
        assert code == 0, shown
    ids = cases.some_ids()
    want, _ = cases.published_logits(source, ids)
    back, warnings = cases.published_logits(folder / "back", ids)
    before, after = cases.tensors_of(source), cases.tensors_of(folder / "back")
    assert before.keys() == after.keys()
    assert all(before[key].dtype == after[key].dtype for key in before)
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    return want.numpy(), cases.our_logits(folder / "checkpoint", ids).numpy(), back.numpy(), warnings


@pytest.mark.parametrize("name", cases.PUBLISHED)
def test_same_logits_and_same_bits(ranks, tmp_path, name):
    ((want, ours, back, warnings),) = ranks.run(there_and_back, tmp_path, name, world_size=1)
    assert abs(want).max() > 1.0
    np.testing.assert_allclose(ours, want, atol=1e-4)
    assert (back == want).all()
    assert warnings == []
    assert not list(tmp_path.glob("*.partial"))
    source, again = (json.loads((tmp_path / part / "config.json").read_text()) for part in ("source", "back"))
    changed = {key for key in source.keys() | again.keys() if source.get(key) != again.get(key)}
    names = {"mistral": {"architectures", "model_type"}}.get(name, set())
    explicit = {"n_inner", "head_dim", "attention_bias", "mlp_bias", "pretraining_tp"} | {"sliding_window"}
    explicit |= {"rope_theta", "rope_scaling"}
    if name != "gpt2" and name != "gpt2-untied":  # as transformers 4 reads it
        assert again["rope_theta"] == source["rope_parameters"]["rope_theta"]
        assert (again["rope_scaling"] or {}).get("factor") == source["rope_parameters"].get("factor")
    assert changed <= names | explicit, {key: (source.get(key), again.get(key)) for key in changed}


def test_the_checkpoint_is_complete(ranks, tmp_path):
    source = cases.write_published(tmp_path / "source", "llama")
    output = tmp_path / "made" / "checkpoint"
    ((code, shown),) = ranks.run(cases.convert, "--input", source, "--output", output, world_size=1)
    assert code == 0
    assert "GB/s; peak memory" in shown
    folder = checkpoint_folder.require(output)
    assert folder == output / "checkpoints" / "step_00000000"
    state = checkpoint_folder.read_json(folder, "state.json")
    assert (state["step"], state["vocab_size"], state["start_id"]) == (0, cases.VOCAB_SIZE, None)
    assert state["tokenizer"]["model"] == str(output / "tokenizer")
    recorded = checkpoint_folder.read_json(folder, "run_config.json")
    assert recorded["precision"] == {"recipe": "fp32"}
    sections = yaml.safe_load((output / "continue.yaml").read_text())
    assert sections["init_from"]["checkpoint"] == str(output)
    model = ModelConfig.model_validate(sections["model"])
    assert model == ModelConfig.model_validate(recorded["model"]) == model.resolved()
    run = {"model": model.model_dump(mode="json"), "init_from": sections["init_from"]}
    tokenizer = tokenizer_spec(
        load_tokenizer(**{f"tokenizer_{k}": v for k, v in sections["tokenizer"].items()})
    )
    changes = check_continuable(
        str(folder),
        recorded_config=recorded,
        config=run | {"precision": sections["precision"]},
        recorded_tokenizer=state["tokenizer"],
        tokenizer=tokenizer,
    )
    assert changes == []
    assert (model.rotary_base, model.vocab_size, model.num_query_groups) == (10000, cases.VOCAB_SIZE, 2)


def load_and_evaluate(folder, **layout):
    """Loss of some batches under a layout, with an optimizer that starts from the weights."""
    import engine_cases

    from megatron_tokedit.engine import checkpoint

    recorded = checkpoint_folder.read_json(checkpoint_folder.require(folder), "run_config.json")
    model = ModelConfig.model_validate(recorded["model"])
    run = engine_cases.start(model, vocab_size=cases.VOCAB_SIZE, **layout)
    checkpoint.load(
        folder,
        model=run.model,
        optimizer=None,
        scheduler=None,
        ctx=run.ctx,
        main_parameters_of=run.optimizer,
    )
    loss = run.evaluate()
    return loss, run.steps(1)[0][0]


EXPERTS = {"tp": 2, "layout": {"sequence_parallel": True}}


@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "gpt2", "olmo", "mixtral"])
def test_loads_under_every_layout(ranks, tmp_path, name):
    source = cases.write_published(tmp_path / "source", name)
    ((code, shown),) = ranks.run(
        cases.convert, "--input", source, "--output", tmp_path / "made", world_size=1
    )
    assert code == 0, shown
    (alone,) = ranks.run(load_and_evaluate, tmp_path / "made", world_size=1)
    for layout in (EXPERTS if name == "mixtral" else {"tp": 2}, {"pp": 2}):
        spread = ranks.run(load_and_evaluate, tmp_path / "made", world_size=2, **layout)
        assert spread[-1] == pytest.approx(alone, rel=1e-5), layout


@pytest.mark.parametrize(
    ("stored", "asked", "recipe", "back"),
    [
        ("bfloat16", None, "bf16", "bfloat16"),
        ("float16", None, "fp32", "float32"),
        ("float32", "bfloat16", "bf16", "bfloat16"),
        ("bfloat16", "float32", "fp32", "float32"),
    ],
)
def test_dtypes(ranks, tmp_path, stored, asked, recipe, back):
    source = cases.write_published(tmp_path / "source", "qwen2-tied", dtype=stored)
    dtype = () if asked is None else ("--dtype", asked)
    calls = [
        ("--input", source, "--output", tmp_path / "made", *dtype),
        ("--input", tmp_path / "made", "--output", tmp_path / "back"),
        ("--input", tmp_path / "made", "--output", tmp_path / "half", "--dtype", "float16"),
    ]
    (results,) = ranks.run(cases.convert_all, calls, world_size=1)
    assert [code for code, _ in results] == [0, 0, 0], results
    recorded = checkpoint_folder.read_json(checkpoint_folder.require(tmp_path / "made"), "run_config.json")
    assert recorded["precision"]["recipe"] == recipe
    import torch

    written = {part: cases.tensors_of(tmp_path / part) for part in ("source", "back", "half")}
    assert {tensor.dtype for tensor in written["back"].values()} == {getattr(torch, back)}
    assert {tensor.dtype for tensor in written["half"].values()} == {torch.float16}
    if asked is None:  # nothing is lost
        kept = {name: tensor.to(getattr(torch, stored)) for name, tensor in written["back"].items()}
        assert all(torch.equal(kept[name], tensor) for name, tensor in written["source"].items())
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config["dtype"] == "float16"


def stories_nll(folder, start_id, documents):
    from megatron_tokedit.scoring.load import identify_prior, load_scorer, scoring_options

    identity = identify_prior(str(folder))
    options = scoring_options(identity, start_id=start_id, batch_tokens=2048, logits_bytes=1 << 24)
    scores = load_scorer(identity, options, device="cpu").score(documents)
    return float(np.concatenate([score.logprobs_T for score in scores]).sum(dtype=np.float64))


@pytest.mark.skipif(not STORIES.is_dir(), reason="../shared/data is not here")
def test_a_real_model_keeps_its_perplexity(ranks, tmp_path):
    pieces = ("--tokenizer-type", "SentencePieceTokenizer")
    calls = [
        ("--input", STORIES, "--output", tmp_path / "made", "--check", "--check-tokens", 512, *pieces),
        ("--input", tmp_path / "made", "--output", tmp_path / "back"),
    ]
    (results,) = ranks.run(cases.convert_all, calls, world_size=1)
    assert [code for code, _ in results] == [0, 0], results
    assert "check: 512 tokens in float32" in results[0][1]
    tokenizer = load_tokenizer("SentencePieceTokenizer", str(STORIES))
    texts = ["Once upon a time there was a little dog named Spot. He liked to play.", "The sun was hot."]
    documents = [np.array(tokenizer.encode(text * 40), np.int32) for text in texts]
    folders = (STORIES, tmp_path / "made", tmp_path / "back")
    (before,), (made,), (back,) = (
        ranks.run(stories_nll, folder, tokenizer.bos, documents, world_size=1) for folder in folders
    )
    assert made == pytest.approx(before, rel=1e-6)
    assert back == before
    again = load_tokenizer("HuggingFaceTokenizer", str(tmp_path / "back"))
    assert again.fingerprint == load_tokenizer("HuggingFaceTokenizer", str(STORIES)).fingerprint


def mixed_dtypes(folder):
    """Queries in bfloat16 beside keys in float32: which of their bits come back."""
    import torch
    from safetensors.torch import save_file

    source = cases.write_published(folder / "source", "llama", num_hidden_layers=1)
    tensors = cases.tensors_of(source)
    queries = "model.layers.0.self_attn.q_proj.weight"
    tensors[queries] = tensors[queries].bfloat16()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    for origin, target in (("source", "made"), ("made", "back")):
        code, shown = cases.convert("--input", folder / origin, "--output", folder / target)
        assert code == 0, shown
    back = cases.tensors_of(folder / "back")
    return [name for name, tensor in tensors.items() if not torch.equal(tensor.float(), back[name])]


def test_parts_of_different_dtypes(ranks, tmp_path):
    assert ranks.run(mixed_dtypes, tmp_path, world_size=1) == [[]]
