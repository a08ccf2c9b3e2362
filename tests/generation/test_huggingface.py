"""Hugging Face folders: padded batches write what transformers' own generate writes for each prompt alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from generation_cases import DATA, random_prompts
from transformers import AutoModelForCausalLM

from megatron_tokedit.errors import CheckpointError, ConfigError, TokenizerError
from megatron_tokedit.generation import GenerationSettings, Prompt, generate, load_text_model
from megatron_tokedit.testing.models import write_hf_gpt2, write_hf_llama

VOCAB_SIZE = 420  # more than the tokenizers have


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    made = {
        "llama": write_hf_llama(root / "llama", vocab_size=VOCAB_SIZE),
        "gpt2": write_hf_gpt2(root / "gpt2", vocab_size=VOCAB_SIZE),
    }
    for folder in made.values():
        for file in (DATA / "tiny_byte_level_bpe").iterdir():
            shutil.copy(file, folder)
    return made


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_rows", [1, 4])
def test_greedy_equals_transformers(folders: dict[str, Path], name: str, batch_rows: int) -> None:
    model = load_text_model(folders[name], device="cpu")
    prompts = random_prompts(model.vocab_size, (3, 9, 1, 6, 2))
    settings = GenerationSettings(
        max_new_tokens=15, temperature=0.0, batch_rows=batch_rows, stop_at_eod=False, logprobs=True
    )
    theirs = AutoModelForCausalLM.from_pretrained(folders[name]).eval()
    for completion in generate(model, [Prompt(ids) for ids in prompts], settings):
        ids = prompts[completion.prompt_index]
        answer = theirs.generate(
            torch.tensor([ids]), do_sample=False, max_new_tokens=15, eos_token_id=None, pad_token_id=0,
            suppress_tokens=list(range(model.vocab_size, VOCAB_SIZE)),
        )  # fmt: skip
        assert completion.ids == answer[0, len(ids) :].tolist()
        with torch.no_grad():
            logits = theirs(answer).logits[0, len(ids) - 1 : -1, : model.vocab_size]
        own = logits.log_softmax(-1).gather(1, answer[0, len(ids) :, None])[:, 0]
        assert completion.logprobs == pytest.approx(own.tolist(), abs=1e-4)


def test_samples_do_not_depend_on_the_batch(folders: dict[str, Path]) -> None:
    model = load_text_model(folders["llama"], device="cpu")
    prompts = [Prompt(ids, range(2)) for ids in random_prompts(model.vocab_size, (3, 9, 1, 6, 2))]
    found = [
        [c.ids for c in generate(model, prompts, GenerationSettings(max_new_tokens=20, batch_rows=rows))]
        for rows in (1, 3, 16)
    ]
    assert found[0] == found[1] == found[2]


def test_end_ids_of_the_generation_config(tmp_path: Path, folders: dict[str, Path]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders["llama"], folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    model = load_text_model(folder, device="cpu")
    assert model.stop_ids == {5, 6, model.tokenizer.eod}
    assert model.start_id is None
    tiny = str(DATA / "tiny_sentencepiece.model")
    model = load_text_model(
        folders["llama"], device="cpu", tokenizer_type="SentencePieceTokenizer", tokenizer_model=tiny
    )
    assert model.start_id == model.tokenizer.bos
    assert model.stop_ids >= {model.tokenizer.bos, model.tokenizer.eod}


def test_folders_that_are_no_model(tmp_path: Path, folders: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        load_text_model(tmp_path / "none")
    with pytest.raises(CheckpointError, match="has no complete checkpoint"):
        load_text_model(tmp_path)
    with pytest.raises(ConfigError, match="dtype: 'float16', expected auto, float32 or bfloat16"):
        load_text_model(folders["llama"], dtype="float16")
    bare = write_hf_llama(tmp_path / "bare", vocab_size=64)
    with pytest.raises(TokenizerError, match=r"has no tokenizer .* --tokenizer-type and --tokenizer-model"):
        load_text_model(bare)
    with pytest.raises(ConfigError, match="together"):
        load_text_model(bare, tokenizer_model="x")
    tiny = str(DATA / "tiny_sentencepiece.model")
    with pytest.raises(TokenizerError, match=r"and the model .* only 64; it is not the tokenizer"):
        load_text_model(bare, tokenizer_type="SentencePieceTokenizer", tokenizer_model=tiny)
    (folders["gpt2"].parent / "damaged").mkdir()
    damaged = folders["gpt2"].parent / "damaged"
    shutil.copytree(folders["gpt2"], damaged, dirs_exist_ok=True)
    (damaged / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="damaged: the model cannot be loaded"):
        load_text_model(damaged)
