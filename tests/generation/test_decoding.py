"""Decoding from the cache is the full forward pass, for every family, ragged rows, joins and departures."""

from __future__ import annotations

import sys
from pathlib import Path

import generation_cases
import numpy as np
import pytest
from generation_cases import random_prompts

from megatron_tokedit.errors import ConfigError
from megatron_tokedit.testing.models import tiny_llama, tiny_model

sys.path.append(str(Path(__file__).resolve().parents[1] / "engine"))

VOCAB_SIZE = 90
FAMILIES = ("llama", "gpt2", "qwen2", "qwen3", "olmo", "mixtral")
CONFIGS = {family: tiny_model(family, init_method_std=0.2) for family in FAMILIES} | {
    "tied": tiny_llama(share_embeddings_and_output_weights=True, init_method_std=0.2),
    "llama-scaled": tiny_llama(rope_scaling=True, rotary_base=500000, init_method_std=0.2),
    "interpolated": tiny_llama(seq_len_interpolation_factor=2.0, init_method_std=0.2),
}


def language_model(config, recipe="fp32", **layout):
    from megatron_tokedit.config.sections import ParallelConfig, PrecisionConfig
    from megatron_tokedit.engine.inference import LanguageModel
    from megatron_tokedit.engine.initialize import initialize
    from megatron_tokedit.engine.model import build_model

    parallel, precision = ParallelConfig(**layout), PrecisionConfig(recipe=recipe)
    ctx = initialize(parallel, seed=3, device="cpu", cpu_threads=1)
    model = build_model(config, precision, ctx, VOCAB_SIZE, parallel=parallel, wrap_with_ddp=False)
    return LanguageModel(model[0], config, VOCAB_SIZE, ctx, precision=precision)


def full_logits(model, ids):
    import torch

    hidden = model.hidden_states(torch.tensor([ids]))[0, -1]
    return (hidden @ model.output_weight.T).float()[: model.vocab_size]


def greedy_both_ways(config, prompts, num_tokens):
    """Greedy ids from the cache and by full forward passes, and the largest difference of their logits."""
    from megatron_tokedit.engine.decoding import CachedDecoder

    model = language_model(config)
    decoder = CachedDecoder(model)
    rows = [list(prompt) for prompt in prompts]
    logits, worst = decoder.add(prompts), 0.0
    for _ in range(num_tokens):
        for row, found in zip(rows, logits, strict=True):
            want = full_logits(model, row)
            worst = max(worst, (found - want).abs().max().item())
            row.append(int(want.argmax()))
            assert row[-1] == int(found.argmax())
        logits = decoder.step([row[-1] for row in rows])
    return worst, want.std().item()


@pytest.mark.parametrize("name", CONFIGS)
def test_cache_equals_full_forward(ranks, name):
    prompts = random_prompts(VOCAB_SIZE, (1, 5, 12, 3))
    ((worst, spread),) = ranks.run(greedy_both_ways, CONFIGS[name], prompts, 19, world_size=1)
    assert worst < 2e-4
    assert spread > 0.1


def joins_and_departures(config, prompts):
    """Rows come and go; every row's logits are compared with a full forward pass all along."""
    import torch

    from megatron_tokedit.engine.decoding import CachedDecoder

    model = language_model(config)
    decoder = CachedDecoder(model)
    random = np.random.default_rng(0)
    rows, waiting, worst, most = [], [list(prompt) for prompt in prompts], 0.0, 0
    logits = []
    while rows or waiting:
        parts = [decoder.step([row[-1] for row in rows])] if rows else []
        new, waiting = waiting[: (count := int(random.integers(1, 3)))], waiting[count:]
        if new:
            parts.append(decoder.add(new))
            rows += new
        logits = torch.cat(parts)
        assert decoder.num_rows == len(rows) == len(logits)
        most = max(most, len(rows))
        for row, found in zip(rows, logits, strict=True):
            worst = max(worst, (found - full_logits(model, row)).abs().max().item())
            row.append(int(random.integers(VOCAB_SIZE)))
        going_on = [i for i, row in enumerate(rows) if len(row) < 25 and random.random() > 0.1]
        behind = [i for i in going_on if i >= len(going_on)]
        order = [i if i in going_on else behind.pop() for i in range(len(going_on))]
        decoder.keep(order)
        rows = [rows[i] for i in order]
    return worst, most


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_rows_that_come_and_go(ranks, name):
    prompts = random_prompts(VOCAB_SIZE, (2, 9, 1, 14, 4, 4, 20, 1, 7, 3))
    ((worst, most),) = ranks.run(joins_and_departures, CONFIGS[name], prompts, world_size=1)
    assert worst < 2e-4
    assert most >= 4


