"""Text files as domains, read by each checkpoint's own tokenizer; words and bytes, as lm-eval has them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tokedit.cli.evaluate import main
from megatron_tokedit.cli.evaluate_domains import DatasetDomain, TextDomain, open_domains
from megatron_tokedit.cli.preprocess_edit import main as preprocess
from megatron_tokedit.evaluation import count_texts
from megatron_tokedit.testing.models import train_sentencepiece, write_hf_gpt2, write_hf_llama
from megatron_tokedit.tokenizers import load_tokenizer

TEXTS = [
    "The river rises in the hills, and falls into the sea.",
    " two  words ",
    "",
    "na\u00efve caf\u00e9 \u4f60\u597d \U0001f600\n\n\ttabs and\u00a0spaces\n",
    "one",
    *(f"Sentence number {i} of a text that goes on for a while." for i in range(6)),
]
WORDS = [11, 2, 0, 7, 1, *[12] * 6]
BYTES = [53, 12, 0, 44, 3, *[53] * 6]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models with tokenizers of different kinds, and the texts as JSON lines.

    ``gpt2``: byte-level BPE, no BOS. ``llama``: sentencepiece, with BOS. ``template``: the tokenizer writes
    BOS.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("texts")
    for name in ("gpt2", "template"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<|endoftext|>", "<s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(TEXTS, trainer)
        if name == "template":
            tokenizer.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", 1)]
            )
        names = {"bos_token": "<s>"} if name == "template" else {}
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", **names)
        fast.save_pretrained(folder / name)
        write_hf_gpt2(folder / name, vocab_size=tokenizer.get_vocab_size(), n_positions=128)
    spm = train_sentencepiece(folder / "spm.model", TEXTS, vocab_size=300)
    size = load_tokenizer("SentencePieceTokenizer", str(spm)).vocab_size
    write_hf_llama(folder / "llama", vocab_size=size, max_position_embeddings=128)
    (folder / "llama" / "tokenizer.model").write_bytes(spm.read_bytes())
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return folder


def evaluate(output: Path, *arguments: object) -> dict[str, Any]:
    argv = ["perplexity", "--quiet", "--output", str(output), *map(str, arguments)]
    assert main(argv) == 0
    return json.loads(output.read_text())


def logprobs(model_path: Path, row: list[int]) -> list[float]:
    """Of all ids of the row but the first, by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path).eval()
    with torch.no_grad():
        logprobs_TV = model(torch.tensor([row])).logits.log_softmax(-1)[0]
    return [logprobs_TV[t, i].item() for t, i in enumerate(row[1:])]


def test_words_and_bytes_of_texts_counted_by_hand() -> None:
    counts = count_texts([[text] for text in TEXTS])
    assert counts.num_words_D.tolist() == WORDS
    assert counts.num_bytes_D.tolist() == BYTES
    joined = count_texts([["two", "parts"], []])
    assert (joined.num_words_D.tolist(), joined.num_bytes_D.tolist()) == ([2, 0], [8, 0])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), max_size=5))
def test_counts_are_lm_evals_but_for_empty_words_at_the_ends(texts: list[str]) -> None:
    import re

    counts = count_texts([[text] for text in texts])
    for text, num_words, num_bytes in zip(texts, counts.num_words_D, counts.num_bytes_D, strict=True):
        words = re.split(r"\s+", text)
        assert num_words == len(words) - words.count("")
        assert num_bytes == len(text.encode())


@pytest.mark.parametrize(
    ("kind", "model"), [("SentencePieceTokenizer", "spm.model"), ("HuggingFaceTokenizer", "template")]
)
@pytest.mark.parametrize("append_eod", [True, False])
def test_a_dataset_has_the_words_and_bytes_of_its_text(
    folder: Path, tmp_path: Path, kind: str, model: str, append_eod: bool
) -> None:
    flags = ["--append-eod"] if append_eod else []
    status = preprocess(
        [
            *("--input", str(folder / "texts.jsonl"), "--output-prefix", str(tmp_path / "d"), "--quiet"),
            *("--tokenizer-type", kind, "--tokenizer-model", str(folder / model), "--edit-strategy", "none"),
            *flags,
        ]
    )
    assert status == 0
    (domain,) = open_domains({"d": f"{tmp_path}/d_text_document.bin"}, "text")
    assert isinstance(domain, DatasetDomain)
    assert domain.text is not None
    assert domain.text.num_words_D.tolist() == WORDS
    assert domain.text.num_bytes_D.tolist() == BYTES


