"""The adapter against lm-eval: the same answers and scores, on folders, checkpoints, and over processes."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_tokedit.errors import ConfigError, DataFormatError
from megatron_tokedit.testing.ranks import RankPool

pytest.importorskip("lm_eval")
sys.path.append(str(Path(__file__).resolve().parent))
import task_cases

sys.path.append(str(task_cases.ROOT / "tests" / "conversion"))
import conversion_cases

KINDS = ("bpe", "sentencepiece")


def write_model(folder: Path, kind: str) -> Path:
    """A random Llama: byte-level BPE without BOS, or a sentencepiece model with BOS."""
    if kind == "bpe":
        return conversion_cases.write_published(folder, "llama")
    from safetensors.torch import load_file, save_file

    from megatron_tokedit.conversion.tokenizer_files import write_tokenizer
    from megatron_tokedit.testing.models import write_hf_llama
    from megatron_tokedit.tokenizers import load_tokenizer

    source = conversion_cases.DATA / "tiny_sentencepiece.model"
    tokenizer = load_tokenizer("SentencePieceTokenizer", str(source))
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eod}
    write_hf_llama(folder, vocab_size=tokenizer.vocab_size + 3, **ids)
    write_tokenizer(tokenizer, folder, tokenizer.bos)
    # transformers also writes ids that no token has
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][tokenizer.vocab_size :] = 0.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return task_cases.write_tasks(tmp_path_factory.mktemp("tasks") / "local")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("published")
    return {kind: write_model(folder / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def expected(published: dict[str, Path], tasks: Path) -> dict[str, dict[str, Any]]:
    return {kind: task_cases.run(task_cases.reference(path), tasks) for kind, path in published.items()}


@pytest.fixture(scope="module")
def converted(
    ranks: RankPool, published: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Checkpoints of the same; the sentencepiece one also with the sentencepiece model as its tokenizer."""
    folder = tmp_path_factory.mktemp("converted")
    calls: list[tuple[Any, ...]] = [
        ("--input", path, "--output", folder / kind) for kind, path in published.items()
    ]
    kind = ("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", published["sentencepiece"])
    calls.append(("--input", published["sentencepiece"], "--output", folder / "pieces", *kind))
    (results,) = ranks.run(conversion_cases.convert_all, calls, world_size=1)
    assert [code for code, _ in results] == [0, 0, 0], results
    return {name: folder / name for name in (*KINDS, "pieces")}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Log-probabilities to float rounding, the rest exactly."""
    choices, texts, starts = (f"local_{name}" for name in ("choices", "texts", "starts"))
    for ours, theirs in zip(found["answers"][choices], expected["answers"][choices], strict=True):
        assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-4)
        assert [is_greedy for _, is_greedy in ours] == [is_greedy for _, is_greedy in theirs]
    for ours, theirs in zip(found["answers"][texts], expected["answers"][texts], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-4)
    assert found["answers"][starts] == expected["answers"][starts]
    assert found["scores"].keys() == expected["scores"].keys()
    for key, (value, stderr) in found["scores"].items():
        tolerance = {"rel": 1e-5} if key[0] == texts else {"abs": 0}
        assert value == pytest.approx(expected["scores"][key][0], **tolerance), key
        theirs = expected["scores"][key][1]
        assert stderr == (None if theirs is None else pytest.approx(theirs, rel=1e-4)), key


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder(published: dict[str, Path], tasks: Path, expected: dict[str, Any], kind: str) -> None:
    assert_same(task_cases.evaluate(published[kind], tasks), expected[kind])
    answers = expected[kind]["answers"]
    assert any(text for (text,) in answers["local_starts"])
    assert len({len(text) for (text,) in answers["local_starts"]}) > 1


@pytest.mark.parametrize("kind", [*KINDS, "pieces"])
def test_a_checkpoint(
    ranks: RankPool, converted: dict[str, Path], tasks: Path, expected: dict[str, Any], kind: str
) -> None:
    (found,) = ranks.run(task_cases.evaluate, converted[kind], tasks, world_size=1)
    assert_same(found, expected["sentencepiece" if kind == "pieces" else kind])


def test_tensor_parallel(
    ranks: RankPool, converted: dict[str, Path], tasks: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    store = str(tmp_path / "store")
    first, second = ranks.run(task_cases.evaluate, converted["bpe"], tasks, rank_store=store, world_size=2)
    assert second == {}
    assert_same(first, expected["bpe"])


@pytest.mark.parametrize("kind", [*KINDS, "pieces"])
def test_lm_evals_own_model(
    ranks: RankPool, published: dict[str, Path], converted: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """A folder and a checkpoint score as the folder does through lm-eval's own model."""
    pytest.importorskip("accelerate", reason="lm-eval's model hf needs it")
    from megatron_tokedit.evaluation.tasks.huggingface import load_lm_eval_model
    from megatron_tokedit.evaluation.tasks.model import ModelOptions

    folder = published["sentencepiece" if kind == "pieces" else kind]
    tasks = task_cases.write_tasks(tmp_path / "local", task_cases.CHOICES_FOR_HF)
    theirs = task_cases.run(load_lm_eval_model(str(folder), ModelOptions()), tasks)
    if kind in KINDS:
        assert_same(task_cases.evaluate(folder, tasks), theirs)
    (found,) = ranks.run(task_cases.evaluate, converted[kind], tasks, world_size=1)
    assert_same(found, theirs)