def model_between_passes(config, prompts):
    """The full forward pass before, between and after steps, and the length limit."""
    import torch

    from megatron_tokedit.engine.decoding import CachedDecoder

    model = language_model(config)
    attention = model.gpt.decoder.layers[0].self_attention.core_attention
    want = full_logits(model, prompts[0])
    first, second = CachedDecoder(model), CachedDecoder(model)
    first.add(prompts)
    second.add(prompts[:1])
    for id_ in range(config.max_positions - len(prompts[0])):
        assert torch.equal(full_logits(model, prompts[0]), want)
        first.step([id_] * len(prompts))
        second.step([id_])
    assert model.gpt.decoder.layers[0].self_attention.core_attention is attention
    try:
        second.step([0])
    except AssertionError:
        return "no room"


def as_on_a_gpu(config, prompts):
    """A model whose config asks for the fused rotation, which takes no row's own angles."""
    import torch

    from megatron_tokedit.engine.decoding import CachedDecoder

    model = language_model(config)
    want = full_logits(model, prompts[0])
    model.gpt.config.apply_rope_fusion = True
    found = CachedDecoder(model).add(prompts)[0]
    return torch.allclose(found, want, atol=1e-4), model.gpt.config.apply_rope_fusion


def test_the_fused_rotation_is_off_during_a_pass_only(ranks):
    prompts = random_prompts(VOCAB_SIZE, (5, 3))
    assert ranks.run(as_on_a_gpu, CONFIGS["llama"], prompts, world_size=1) == [(True, True)]


def test_others_find_the_model_as_it_was(ranks):
    prompts = random_prompts(VOCAB_SIZE, (20, 3))
    assert ranks.run(model_between_passes, CONFIGS["llama"], prompts, world_size=1) == ["no room"]


def logits_of(config, prompts, recipe, layout):
    from megatron_tokedit.engine.decoding import CachedDecoder

    decoder = CachedDecoder(language_model(config, recipe, **layout))
    found = [decoder.add(prompts)] + [decoder.step([i] * len(prompts)) for i in range(5)]
    return np.stack([logits.numpy() for logits in found])


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_tensor_parallel_ranks_agree_with_one(ranks, name):
    prompts = random_prompts(VOCAB_SIZE, (6, 2))
    (alone,) = ranks.run(logits_of, CONFIGS[name], prompts, "fp32", {}, world_size=1)
    layout = {"tensor_model_parallel_size": 2}
    first, second = ranks.run(logits_of, CONFIGS[name], prompts, "fp32", layout, world_size=2)
    assert np.array_equal(first, second)
    assert first.shape == alone.shape == (6, 2, VOCAB_SIZE)


def sampled_texts(folder, tensor):
    from generation_cases import TOKENIZERS

    from megatron_tokedit.engine.inference import load_language_model
    from megatron_tokedit.generation import GenerationSettings, Prompt, from_language_model, generate
    from megatron_tokedit.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(*TOKENIZERS["sentencepiece"])
    language = load_language_model(folder, device="cpu", tensor=tensor)
    model = from_language_model(language, tokenizer, start_id=tokenizer.eod)
    prompts = [Prompt([model.start_id, *range(5, 5 + n)], range(3)) for n in (1, 6, 3)]
    settings = GenerationSettings(max_new_tokens=20, batch_rows=4)
    return [(c.ids, c.text, c.finish) for c in generate(model, prompts, settings)]


def test_tensor_parallel_ranks_write_what_one_writes(ranks, tmp_path):
    ranks.run(generation_cases.save_checkpoint, tmp_path, CONFIGS["llama"], "sentencepiece", world_size=1)
    (alone,) = ranks.run(sampled_texts, tmp_path, 1, world_size=1)
    assert ranks.run(sampled_texts, tmp_path, 2, world_size=2) == [alone, alone]
    assert len(alone) == 9


