"""A training tokenizer that is not the prior's: decode what was edited, encode it again, lose nothing."""

from __future__ import annotations

import orjson
import pytest
from pipeline_cases import TOKENIZER, VOCAB_SIZE, WORDS, editing, output_bytes, settings, write_corpus

from megatron_tokedit.config.preprocess import preprocess_config
from megatron_tokedit.dataset import IndexedDataset, read_manifest, undo_dataset, verify_dataset
from megatron_tokedit.edit.lineage import Lineage
from megatron_tokedit.errors import ConfigError, TokenizerError
from megatron_tokedit.pipeline import run
from megatron_tokedit.pipeline.editing import Reencoder
from megatron_tokedit.pipeline.groups import EncodedKey, Fate
from megatron_tokedit.pipeline.resources import load_tokenizers
from megatron_tokedit.testing.models import train_sentencepiece, write_hf_llama
from megatron_tokedit.tokenizers import encode_documents, load_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    other = folder / "other.model"
    train_sentencepiece(other, [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))], vocab_size=320)
    return write_hf_llama(folder / "llama", vocab_size=VOCAB_SIZE), str(other)


@pytest.fixture
def folder(tmp_path):
    write_corpus(tmp_path / "corpus.jsonl")
    return tmp_path


def output(models, **changes):
    prior, other = models
    return (
        editing(prior)
        | {"output_tokenizer_type": "SentencePieceTokenizer", "output_tokenizer_model": other}
        | changes
    )


def job(folder, name, changes):
    return run(preprocess_config(settings(folder, name, **changes)))


def stats(folder, name):
    return orjson.loads((folder / f"{name}_text_document.stats.json").read_bytes())


@pytest.mark.parametrize("changes", [{}, {"edit_strategy": "filtering", "edit_low_threshold": 0.0028}])
def test_undo_gives_what_the_training_tokenizer_alone_writes(folder, models, changes):
    job(folder, "out", output(models, **changes))
    job(folder, "plain", {"tokenizer_model": models[1]})
    undo_dataset(f"{folder}/out_text_document", f"{folder}/undone_text_document")
    assert output_bytes(folder, "undone") == output_bytes(folder, "plain")
    assert output_bytes(folder, "out") != output_bytes(folder, "plain")
    verify_dataset(f"{folder}/out_text_document")
    manifest = read_manifest(f"{folder}/out_text_document")
    assert manifest.tokenizer.model == models[1]
    assert manifest.prior_tokenizer.model == TOKENIZER
    assert manifest.edit["output_round_trip"] == "original"


def test_the_text_is_that_of_the_edit(folder, models):
    job(folder, "out", output(models))
    job(folder, "same", editing(models[0]))
    written, prior_s = (load_tokenizer("SentencePieceTokenizer", path) for path in (models[1], TOKENIZER))
    ours, theirs = (IndexedDataset(f"{folder}/{name}_text_document") for name in ("out", "same"))
    assert ours.num_documents == theirs.num_documents == 40
    for index in range(40):
        spelled = [written.decode(ids) for ids in ours.document(index)]
        assert spelled[:-1] == [prior_s.decode(ids) for ids in theirs.document(index)][:-1]
        if spelled:
            assert spelled[-1].removesuffix("</s>") == prior_s.decode(theirs.document(index)[-1][:-1])


def awkward(folder):
    """Two of three documents come back as they are; sentencepiece writes a space as the character of the
    other.
    """
    texts = ["the river rises", "in \u2581 hills \u2581 and falls", "sea ; nobody counts"]
    lines = [orjson.dumps({"text": text}) for text in texts]
    (folder / "corpus.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return texts


@pytest.mark.parametrize("policy", ["original", "decoded", "drop"])
def test_documents_that_do_not_come_back_are_counted(tmp_path, models, policy):
    texts = awkward(tmp_path)
    everything = {"edit_threshold": 0.0, "edit_temperature": 50.0, "output_round_trip": policy}
    job(tmp_path, "out", output(models, **everything))
    dataset = IndexedDataset(f"{tmp_path}/out_text_document")
    documents = stats(tmp_path, "out")["documents"]
    spent = stats(tmp_path, "out")["bytes"]
    assert spent["in"] == spent["out"] + sum(spent["dropped"].values())
    if policy == "drop":
        assert (documents["out"], documents["dropped"]) == (2, {"bad_line": 0, "round_trip": 1})
        assert spent["dropped"]["round_trip"] == len(texts[1].encode())
        return
    assert documents["out"] == dataset.num_documents == 3
    assert documents["unedited"] == ({"round_trip": 1} if policy == "original" else {})
    tokenizer = load_tokenizer("SentencePieceTokenizer", models[1])
    unedited = tokenizer.encode(texts[1])
    assert (dataset.document(1)[0].tolist()[:-1] == unedited) == (policy == "original")
    job(tmp_path, "plain", {"tokenizer_model": models[1]})
    undo_dataset(f"{tmp_path}/out_text_document", f"{tmp_path}/undone_text_document")
    assert output_bytes(tmp_path, "undone") == output_bytes(tmp_path, "plain")


def test_it_must_be_another_tokenizer_and_something_must_be_edited(folder, models):
    with pytest.raises(TokenizerError, match="leave --output-tokenizer"):
        job(folder, "out", output(models, output_tokenizer_model=TOKENIZER))
    with pytest.raises(ConfigError, match="one tokenizer only"):
        job(folder, "out", output(models, edit_strategy="none"))


def test_documents_without_ids_stay_so_where_all_is_decoded(tmp_path, models):
    lines = [orjson.dumps({"text": text}) for text in ("", [], ["", ""], "the river", ["", "falls"])]
    (tmp_path / "corpus.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    job(tmp_path, "out", output(models, output_round_trip="decoded"))
    job(tmp_path, "plain", {"tokenizer_model": models[1]})
    dataset = IndexedDataset(f"{tmp_path}/out_text_document")
    assert [len(dataset.document(index)) for index in range(5)] == [0, 0, 0, 1, 1]
    undo_dataset(f"{tmp_path}/out_text_document", f"{tmp_path}/undone_text_document")
    assert output_bytes(tmp_path, "undone") == output_bytes(tmp_path, "plain")


def test_no_edit_spells_a_control_token_of_the_training_tokenizer(models, tmp_path):
    """To the prior's tokenizer its name is ordinary text, so a sampler may well write it."""
    config = preprocess_config(
        settings(
            tmp_path, "out", **output(models, tokenizer_model=models[1], output_tokenizer_model=TOKENIZER)
        )
    )
    tokenizers = load_tokenizers(config)
    reencoder = Reencoder(config, tokenizers)
    edited = "the <sep> falls"
    (after,) = encode_documents(tokenizers.text, [[edited]])[0]
    (other_id,) = tokenizers.text.encode("a")[-1:]
    outcomes = set()
    for place in range(1, len(after)):  # an edit put the token at this place where another stood
        before = after.copy()
        before[place] = other_id
        text = tokenizers.text.decode(before)
        is_written = "<sep>" in text
        encoded = EncodedKey(
            [[text]], [[before]], encode_documents(tokenizers.output, [[text]]), [Fate.EDIT], {}, 0
        )
        sequences, changes, is_refused = reencoder.written(encoded, 0, Lineage([after], [before]))
        assert is_refused is not is_written
        assert tokenizers.output.decode(sequences[0]) == (edited if is_written else text)
        assert bool(len(changes[0])) == is_written
        outcomes.add(is_written)
    assert outcomes == {True, False}
