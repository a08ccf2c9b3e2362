"""Hugging Face folders and Megatron checkpoints behind the one contract."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_tokedit.errors import ConfigError, PriorError
from megatron_tokedit.scoring import identity as identity_module
from megatron_tokedit.scoring.base import CandidateRequest
from megatron_tokedit.scoring.identity import PriorFiles
from megatron_tokedit.scoring.load import check_dtype, identify_prior, load_scorer
from megatron_tokedit.scoring.packed import PackedLinear
from megatron_tokedit.scoring.scorer import ScoringOptions
from megatron_tokedit.testing.models import write_hf_gpt2, write_hf_llama

OPTIONS = ScoringOptions(
    context_tokens=16, overlap_tokens=4, start_id=None, batch_tokens=64, logits_bytes=5000
)
STORIES = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "priors" / "stories260K"


def own_logprobs(path, ids):
    """The model's own answer for one short document."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        logprobs = model(torch.tensor([ids.tolist()])).logits[0].float().log_softmax(-1)
    return logprobs


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("priors")
    from transformers import (
        CohereConfig,
        CohereForCausalLM,
        Gemma2Config,
        Gemma2ForCausalLM,
        PhiConfig,
        PhiForCausalLM,
    )

    small = {
        "vocab_size": 60,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    gemma = Gemma2ForCausalLM(Gemma2Config(**small, head_dim=8, final_logit_softcapping=2.0))
    cohere = CohereForCausalLM(CohereConfig(**small, logit_scale=3.0))
    phi = PhiForCausalLM(PhiConfig(**small))
    torch.nn.init.normal_(phi.lm_head.bias)
    for name, model in (("softcap", gemma), ("scale", cohere), ("bias", phi)):
        model.save_pretrained(root / name)
    write_hf_llama(root / "llama", vocab_size=61)
    write_hf_gpt2(root / "tied", vocab_size=59)
    return root


@pytest.mark.parametrize("name", ["llama", "tied", "softcap", "scale", "bias"])
def test_hugging_face_scores_are_the_models_own(folders, name):
    identity = identify_prior(str(folders / name))
    assert identity.backend == "hf"
    scorer = load_scorer(identity, OPTIONS)
    ids = np.random.default_rng(0).integers(3, 59, 12).astype(np.int32)
    own = own_logprobs(folders / name, ids)
    (short, scores) = scorer.score([ids[:3], ids], CandidateRequest(5, ((-np.inf, np.inf),), (0, 1, 2)))
    assert np.isnan(scores.logprobs_T[0])
    expected = own[:-1].gather(1, torch.tensor(ids[1:].astype(np.int64))[:, None])[:, 0]
    np.testing.assert_allclose(scores.logprobs_T[1:], expected, atol=1e-4)
    np.testing.assert_allclose(short.logprobs_T[1:], expected[:2], atol=1e-4)
    own[:, :3] = -torch.inf
    np.testing.assert_array_equal(scores.candidate_positions_E, np.arange(1, 12))
    np.testing.assert_allclose(scores.candidate_logprobs_EK, own[:-1].topk(5).values, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    ["GPT2", "GPTNeoX", "Llama", "Mistral", "Qwen2", "Qwen3", "Olmo", "Olmo2", "Gemma", "Gemma2"],
)
def test_packed_layers_give_the_models_own_scores(tmp_path, name):
    """Every architecture whose layers are replaced on a CPU; the replaced ones are really there."""
    import transformers

    config = getattr(transformers, f"{name}Config")(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    getattr(
        transformers, f"{name}{'LMHead' if name == 'GPT2' else 'ForCausalLM'}{'Model' * (name == 'GPT2')}"
    )(config).save_pretrained(tmp_path)
    identity = identify_prior(str(tmp_path))
    ids = np.random.default_rng(0).integers(3, 60, 14).astype(np.int32)
    own = own_logprobs(tmp_path, ids)[:-1].gather(1, torch.tensor(ids[1:].astype(np.int64))[:, None])[:, 0]
    for dtype, tolerance, per_layer in (("float32", 1e-4, 1), ("bfloat16", 0.3, 4)):
        scorer = load_scorer(identity, OPTIONS, dtype=dtype, device="cpu")
        packed = [m for m in scorer.backbone.model.modules() if isinstance(m, PackedLinear)]
        assert len(packed) >= 2 * per_layer
        assert not any(isinstance(m, PackedLinear) for m in (scorer.backbone.model.get_output_embeddings(),))
        (scores,) = scorer.score([ids])
        np.testing.assert_allclose(scores.logprobs_T[1:], own, atol=tolerance)


def test_float16_is_near(folders):
    identity = identify_prior(str(folders / "llama"))
    ids = [np.arange(3, 40, dtype=np.int32)]
    exact = load_scorer(identity, OPTIONS).score(ids)[0].logprobs_T
    scores = load_scorer(identity, OPTIONS, dtype="float16").score(ids)[0].logprobs_T
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores[1:], exact[1:], atol=0.02)
    assert not np.array_equal(scores, exact)


def test_unchanged_files_are_not_read_again(tmp_path, monkeypatch):
    folder = write_hf_llama(tmp_path / "prior", vocab_size=61)
    first = identify_prior(str(folder))
    (weights,) = folder.glob("*.safetensors")
    assert first.weight_bytes == weights.stat().st_size
    known = PriorFiles.from_json(json.loads(json.dumps(first.files.to_json())))
    assert known == first.files
    assert set(known.states) == {"config.json", weights.name}

    hashed = []
    original = identity_module.hash_files
    monkeypatch.setattr(identity_module, "hash_files", lambda paths: hashed.append(paths) or original(paths))
    assert identify_prior(str(folder), known=known) == first
    assert hashed == []
    write_hf_llama(folder, vocab_size=61, seed=1)
    assert identify_prior(str(folder), known=known).fingerprint != first.fingerprint
    assert len(hashed) == 1


def test_bfloat16_is_near(folders):
    identity = identify_prior(str(folders / "llama"))
    ids = [np.arange(3, 40, dtype=np.int32)]
    exact = load_scorer(identity, OPTIONS).score(ids)[0].logprobs_T
    scorer = load_scorer(identity, OPTIONS, dtype="bfloat16")
    np.testing.assert_allclose(scorer.score(ids)[0].logprobs_T[1:], exact[1:], atol=0.1)
    assert scorer.fingerprint != load_scorer(identity, OPTIONS).fingerprint


def test_fingerprint_changes_with_a_weight(folders, tmp_path):
    first = identify_prior(str(folders / "llama"))
    other = identify_prior(str(write_hf_llama(tmp_path / "other", vocab_size=61, seed=1)))
    assert first.fingerprint == identify_prior(str(folders / "llama")).fingerprint != other.fingerprint


def test_damaged_priors_are_refused(folders, tmp_path):
    with pytest.raises(PriorError, match="no such folder"):
        identify_prior(str(tmp_path / "nothing"))
    with pytest.raises(PriorError, match="neither a Hugging Face"):
        identify_prior(str(tmp_path))
    broken = write_hf_llama(tmp_path / "broken", vocab_size=61)
    (weights,) = broken.glob("*.safetensors")
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(PriorError, match="cannot be loaded"):
        load_scorer(identify_prior(str(broken)), OPTIONS)
    weights.unlink()
    with pytest.raises(PriorError, match="no weights"):
        identify_prior(str(broken))
    (broken / "config.json").write_text("{")
    with pytest.raises(PriorError, match="not a usable"):
        identify_prior(str(broken))


def test_missing_weights_are_refused(folders, tmp_path):
    folder = write_hf_llama(tmp_path / "short", vocab_size=61)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] + 1})
    )
    with pytest.raises(PriorError, match="missing from the folder"):
        load_scorer(identify_prior(str(folder)), OPTIONS)