def test_bfloat16(ranks):
    prompts = random_prompts(VOCAB_SIZE, (6, 2))
    (exact,) = ranks.run(logits_of, CONFIGS["llama"], prompts, "fp32", {}, world_size=1)
    (rounded,) = ranks.run(logits_of, CONFIGS["llama"], prompts, "bf16", {}, world_size=1)
    assert rounded.dtype == np.float32
    assert 0 < np.abs(rounded - exact).max() < 0.1 * np.abs(exact).max()


def refusals(config):
    from types import SimpleNamespace

    from megatron_tokedit.config.sections import PrecisionConfig
    from megatron_tokedit.engine.decoding import CachedDecoder

    messages, model = [], language_model(config)
    ctx, precision = model.ctx, PrecisionConfig(recipe="fp8_tensorwise")
    for change in (
        {"precision": precision},
        {"precision": model.precision, "ctx": SimpleNamespace(pp_size=2)},
    ):
        vars(model).update(change)
        try:
            CachedDecoder(model)
        except ConfigError as error:
            messages.append(str(error))
    model.ctx = ctx
    return messages


def test_refusals(ranks):
    ((fp8, pipeline),) = ranks.run(refusals, CONFIGS["llama"], world_size=1)
    assert "fp8_tensorwise multiplies many tokens at a time" in fp8
    assert "pipeline_model_parallel_size 1" in pipeline


def published(name):
    """A Hugging Face model of the tiny size, our config of it, and its weights under our names."""
    import test_family_parity as parity
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    if name == "gpt2":
        torch.manual_seed(5)
        sizes = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 32, "initializer_range": 0.2}
        theirs = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB_SIZE, **sizes)).eval()
        config = tiny_model("gpt2")
    else:
        changes, reference, fields = parity.CASES[name]
        theirs, config = parity.published(reference, fields), tiny_model(name.split("-")[0], **changes)
    return theirs, config, parity.our_names(theirs, config)


def greedy_as_huggingface(name, prompts, num_tokens):
    """Our decoder's greedy ids, and those of transformers' generate, same weights."""
    import torch

    from megatron_tokedit.engine.decoding import CachedDecoder

    theirs, config, state = published(name)
    model = language_model(config)
    with torch.no_grad():
        parameters = dict(model.gpt.named_parameters())
        assert parameters.keys() == state.keys()
        for key, parameter in parameters.items():
            parameter[: len(state[key])] = state[key]
    decoder = CachedDecoder(model)
    logits = decoder.add(prompts)
    ours, found = [[] for _ in prompts], []
    for _ in range(num_tokens):
        found.append(logits)
        for row, row_logits in zip(ours, logits, strict=True):
            row.append(int(row_logits.argmax()))
        logits = decoder.step([row[-1] for row in ours])
    settings = {"do_sample": False, "max_new_tokens": num_tokens, "eos_token_id": None, "pad_token_id": 0}
    answers = [theirs.generate(torch.tensor([prompt]), **settings)[0] for prompt in prompts]
    with torch.no_grad():
        want = [theirs(answer[None, :-1]).logits[0, -num_tokens:] for answer in answers]
    worst = (torch.stack(found, dim=1) - torch.stack(want)).abs().max().item()
    published_ids = [answer[-num_tokens:].tolist() for answer in answers]
    return ours, published_ids, worst, want[0].abs().max().item()


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-scaled", "qwen2", "qwen3", "olmo", "mixtral"])
def test_greedy_equals_transformers(ranks, name):
    prompts = random_prompts(VOCAB_SIZE, (4, 1, 11))
    ((ours, theirs, worst, largest),) = ranks.run(greedy_as_huggingface, name, prompts, 18, world_size=1)
    assert ours == theirs
    assert worst < 2e-4
    assert largest > 1.0


def test_the_decoder_protocol_is_met():
    from megatron_tokedit.engine.decoding import CachedDecoder
    from megatron_tokedit.generation.base import Decoder
    from megatron_tokedit.generation.huggingface import HuggingFaceDecoder

    methods = [name for name in vars(Decoder) if not name.startswith("_")]
    for kind in (CachedDecoder, HuggingFaceDecoder, generation_cases.BigramDecoder):
        assert all(callable(getattr(kind, name)) for name in methods)
