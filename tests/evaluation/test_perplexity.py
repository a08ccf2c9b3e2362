"""Perplexity of datasets under exact priors, and `tools/evaluate.py perplexity` on real tiny models."""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tokedit.cli.evaluate import main
from megatron_tokedit.cli.preprocess_edit import main as preprocess
from megatron_tokedit.dataset import IndexedDataset, IndexedDatasetWriter
from megatron_tokedit.errors import DataFormatError, PriorError
from megatron_tokedit.evaluation import dataset_documents, dataset_responses, measure_perplexity
from megatron_tokedit.scoring.base import TokenScores
from megatron_tokedit.scoring.scorer import CausalScorer, ScoringOptions
from megatron_tokedit.testing.fake_prior import BigramBackbone, BigramScorer, random_bigrams
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
    dataset = write_dataset(tmp_path / "d", documents)
    result = measure_perplexity(BigramScorer(table, bos), dataset_documents(dataset), "d")
    nll = num_scored = 0
    expected = []
    for sequences in documents:
        previous, before = bos, (nll, num_scored)
        for token in [token for ids in sequences for token in ids]:
            if previous is not None:
                nll -= math.log(table[previous, token])
                num_scored += 1
            previous = token
        expected.append((nll - before[0], num_scored - before[1]))
    assert result.num_tokens == 1 + 7 + 90 + 2 + 3
    assert result.num_scored_tokens == num_scored
    assert result.num_documents == (5 if bos is not None else 4)
    assert result.nll_nats == pytest.approx(nll, rel=1e-5)
    sums = result.documents
    assert sums.num_tokens_D.tolist() == [1, 7, 90, 2, 0, 3], "the empty document keeps its place"
    assert sums.num_scored_tokens_D.tolist() == [scored for _, scored in expected]
    assert sums.nll_nats_D == pytest.approx([nats for nats, _ in expected], rel=1e-5)


def test_of_conversations_the_responses_count_with_all_that_stands_before_them(tmp_path: Path) -> None:
    table = random_bigrams(VOCAB_SIZE, seed=1)
    conversations = [[[4, 5, 6, 7, 2]], [[8, 9, 3]], [[1, 2]]]
    masks = [[[0, 0, 1, 1, 0]], [[1, 1, 0]], [[0, 0]]]
    dataset, mask = write_dataset(tmp_path / "c", conversations), write_dataset(tmp_path / "m", masks)
    result = measure_perplexity(BigramScorer(table, None), dataset_responses(dataset, mask), "d")
    assert result.documents.num_scored_tokens_D.tolist() == [2, 1, 0]  # the first token has no probability
    assert result.documents.nll_nats_D == pytest.approx(
        [-math.log(table[5, 6]) - math.log(table[6, 7]), -math.log(table[8, 9]), 0.0], rel=1e-5
    )
    assert result.documents.num_tokens_D.tolist() == [5, 3, 2]


def test_a_dataset_without_scorable_tokens_is_refused(tmp_path: Path) -> None:
    scorer = BigramScorer(random_bigrams(VOCAB_SIZE, seed=1))
    for name, documents in {"empty": [[]], "single": [[[3]]]}.items():
        dataset = write_dataset(tmp_path / name, documents)
        with pytest.raises(DataFormatError, match=f"domain {name}: .*no token"):
            measure_perplexity(scorer, dataset_documents(dataset), name)


class OneBadToken(BigramScorer):
    """Its third document has a token whose log-probability is not a number."""

    def score(self, documents, candidates=None, *, on_batch=None):
        scores = super().score(documents, candidates, on_batch=on_batch)
        scores[2].logprobs_T[40] = np.nan
        return scores


def test_numbers_that_are_none_are_refused(documents: list[list[list[int]]]) -> None:
    ids = [np.array([i for ids in sequences for i in ids], np.int32) for sequences in documents]
    table = random_bigrams(VOCAB_SIZE, seed=1)
    with pytest.raises(PriorError, match=r"domain d, document 2: .* not a finite number"):
        measure_perplexity(OneBadToken(table, 0), ids, "d")
    table[:, 3] = 0.0
    with pytest.raises(PriorError, match="not a finite number"):
        measure_perplexity(BigramScorer(table, 0), [np.array([1, 3], np.int32)], "d")


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 150), min_size=1, max_size=6),
    context=st.integers(2, 64),
    data=st.data(),
    start_id=st.sampled_from([None, 0]),
)
def test_every_stride_gives_what_the_whole_context_gives(
    lengths: list[int], context: int, data: st.DataObject, start_id: int | None
) -> None:
    """Of a model that looks one token back: every token once, and never without its context."""
    stride = data.draw(st.integers(1, context - 1))
    generator = np.random.default_rng(len(lengths))
    documents = [generator.integers(0, VOCAB_SIZE, n).astype(np.int32) for n in [*lengths, 5]]
    table = random_bigrams(VOCAB_SIZE, seed=1)
    options = ScoringOptions(context, context - stride, start_id, batch_tokens=256, logits_bytes=1 << 20)
    strided = measure_perplexity(CausalScorer(BigramBackbone(table), options), documents, "d")
    whole = measure_perplexity(BigramScorer(table, start_id), documents, "d")
    np.testing.assert_array_equal(strided.documents.num_scored_tokens_D, whole.documents.num_scored_tokens_D)
    np.testing.assert_allclose(strided.documents.nll_nats_D, whole.documents.nll_nats_D, rtol=1e-4, atol=1e-4)


