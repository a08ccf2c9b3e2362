"""``tools/analyze_corpus.py --embedding-model``: raw and indexed text, a real model, cache, refusals."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
from pathlib import Path

import numpy as np
import orjson
import pytest
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from megatron_tokedit.analysis.embedding_model import EmbeddingModel, choose_embedding_model
from megatron_tokedit.cli.analyze_corpus import main
from megatron_tokedit.cli.preprocess_edit import main as preprocess

SENTENCEPIECE = Path(__file__).resolve().parents[1] / "data" / "tiny_sentencepiece.model"
TOKENIZER = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(SENTENCEPIECE)]
SEA, WOOD = ["wave", "sail", "salt", "gull", "tide"], ["moss", "fern", "bark", "owl", "root"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder with random weights, as a plain folder of transformers."""
    folder = tmp_path_factory.mktemp("encoder")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: i for i, word in enumerate([*special, *SEA, *WOOD])}
    words = RustTokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def write(path: Path, words: list[str], seed: int, count: int = 40) -> Path:
    drawn = random.Random(seed)
    lines = [json.dumps({"text": " ".join(drawn.choices(words, k=12))}) for _ in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return path


def analyze(folder: Path, *arguments: str) -> dict[str, object]:
    assert main([*arguments, *TOKENIZER, "--output-dir", str(folder), "--quiet"]) == 0
    return orjson.loads((folder / "analysis.json").read_bytes())["embedding"]  # type: ignore[no-any-return]


def test_subjects_are_apart_and_indexed_text_is_where_raw_text_is(model: Path, tmp_path: Path) -> None:
    sea, wood = write(tmp_path / "sea.jsonl", SEA, 1), write(tmp_path / "wood.jsonl", WOOD, 2)
    command = ["--input", str(sea), "--output-prefix", str(tmp_path / "sea"), *TOKENIZER, "--append-eod"]
    assert preprocess([*command, "--edit-strategy", "none", "--workers", "1", "--quiet"]) == 0
    corpora = [f"sea={sea}", f"wood={wood}", f"indexed={tmp_path / 'sea_text_document'}"]
    arguments = ["--input", *corpora, "--embedding-model", str(model), "--embedding-documents", "30"]
    found = analyze(tmp_path / "out", *arguments, "--workers", "2")
    assert found["num_documents"] == 30
    of_sea, of_wood, of_indexed = found["corpora"]  # type: ignore[misc]
    assert of_wood["share_nearest_is_own"] == 1.0
    assert of_sea["points"] == of_indexed["points"]  # the same documents, drawn and decoded
    assert of_sea["share_nearest_is_own"] == 0.0  # each has its like in the other corpus
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Map of documents" in page
    assert (tmp_path / "out" / "embedding.png").read_bytes().startswith(b"\x89PNG")
    assert analyze(tmp_path / "alone", *arguments, "--workers", "1") == found


def test_kept_vectors_are_used_until_the_model_changes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    sea = write(tmp_path / "sea.jsonl", SEA, 1, 8)
    arguments = ["--input", f"sea={sea}", "--embedding-model", str(folder), "--workers", "1"]
    first = analyze(tmp_path / "out", *arguments)
    with monkeypatch.context() as patch:
        patch.setattr(EmbeddingModel, "encode", lambda self, texts: pytest.fail("encoded again"))
        assert analyze(tmp_path / "out", *arguments) == first
    weights = BertModel.from_pretrained(folder)
    torch.nn.init.normal_(weights.embeddings.word_embeddings.weight)
    weights.save_pretrained(folder)
    assert analyze(tmp_path / "out", *arguments) != first


def test_a_plain_folder_is_pooled_by_the_mean_and_a_made_one_as_it_says(model: Path, tmp_path: Path) -> None:
    plain = EmbeddingModel(choose_embedding_model(str(model), "cpu", 64)).encode(["wave sail", "owl"])
    encoder = BertModel.from_pretrained(model).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    with torch.no_grad():
        states = encoder(**tokenizer(["wave sail"], return_tensors="pt")).last_hidden_state[0].mean(0)
    assert np.allclose(plain[0], states / states.norm(), atol=1e-5)
    assert np.allclose(np.linalg.norm(plain, axis=1), 1, atol=1e-6)
    made = SentenceTransformer(str(model), device="cpu")
    made[1].pooling_mode = "cls"
    made.save(str(tmp_path / "made"))
    ours = EmbeddingModel(choose_embedding_model(str(tmp_path / "made"), "cpu", 64)).encode(["wave sail"])
    assert np.allclose(ours, SentenceTransformer(str(tmp_path / "made"), device="cpu").encode(
        ["wave sail"], normalize_embeddings=True), atol=1e-6)  # fmt: skip


def test_only_the_first_tokens_are_read(model: Path) -> None:
    short = EmbeddingModel(choose_embedding_model(str(model), "cpu", 2)).encode(["wave sail gull owl moss"])
    whole = EmbeddingModel(choose_embedding_model(str(model), "cpu", 64)).encode(["wave sail"])
    assert np.allclose(short, whole, atol=1e-6)


def test_the_limit_of_the_model_is_what_is_reported(model: Path, tmp_path: Path) -> None:
    sea = write(tmp_path / "sea.jsonl", SEA, 1, 4)
    made = SentenceTransformer(str(model), device="cpu")
    made.max_seq_length = 3
    made.save(str(tmp_path / "made"))
    arguments = ["--input", f"sea={sea}", "--embedding-model", str(tmp_path / "made"), "--workers", "1"]
    assert analyze(tmp_path / "out", *arguments)["max_tokens"] == 3
    assert choose_embedding_model(str(tmp_path / "made"), "cpu", 2).max_tokens == 2
    assert choose_embedding_model(str(model), "cpu", None).max_tokens == 64


def test_refusals(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # type: ignore[no-untyped-def]
    sea = write(tmp_path / "sea.jsonl", SEA, 1, 4)
    command = ["--input", f"sea={sea}", *TOKENIZER, "--output-dir", str(tmp_path / "out"), "--workers", "1"]

    def refused(*arguments: str) -> str:
        assert main([*command, *arguments]) == 1
        return capsys.readouterr().err  # type: ignore[no-any-return]

    assert "has no effect without --embedding-model" in refused("--embedding-documents", "5")
    assert "is no folder here" in refused("--embedding-model", "nobody/has-this")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "neither config.json nor modules.json" in refused("--embedding-model", str(empty))
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "cannot be loaded" in refused("--embedding-model", str(broken))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'megatron_tokedit[embedding]'" in refused("--embedding-model", str(model))


def test_documents_without_text_are_left_out(model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "sea.jsonl", SEA, 1, 6)
    path.write_text(path.read_text() + '{"text": "  "}\n{"text": " "}\n')
    found = analyze(tmp_path / "out", "--input", f"sea={path}", "--embedding-model", str(model))
    assert found["num_documents"] == 6