def test_models_of_different_tokenizers_on_the_same_texts(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = evaluate(
        tmp_path / "out.json",
        *("--checkpoint", folder / "gpt2", folder / "llama"),
        *("--data", f"texts={folder}/texts.jsonl", "--per-document", tmp_path / "documents.jsonl"),
    )
    table = capsys.readouterr().out
    assert content["same_tokens"] is False
    assert "bits/byte" in table, "numbers a token cannot be compared"
    documents = [json.loads(line) for line in (tmp_path / "documents.jsonl").read_text().splitlines()]
    assert [line["num_bytes"] for line in documents] == BYTES
    for name, kind, start in (("gpt2", "HuggingFaceTokenizer", 0), ("llama", "SentencePieceTokenizer", 1)):
        tokenizer = load_tokenizer(kind, str(folder / name))
        sums = []
        for text, line in zip(TEXTS, documents, strict=True):
            ids = tokenizer.encode(text)
            sums.append(-sum(logprobs(folder / name, [start, *ids])))
            assert line["num_scored_tokens"][name] == len(ids)
            assert line["nll_nats"][name] == pytest.approx(sums[-1], rel=1e-4, abs=1e-4)
        (entry,) = [c["domains"][0] for c in content["checkpoints"] if c["name"] == name]
        assert entry["bits_per_byte"] == pytest.approx(sum(sums) / sum(BYTES) / math.log(2), rel=1e-5)
        assert entry["word_perplexity"] == pytest.approx(math.exp(sum(sums) / sum(WORDS)), rel=1e-4)
        assert entry["num_documents"] == len(TEXTS) - 1, "the empty text has no token"
    (comparison,) = content["comparisons"]
    bits = [c["average"]["bits_per_byte"] for c in content["checkpoints"]]
    assert comparison["rows"][0]["byte"]["difference"] == pytest.approx(bits[1] - bits[0])


@pytest.mark.parametrize(("name", "prefix_id", "length"), [("gpt2", 0, 0), ("template", 1, 1)])
def test_numbers_are_lm_evals(folder: Path, tmp_path: Path, name: str, prefix_id: int, length: int) -> None:
    """Its windows and its metrics, on the log-probabilities of transformers."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.metrics import bits_per_byte, weighted_perplexity
    from lm_eval.utils import get_rolling_token_windows

    tokenizer = load_tokenizer("HuggingFaceTokenizer", str(folder / name))
    loglikelihoods = []
    for text in TEXTS:
        ids = tokenizer.encode(text)[length:]
        windows = get_rolling_token_windows(ids, prefix_id, max_seq_len=128, context_len=1)
        loglikelihoods.append(
            sum(
                sum(logprobs(folder / name, [*before, predicted[-1]])[-len(predicted) :])
                for before, predicted in windows
            )
        )
    content = evaluate(
        tmp_path / "out.json", "--checkpoint", folder / name, "--data", f"texts={folder}/texts.jsonl"
    )
    entry = content["checkpoints"][0]["domains"][0]
    items = list(zip(loglikelihoods, BYTES, strict=True))
    assert entry["bits_per_byte"] == pytest.approx(bits_per_byte(items), rel=1e-5)
    assert 2.0 ** entry["bits_per_byte"] == pytest.approx(weighted_perplexity(items), rel=1e-4)
    items = list(zip(loglikelihoods, WORDS, strict=True))
    assert entry["word_perplexity"] == pytest.approx(weighted_perplexity(items), rel=1e-3)


def test_a_tokenizer_that_writes_bos_gets_no_second_one(folder: Path, tmp_path: Path) -> None:
    content = evaluate(
        tmp_path / "out.json", "--checkpoint", folder / "template", "--data", f"t={folder}/texts.jsonl"
    )
    entry = content["checkpoints"][0]
    assert entry["scoring"]["start_ids"] == [None]
    tokenizer = load_tokenizer("HuggingFaceTokenizer", str(folder / "template"))
    ids = [tokenizer.encode(text) for text in TEXTS]
    assert entry["domains"][0]["num_scored_tokens"] == sum(len(i) - 1 for i in ids)
    expected = -sum(sum(logprobs(folder / "template", i)) for i in ids if len(i) > 1)
    assert entry["domains"][0]["nll_nats"] == pytest.approx(expected, rel=1e-5)


def test_sequences_of_a_document_have_one_beginning(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "lists.jsonl"
    path.write_text(json.dumps({"body": ["one river", "", "two rivers"]}) + "\n")
    tokenizer = load_tokenizer("HuggingFaceTokenizer", str(folder / "template"))
    domain = TextDomain("d", str(path), "body")
    (ids,) = domain.documents(tokenizer)
    expected = [*tokenizer.encode("one river"), *tokenizer.encode("two rivers")[1:]]
    np.testing.assert_array_equal(ids, expected)


def test_what_is_a_text_file(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "odd.jsonl"
    status = preprocess(
        [
            *("--input", str(folder / "texts.jsonl"), "--output-prefix", str(place), "--quiet"),
            *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(folder / "spm.model")),
            *("--edit-strategy", "none"),
        ]
    )
    assert status == 0
    for suffix in (".bin", ".idx"):
        Path(f"{place}_text_document{suffix}").rename(f"{place}{suffix}")
    (folder / "more.txt").write_text("a line\nanother line\n")
    domains = open_domains(
        {"prefix": str(place), "text": f"{folder}/texts.jsonl", "glob": f"{folder}/*.txt"}, "text"
    )
    assert [type(domain) for domain in domains] == [DatasetDomain, TextDomain, TextDomain]
    assert domains[2].text is not None
    assert domains[2].text.num_words_D.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "{0}/gpt2", "--data", "a={0}/none.jsonl"], "none.jsonl: does not exist"),
        (["--checkpoint", "{0}/gpt2", "--data", "a={0}/bad.jsonl"], "bad.jsonl:2: key 'text' is missing"),
        (["--checkpoint", "{0}/gpt2", "--data", "a={0}/texts.jsonl", "--json-key", "b"], "'b' is missing"),
        (["--checkpoint", "{0}/bare", "--data", "a={0}/texts.jsonl"], "has no tokenizer"),
        (
            [
                *("--checkpoint", "{0}/bare", "--data", "a={0}/texts.jsonl"),
                *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", "{0}/spm.model"),
            ],
            "not the tokenizer of this model",
        ),
    ],
)
def test_faults(folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "bad.jsonl").write_text('{"text": "x y z"}\n{"test": "x"}\n')
    if not (folder / "bare").exists():
        write_hf_llama(folder / "bare", vocab_size=64)
    assert main(["perplexity", *(a.format(folder) for a in arguments)]) == 1
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


def test_a_dataset_without_manifest_has_no_known_words(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = preprocess(
        [
            *("--input", str(folder / "texts.jsonl"), "--output-prefix", str(tmp_path / "d"), "--quiet"),
            *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder / "gpt2")),
            *("--edit-strategy", "none"),
        ]
    )
    assert status == 0
    prefix = f"{tmp_path}/d_text_document"
    known = evaluate(tmp_path / "1.json", "--checkpoint", folder / "gpt2", "--data", f"d={prefix}")
    entry = known["checkpoints"][0]["domains"][0]
    assert entry["num_bytes"] == sum(BYTES)
    assert entry["num_scored_tokens"] == entry["num_tokens"], "the end of the document before begins one"
    Path(f"{prefix}.manifest.json").unlink()
    unknown = evaluate(tmp_path / "2.json", "--checkpoint", folder / "gpt2", "--data", f"d={prefix}")
    assert "its words and bytes are not known" in capsys.readouterr().err
    entry = unknown["checkpoints"][0]["domains"][0]
    assert (entry["num_bytes"], entry["bits_per_byte"], entry["intervals"]["bits_per_byte"]) == (None,) * 3
    assert (
        main(["perplexity", "--checkpoint", f"{folder}/gpt2", "--data", f"d={prefix}", "--per", "byte"]) == 1
    )
    assert "--per byte: the bytes of the data are not known" in capsys.readouterr().err


def test_nothing_stands_before_a_conversation_as_in_fine_tuning(folder: Path, tmp_path: Path) -> None:
    """Beside texts, which follow BOS; the longest conversation fills the model's positions."""
    tokenizer = load_tokenizer("SentencePieceTokenizer", str(folder / "spm.model"))

    def num_tokens(reply: str) -> int:
        return len(tokenizer.encode_chat(f"<|user|>\nWhere?\n<|assistant|>\n{reply}</s>\n", []).ids_T)

    long = next(reply for n in range(99) if num_tokens(reply := "hills" + " e" * n) >= 128)
    long += "" if num_tokens(long) == 129 else "e"
    talks = [{"prompt": "Where?", "response": reply} for reply in ("In the hills.", long)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    code = preprocess([
        "--quiet", "--format", "sft", "--sft-chat-template", "tulu", "--input", str(tmp_path / "talks.jsonl"),
        "--output-prefix", str(tmp_path / "d"), "--edit-strategy", "none", "--workers", "1",
        "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(folder / "spm.model"),
    ])  # fmt: skip
    assert code == 0
    domain = DatasetDomain("talks", f"{tmp_path}/d_sft_document")
    conversations = list(domain.documents(None))
    assert max(len(ids) for ids, _ in conversations) == 129, "the last token is no input"
    data = [f"talks={tmp_path}/d_sft_document", f"texts={folder}/texts.jsonl"]
    content = evaluate(tmp_path / "out.json", "--checkpoint", folder / "llama", "--data", *data)
    entry = content["checkpoints"][0]
    assert entry["scoring"]["start_ids"] == [None, tokenizer.bos]
    expected = 0.0
    for ids, counts in conversations:
        rows = logprobs(folder / "llama", ids.tolist())
        expected -= sum(np.array(rows)[counts[1:]])
    assert entry["domains"][0]["num_scored_tokens"] == sum(counts.sum() for _, counts in conversations)
    assert entry["domains"][0]["nll_nats"] == pytest.approx(expected, rel=1e-5)