@pytest.mark.parametrize("dtype", ["fp8", "fp8_blockwise", "mxfp8"])
def test_fp8_is_not_for_hugging_face_priors(folders, dtype):
    identity = identify_prior(str(folders / "llama"))
    words = f"prior_dtype={dtype}: the Hugging Face prior .*llama is scored in .*bfloat16"
    with pytest.raises(ConfigError, match=words):
        check_dtype(identity, dtype)
    with pytest.raises(ConfigError, match=words):
        load_scorer(identity, OPTIONS, dtype=dtype)


def test_context_beyond_the_model_is_refused(folders):
    identity = identify_prior(str(folders / "llama"))
    with pytest.raises(ConfigError, match="takes at most"):
        load_scorer(identity, ScoringOptions(identity.max_context_tokens + 2, 4, None, 64, 5000))


def rescaled_llama(folder, factor):
    """A tiny Llama whose output layer is so much larger."""
    from safetensors.torch import load_file, save_file

    write_hf_llama(folder, vocab_size=61)
    (weights,) = folder.glob("*.safetensors")
    tensors = load_file(weights)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * factor
    save_file(tensors, weights, metadata={"format": "pt"})
    return identify_prior(str(folder))


def test_large_logits_in_low_precision_are_no_reason_to_refuse(tmp_path):
    identity = rescaled_llama(tmp_path / "large", 300.0)
    exact = load_scorer(identity, OPTIONS).score([np.arange(3, 15, dtype=np.int32)])[0].logprobs_T
    assert np.nanmin(exact) < -20  # logits so large that bfloat16 rounds them by tenths
    scores = load_scorer(identity, OPTIONS, dtype="bfloat16").score([np.arange(3, 15, dtype=np.int32)])
    assert np.nanmax(np.abs(scores[0].logprobs_T - exact)) < 0.05 * np.nanmax(np.abs(exact))


def test_a_prior_with_nan_in_its_head_is_called_damaged(tmp_path):
    with pytest.raises(PriorError, match="not finite numbers; the weights are damaged"):
        load_scorer(rescaled_llama(tmp_path / "damaged", float("nan")), OPTIONS)