def test_memory_grows_with_the_number_of_documents_alone() -> None:
    """24 bytes a document, and what a batch needs."""

    class Quick(BigramScorer):
        def score(self, documents, candidates=None, *, on_batch=None):
            none = np.zeros((0, 0), np.float32)
            return [TokenScores(np.full(len(ids), -1.0, np.float32), none, none, none) for ids in documents]

    def peak(num_documents: int, length: int) -> int:
        ids = np.zeros(length, np.int32)
        tracemalloc.start()
        measure_perplexity(Quick(np.ones((1, 1))), (ids for _ in range(num_documents)), "d")
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    small = peak(10_000, 10)
    assert peak(60_000, 10) - small < 50_000 * 24 * 1.3, "arrays grow by an eighth at a time"
    assert peak(10_000, 1000) - small < 64 * 1000 * 8


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


def test_strides_are_those_of_the_usual_recipe(
    model_and_data: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loop of transformers' documentation on perplexity, with BOS in front of every window."""
    import torch
    from transformers import AutoModelForCausalLM

    model_path, prefix = model_and_data
    model = AutoModelForCausalLM.from_pretrained(model_path).eval()
    ids = np.concatenate([ids for (ids,) in IndexedDataset(prefix).iter_documents()]).tolist()
    long_prefix = tmp_path / "long"
    write_dataset(long_prefix, [[ids]])
    manifest = json.loads(Path(f"{prefix}.manifest.json").read_text())
    Path(f"{long_prefix}.manifest.json").write_text(json.dumps(manifest))
    context = 24
    for stride in (1, 5, 23):
        nll = previous_end = 0
        for begin in range(0, len(ids), stride):
            end = min(begin + context, len(ids))
            target = end - previous_end
            row = torch.tensor([[1, *ids[begin:end]]])
            with torch.no_grad():
                logprobs_1TV = model(row).logits.log_softmax(-1)
            nll -= logprobs_1TV[0, :-1].gather(1, row[0, 1:, None])[-target:].sum().item()
            previous_end = end
            if end == len(ids):
                break
        output = tmp_path / f"{stride}.json"
        argv = ["--checkpoint", str(model_path), "--data", f"a={long_prefix}", "--output", str(output)]
        argv += ["--context", str(context), "--stride", str(stride), "--quiet"]
        assert main(["perplexity", *argv]) == 0, capsys.readouterr().err
        entry = json.loads(output.read_text())["checkpoints"][0]
        assert entry["scoring"]["stride_tokens"] == stride
        assert entry["domains"][0]["num_scored_tokens"] == len(ids)
        assert entry["domains"][0]["nll_nats"] == pytest.approx(nll, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "{model}", "--data", "{prefix}"], "expected NAME=PREFIX"),
        (["--checkpoint", "{model}", "--data", "a={prefix}", "a={prefix}"], "given twice"),
        (["--checkpoint", "{model}", "--data", "a=/no/such"], "/no/such.idx"),
        (["--checkpoint", "/no/such/model", "--data", "a={prefix}"], "no such folder"),
        (["--checkpoint", "{model}", "--data", "a={prefix}", "--context", "100000"], "context"),
        (["--checkpoint", "{model}", "--data", "a={prefix}", "--stride", "64"], "--stride 64: expected"),
        (["--checkpoint", "{model}", "--data", "a={prefix}", "--stride", "0"], "--stride 0: expected"),
        (["--checkpoint", "{model}", "--data", "average={prefix}"], "the name 'average'"),
        (["--checkpoint", "{model}", "{model}", "--data", "a={prefix}"], "one is given twice"),
        (["--checkpoint", "{model}", "--data", "a={prefix}", "--baseline", "x"], "one checkpoint only"),
        (["--checkpoint", "{model}", "y", "--data", "a={prefix}", "--baseline", "x"], "one of model, y"),
        (["--checkpoint", "{model}", "--data", "a={prefix}", "--bootstrap", "-1"], "--bootstrap -1"),
        (["--checkpoint", "{model}", "--data", "a={prefix}", "--plot", "x.txt"], "--plot x.txt"),
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