@pytest.mark.parametrize("seed", [None, 5])
def test_few_shot_examples(
    published: dict[str, Path], tmp_path: Path, seed: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same examples before a question, and the same scores, as by lm-eval's own ``simple_evaluate``."""
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    from megatron_tokedit.evaluation.tasks.harness import silence
    from megatron_tokedit.evaluation.tasks.model import ModelOptions, load_task_model

    choices = [
        {"question": f"{i} and", "choices": [f" {i}", " one", " two"], "answer": i % 3} for i in range(9)
    ]
    tasks = task_cases.write_tasks(tmp_path / "local", choices)
    path = tasks / "choices.yaml"
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    reference = task_cases.reference(published["bpe"])
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)  # seconds
    with silence():
        expected = evaluator.simple_evaluate(
            reference,
            tasks=[str(path)],
            task_manager=TaskManager(include_defaults=False),
            num_fewshot=2,
            bootstrap_iters=100,
            **({} if seed is None else dict.fromkeys(seeds, seed)),
        )
    lm = task_cases.adapter(load_task_model(str(published["bpe"]), ModelOptions()))
    found = task_cases.run(lm, path, num_fewshot=2, seed=seed)
    contexts = {sample["doc_id"]: sample["arguments"] for sample in expected["samples"]["local_choices"]}
    assert found["contexts"]["local_choices"] == contexts
    assert all(str(arguments).count(" and") == 9 for arguments in contexts.values())
    for (task, metric), (value, _) in found["scores"].items():
        assert value == expected["results"][task][f"{metric},none"]


@settings(deadline=None)
@given(data=st.data())
def test_texts_of_any_ids(published: dict[str, Path], data: st.DataObject) -> None:
    """A sentencepiece model's texts are those of its Hugging Face folder, runs of single bytes included."""
    from megatron_tokedit.evaluation.tasks.encoding import TextEncoder
    from megatron_tokedit.tokenizers import load_tokenizer

    source = conversion_cases.DATA / "tiny_sentencepiece.model"
    pieces = load_tokenizer("SentencePieceTokenizer", str(source))
    space, first = 0x20 + 5, 5  # of <0x20> and <0x00>
    assert pieces.decode([space]) == " "
    single = st.integers(first, first + 255)
    ids = data.draw(st.lists(single | st.integers(0, pieces.vocab_size - 1), min_size=1, max_size=12))
    shown = [i for i in ids if i not in pieces.special_ids - pieces.spellable_ids]
    assume(shown[:1] != [space])  # transformers takes it for the space before a text
    expected = transformers_tokenizer(published["sentencepiece"]).decode(ids, skip_special_tokens=True)
    assert TextEncoder(pieces, pieces.bos).decode(ids) == expected


@functools.cache
def transformers_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_less_context(published: dict[str, Path], tasks: Path) -> None:
    expected = task_cases.run(task_cases.reference(published["bpe"], context=40), tasks)
    assert_same(task_cases.evaluate(published["bpe"], tasks, context=40), expected)


def test_what_has_no_probability(published: dict[str, Path], tmp_path: Path) -> None:
    from megatron_tokedit.evaluation.tasks.model import ModelOptions, load_task_model

    lm = task_cases.adapter(load_task_model(str(published["bpe"]), ModelOptions()))
    with pytest.raises(DataFormatError, match=r"task t, document 3: the continuation '' has no tokens"):
        lm.loglikelihood([instance("Some text", "")])
    with pytest.raises(DataFormatError, match=r"task t, document 3: the continuation '' has no tokens"):
        lm.loglikelihood([instance("", "")])
    with pytest.raises(DataFormatError, match=r"document 3: a continuation of \d+ tokens: .* 64 at most"):
        lm.loglikelihood([instance("Some", " text" * 90)])
    with pytest.raises(ConfigError, match=r"task t: .*max_gen_toks 256 \(default: 256\) leaves no room"):
        lm.generate_until([instance("Some", {"until": []})])
    with pytest.raises(ConfigError, match=r"task t: .*'num_beams': 4.* cannot be honoured"):
        lm.generate_until([instance("Some", {"max_gen_toks": 8, "num_beams": 4})])
    assert lm.loglikelihood_rolling([instance("")]) == [0]


def test_drawn_texts(published: dict[str, Path]) -> None:
    """Repeats differ, the same request again gives the same, and a zero temperature draws nothing."""
    from megatron_tokedit.evaluation.tasks.model import ModelOptions, load_task_model

    model = load_task_model(str(published["bpe"]), ModelOptions())
    drawn = instance("The river", {"max_gen_toks": 16, "do_sample": True, "temperature": 1.0, "top_k": 50})
    greedy = instance("The river", {"max_gen_toks": 16, "do_sample": False, "temperature": 0.7})
    texts = task_cases.adapter(model).generate_until([drawn, greedy, drawn, greedy])
    assert texts[0] != texts[2]
    assert texts[1] == texts[3]
    assert task_cases.adapter(model).generate_until([drawn, drawn]) == [texts[0], texts[2]]


def test_answers_are_kept(published: dict[str, Path], tasks: Path, tmp_path: Path) -> None:
    from megatron_tokedit.evaluation.tasks.model import ModelOptions, load_task_model

    model = load_task_model(str(published["bpe"]), ModelOptions())
    first = task_cases.run(task_cases.adapter(model, tmp_path), tasks)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    path.write_bytes(content[:-20])  # killed while it wrote
    told: list[tuple[str, int, int]] = []
    lm = task_cases.adapter(model, tmp_path)
    lm._on_requests = lambda *what: told.append(what)
    assert task_cases.run(lm, tasks) == first
    assert sum(number for _, _, number in told) == 1
    assert task_cases.adapter(model, tmp_path)._answers.num_found == content.count(b"\n")


def instance(*arguments: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance("loglikelihood", {}, arguments, 0, metadata=("t", 3, 1))
