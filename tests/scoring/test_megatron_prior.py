"""A checkpoint written by the engine (TP2) is a prior; its scores are the softmax of its own logits."""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
import pytest

from megatron_tokedit.config.preprocess import preprocess_config
from megatron_tokedit.engine import inference, preflight
from megatron_tokedit.errors import ConfigError, PriorError
from megatron_tokedit.pipeline import resources
from megatron_tokedit.scoring.load import check_dtype, identify_prior, load_scorer
from megatron_tokedit.testing.models import tiny_llama

sys.path += [str(Path(__file__).resolve().parents[1] / "engine"), str(Path(__file__).resolve().parent)]


def save_checkpoint(folder, model):
    import engine_cases

    run = engine_cases.start(model, tp=2)
    run.steps(1)
    run.save(folder, 1)


def scores_and_own_logprobs(folder, ids):
    import torch

    from megatron_tokedit.engine.inference import load_language_model
    from megatron_tokedit.scoring.base import CandidateRequest
    from megatron_tokedit.scoring.load import load_scorer
    from megatron_tokedit.scoring.scorer import ScoringOptions

    identity = identify_prior(folder)
    options = ScoringOptions(
        context_tokens=16, overlap_tokens=4, start_id=1, batch_tokens=64, logits_bytes=5000
    )
    scorer = load_scorer(identity, options, device="cpu")
    (scores,) = scorer.score([ids], CandidateRequest(500, ((-np.inf, np.inf),), (0,)))
    model = load_language_model(folder, device="cpu")
    hidden = model.hidden_states(torch.tensor([[1, *ids[:-1].tolist()]]))
    logits = (hidden @ model.output_weight.T)[0, :, : model.vocab_size].float()
    return scores, logits.log_softmax(-1).numpy(), scorer.vocab_size, scorer.fingerprint


def run_contract(folder):
    """Every check of the contract on a checkpoint; names of those that ran."""
    import contract
    import torch

    from megatron_tokedit.config.sections import PrecisionConfig
    from megatron_tokedit.engine.inference import load_language_model
    from megatron_tokedit.scoring.load import load_scorer
    from megatron_tokedit.scoring.scorer import CausalScorer

    identity = identify_prior(folder)
    model = load_language_model(folder, device="cpu")
    backbone = load_scorer(identity, contract.options(), device="cpu").backbone
    matrices = sum(p.numel() for name, p in model.gpt.named_parameters() if "linear" in name and p.ndim == 2)
    assert backbone.size.num_matmul_parameters == matrices + identity.vocab_size * 32
    assert backbone.size.attention_width == 4 * 32

    @contract.remembered
    @torch.inference_mode()
    def logprobs(ids):
        hidden = model.hidden_states(torch.tensor([ids]))[0]
        return (hidden @ model.output_weight[: model.vocab_size].T).float().log_softmax(-1).numpy()

    own = backbone.model.precision
    for deferred, recipe in ((False, None), (True, None), (True, "mxfp8")):  # mxfp8: inputs are filled up
        backbone.model.precision = PrecisionConfig(recipe=recipe) if recipe else own

        def make(options, deferred=deferred):
            return CausalScorer(backbone, options, deferred=deferred)

        for check in contract.CHECKS:
            check(contract.Subject(make, logprobs, identity.vocab_size))
    return [check.__name__ for check in contract.CHECKS]


def test_a_checkpoint_keeps_the_contract(ranks, tmp_path):
    import contract

    ranks.run(save_checkpoint, tmp_path, tiny_llama(init_method_std=0.5), world_size=2)
    (names,) = ranks.run(run_contract, str(tmp_path), world_size=1)
    assert names == [check.__name__ for check in contract.CHECKS]
    with pytest.raises(ConfigError, match=r"prior_dtype=float16.*float32 or bfloat16"):
        load_scorer(identify_prior(str(tmp_path)), contract.options(), dtype="float16", device="cpu")


