"""Perplexity of datasets under exact priors, and `tools/evaluate.py perplexity` on real tiny models."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import orjson
import pytest

from megatron_tokedit.cli.evaluate import main
from megatron_tokedit.cli.preprocess_edit import main as preprocess
from megatron_tokedit.dataset import IndexedDataset, IndexedDatasetWriter
from megatron_tokedit.errors import DataFormatError
from megatron_tokedit.evaluation import CheckpointPerplexity, as_json, as_table, measure_perplexity
from megatron_tokedit.testing.fake_prior import BigramScorer, random_bigrams
from megatron_tokedit.testing.models import write_hf_llama

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "tests" / "data" / "tiny_sentencepiece.model"
VOCAB_SIZE = 16


def write_dataset(prefix: Path, documents: list[list[list[int]]]) -> IndexedDataset:
    with IndexedDatasetWriter(str(prefix), np.dtype(np.uint16)) as writer:
        for sequences in documents:
            writer.add_document([np.array(ids, np.int32) for ids in sequences])
        writer.finalize()
    return IndexedDataset(str(prefix))


@pytest.fixture
def documents() -> list[list[list[int]]]:
    generator = np.random.default_rng(3)
    random = [[generator.integers(0, VOCAB_SIZE, n).tolist()] for n in (1, 7, 90, 2)]
    return [*random, [], [[1, 2], [3]]]  # an empty document, and one of two sequences


@pytest.mark.parametrize("bos", [None, 0])
def test_equals_a_plain_loop(tmp_path: Path, documents: list[list[list[int]]], bos: int | None) -> None:
    table = random_bigrams(VOCAB_SIZE, seed=1)
    result = measure_perplexity(BigramScorer(table, bos), write_dataset(tmp_path / "d", documents), "d")
    nll = num_scored = 0
    for sequences in documents:
        previous = bos
        for token in [token for ids in sequences for token in ids]:
            if previous is not None:
                nll -= math.log(table[previous, token])
                num_scored += 1
            previous = token
    assert result.num_tokens == 1 + 7 + 90 + 2 + 3
    assert result.num_scored_tokens == num_scored
    assert result.num_documents == (5 if bos is not None else 4)
    assert result.nll_nats == pytest.approx(nll, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nll / num_scored), rel=1e-5)


def test_a_dataset_without_scorable_tokens_is_refused(tmp_path: Path) -> None:
    scorer = BigramScorer(random_bigrams(VOCAB_SIZE, seed=1))
    for name, documents in {"empty": [[]], "single": [[[3]]]}.items():
        with pytest.raises(DataFormatError, match=f"domain {name}: .*no token"):
            measure_perplexity(scorer, write_dataset(tmp_path / name, documents), name)


def test_table_and_json_average_over_domains(tmp_path: Path, documents: list[list[list[int]]]) -> None:
    results = []
    for seed in (1, 2):
        scorer = BigramScorer(random_bigrams(VOCAB_SIZE, seed=seed), bos=0)
        domains = tuple(
            measure_perplexity(scorer, write_dataset(tmp_path / f"{name}{seed}", part), name)
            for name, part in (("short", documents[:2]), ("long", documents[2:]))
        )
        results.append(CheckpointPerplexity(f"run{seed}", scorer.fingerprint, domains))
    content = json.loads(orjson.dumps(as_json(results)))
    assert [row["domain"] for row in content["table"]] == ["short", "long", "average"]
    for column, result in enumerate(results):
        values = [row["perplexity"][column] for row in content["table"]]
        assert values[2] == pytest.approx((values[0] + values[1]) / 2)
        assert content["checkpoints"][column]["average_perplexity"] == result.average
    lines = as_table(results, ["run1", "run2"]).splitlines()
    assert lines[0].split() == ["domain", "tokens", "run1", "run2"]
    assert [line.count("*") for line in lines[1:]] == [1, 1, 1]


@pytest.fixture(scope="module")
def model_and_data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A tiny Hugging Face Llama and a dataset of the tiny tokenizer."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("evaluate")
    vocab_size = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER)).get_piece_size()
    model = write_hf_llama(folder / "model", vocab_size=vocab_size)
    corpus = folder / "corpus.jsonl"
    corpus.write_text(
        "".join(json.dumps({"text": f"the river rises in the hills {i}"}) + "\n" for i in range(9))
    )
    status = preprocess(
        [
            *("--input", str(corpus), "--output-prefix", str(folder / "c"), "--quiet", "--append-eod"),
            *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(TOKENIZER)),
            *("--edit-strategy", "none"),
        ]
    )
    assert status == 0
    return model, f"{folder}/c_text_document"


def test_command_equals_the_models_own_loss(
    model_and_data: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model_path, prefix = model_and_data
    output = tmp_path / "new folder" / "out.json"
    argv = [
        "perplexity",
        "--checkpoint",
        str(model_path),
        "--data",
        f"rivers={prefix}.bin",
        "--output",
        str(output),
    ]
    assert main([*argv, "--quiet"]) == 0
    assert "rivers" in capsys.readouterr().out
    result = json.loads(output.read_text())["checkpoints"][0]["domains"][0]

    model = AutoModelForCausalLM.from_pretrained(model_path).eval()
    bos, nll, num_tokens = 1, 0.0, 0
    for (ids,) in IndexedDataset(prefix).iter_documents():
        row = torch.tensor([[bos, *ids.tolist()]])
        with torch.no_grad():
            logprobs = model(row).logits.log_softmax(-1)
        nll -= logprobs[0, :-1].gather(1, row[0, 1:, None]).sum().item()
        num_tokens += len(ids)
    assert result["num_scored_tokens"] == num_tokens
    assert result["nll_nats"] == pytest.approx(nll, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "{model}", "--data", "{prefix}"], "expected NAME=PREFIX"),
        (["--checkpoint", "{model}", "--data", "a={prefix}", "a={prefix}"], "given twice"),
        (["--checkpoint", "{model}", "--data", "a=/no/such"], "/no/such.idx"),
        (["--checkpoint", "/no/such/model", "--data", "a={prefix}"], "no such folder"),
        (["--checkpoint", "{model}", "--data", "a={prefix}", "--context", "100000"], "context"),
    ],
)
def test_faults_end_with_exit_code_1_and_one_message(
    model_and_data: tuple[Path, str], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    model, prefix = model_and_data
    assert main(["perplexity", *(a.format(model=model, prefix=prefix) for a in arguments)]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_a_checkpoint_of_another_tokenizer_is_refused(
    model_and_data: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = write_hf_llama(tmp_path / "small", vocab_size=64)
    assert main(["perplexity", "--checkpoint", str(small), "--data", f"a={model_and_data[1]}"]) == 1
    assert "vocabulary only 64" in capsys.readouterr().err


def test_a_truncated_dataset_is_refused(
    model_and_data: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, prefix = model_and_data
    for suffix in (".bin", ".idx", ".manifest.json"):
        (tmp_path / f"cut{suffix}").write_bytes(Path(f"{prefix}{suffix}").read_bytes())
    with (tmp_path / "cut.bin").open("r+b") as file:
        file.truncate(100)
    assert main(["perplexity", "--checkpoint", str(model), "--data", f"a={tmp_path}/cut"]) == 1
    assert "cut.bin: has 50 tokens" in capsys.readouterr().err
