"""Text that spells a control token: it is that token, ordinary text, or an error, and never unnoticed."""

from __future__ import annotations

import numpy as np
import orjson
import pytest
from pipeline_cases import output_bytes, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_tokedit.config.preprocess import preprocess_config
from megatron_tokedit.dataset import IndexedDataset
from megatron_tokedit.errors import DataFormatError
from megatron_tokedit.pipeline import run
from megatron_tokedit.tokenizers import load_tokenizer

EOT = "<|endoftext|>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A small byte-level BPE folder with one control token."""
    folder = tmp_path_factory.mktemp("bpe")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        ["the river rises in hills"],
        trainers.BpeTrainer(vocab_size=300, special_tokens=[EOT], initial_alphabet=alphabet),
    )
    bpe.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOT}
    (folder / "tokenizer_config.json").write_bytes(orjson.dumps(config))
    return str(folder)


@pytest.fixture
def folder(tmp_path):
    texts = ["the river", f"rises {EOT} in{EOT}", "hills"]
    (tmp_path / "corpus.jsonl").write_bytes(b"\n".join(orjson.dumps({"text": text}) for text in texts))
    return tmp_path


def job(folder, tokenizer, name, choice):
    changes = {
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": tokenizer,
        "special_tokens_in_text": choice,
    }
    run(preprocess_config(settings(folder, name, **changes)))
    return IndexedDataset(f"{folder}/{name}_text_document")


def test_encoded_counted_and_warned_about(folder, tokenizer, caplog):
    dataset = job(folder, tokenizer, "out", "encode")
    eod = load_tokenizer("HuggingFaceTokenizer", tokenizer).eod
    assert [int((np.concatenate(dataset.document(i)) == eod).sum()) for i in range(3)] == [1, 3, 1]
    statistics = orjson.loads((folder / "out_text_document.stats.json").read_bytes())
    assert statistics["special_tokens_in_text"] == {EOT: 2}
    assert f"{EOT} 2 times" in caplog.text


def test_split_into_ordinary_text(folder, tokenizer):
    dataset = job(folder, tokenizer, "out", "split")
    loaded = load_tokenizer("HuggingFaceTokenizer", tokenizer)
    assert [int((np.concatenate(dataset.document(i)) == loaded.eod).sum()) for i in range(3)] == [1, 1, 1]
    assert loaded.decode(dataset.document(1)[0][:-1]) == f"rises {EOT} in{EOT}"
    statistics = orjson.loads((folder / "out_text_document.stats.json").read_bytes())
    assert statistics["special_tokens_in_text"] == {}


def test_an_error_names_file_line_and_token(folder, tokenizer):
    with pytest.raises(DataFormatError, match=r"corpus\.jsonl:2: .*<\|endoftext\|>.*split"):
        job(folder, tokenizer, "out", "error")
    assert not (folder / "out_text_document.idx").exists()
    lines = (folder / "corpus.jsonl").read_bytes().splitlines()
    (folder / "corpus.jsonl").write_bytes(lines[0] + b"\n" + lines[2])
    job(folder, tokenizer, "clean", "error")
    job(folder, tokenizer, "plain", "encode")
    assert output_bytes(folder, "clean") == output_bytes(folder, "plain")