@pytest.fixture(scope="module")
def run_folder(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    ranks.run(save_checkpoint, folder, tiny_llama(), world_size=2)
    return folder


@pytest.mark.parametrize("dtype", ["fp8", "fp8_blockwise", "mxfp8"])
def test_fp8_on_a_machine_without_a_gpu_is_refused(run_folder, dtype):
    import contract

    identity = identify_prior(str(run_folder))
    for refused in (
        lambda: check_dtype(identity, dtype),
        lambda: load_scorer(identity, contract.options(), dtype=dtype, device="cpu"),
    ):
        with pytest.raises(ConfigError) as error:
            refused()
        assert f"prior_dtype={dtype}: " in str(error.value)
        assert "no CUDA device" in str(error.value)
        assert "prior_dtype bfloat16" in str(error.value)
    check_dtype(identity, "bfloat16")


@pytest.mark.parametrize(
    ("gpu", "dtype", "words"),
    [
        ("h100", "fp8", None),
        ("h100", "fp8_blockwise", None),
        ("h100", "mxfp8", "compute capability 10.0"),
        ("a100", "fp8", "compute capability 8.9"),
        ("b200", "mxfp8", None),
    ],
)
def test_fp8_where_the_machine_has_it(run_folder, monkeypatch, gpu, dtype, words):
    monkeypatch.setattr(preflight, "probe", lambda: preflight.assumed(gpu))
    identity = identify_prior(str(run_folder))
    if words is None:
        check_dtype(identity, dtype)
    else:
        with pytest.raises(ConfigError, match=f"prior_dtype={dtype}: .*{words}"):
            check_dtype(identity, dtype)


def test_sizes_that_fp8_products_do_not_take_are_refused(run_folder, monkeypatch):
    monkeypatch.setattr(preflight, "probe", lambda: preflight.assumed("h100"))
    (path,) = run_folder.glob("checkpoints/step_*/run_config.json")
    content = path.read_bytes()
    changed = re.sub(rb'("ffn_hidden_size":\s*)64', rb"\g<1>72", content)  # of the same size: still complete
    assert changed != content
    path.write_bytes(changed)
    try:
        faults = inference.scoring_faults(path.parent, "fp8_tensorwise")
        assert any("72" in fault.problem for fault in faults)
        assert inference.scoring_faults(path.parent, "bf16") == []
    finally:
        path.write_bytes(content)


def with_state(folder, **changes):
    """Change a checkpoint's state file, and its record of sizes with it."""
    for name, change in (("state.json", changes), ("COMPLETE.json", None)):
        content = orjson.loads((folder / name).read_bytes())
        if change is None:
            content["files"]["state.json"] = (folder / "state.json").stat().st_size
        else:
            content |= change
        (folder / name).write_bytes(orjson.dumps(content))


def test_what_a_document_follows(run_folder, tmp_path):
    """The end of the document before, as in training; in a converted checkpoint what its original has."""
    (step,) = run_folder.glob("checkpoints/step_*")
    folder = Path(shutil.copytree(step, tmp_path / step.name))
    assert identify_prior(str(folder)).start_id is None
    with_state(folder, tokenizer={"eod": 2})
    assert identify_prior(str(folder)).start_id == 2
    with_state(folder, start_id=1)
    assert identify_prior(str(folder)).start_id == 1
    with_state(folder, start_id=None)
    assert identify_prior(str(folder)).start_id is None


@dataclass
class FakeTokenizer:
    bos: int | None
    prepends_bos: bool
    prefix_ids: tuple[int, ...] = ()


@pytest.mark.parametrize(
    ("start_id", "tokenizer", "want"),
    [
        (2, FakeTokenizer(1, prepends_bos=True), 2),
        (1, FakeTokenizer(1, prepends_bos=True, prefix_ids=(1,)), None),  # the text brings it
        (None, FakeTokenizer(1, prepends_bos=True), 1),
        (None, FakeTokenizer(1, prepends_bos=True, prefix_ids=(1,)), None),
        (None, FakeTokenizer(1, prepends_bos=False), None),
        (None, FakeTokenizer(None, prepends_bos=False), None),
    ],
)
def test_the_id_before_each_window(run_folder, start_id, tokenizer, want):
    identity = dataclasses.replace(identify_prior(str(run_folder)), start_id=start_id)
    config = preprocess_config(
        {"input": ["FILE"], "output_prefix": "PREFIX", "prior": str(run_folder)}
        | {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": "MODEL"}
    )
    assert resources._start_id(config, tokenizer, identity, None) == want


def test_a_checkpoint_is_a_prior(ranks, tmp_path):
    ranks.run(save_checkpoint, tmp_path, tiny_llama(), world_size=2)
    identity = identify_prior(str(tmp_path))
    assert (identity.backend, identity.vocab_size, identity.max_context_tokens) == ("megatron", 90, 32)
    assert identity == identify_prior(str(tmp_path / "checkpoints"))

    ids = np.arange(5, 17, dtype=np.int32)
    ((scores, own, vocab_size, fingerprint),) = ranks.run(
        scores_and_own_logprobs, str(tmp_path), ids, world_size=1
    )
    assert vocab_size == 90
    assert len(fingerprint) == 64
    np.testing.assert_allclose(scores.logprobs_T, own[np.arange(12), ids], atol=1e-5)
    assert scores.candidate_ids_EK.shape == (12, 89)
    assert scores.candidate_ids_EK.max() < 90  # rows of padding are no candidates
    np.testing.assert_allclose(np.exp(own).sum(axis=1), 1, atol=1e-5)

    (marker,) = tmp_path.glob("checkpoints/step_*/COMPLETE.json")
    marker.unlink()
    with pytest.raises(PriorError, match="no complete checkpoint"):
        identify_prior(str(tmp_path))
