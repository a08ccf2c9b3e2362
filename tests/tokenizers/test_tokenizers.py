"""Both kinds of tokenizer: the ids are the library's own, decoding loses nothing, faults are named."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as RustTokenizer
from transformers import AutoTokenizer

from megatron_tokedit.errors import TokenizerError
from megatron_tokedit.tokenizers import (
    Tokenizer,
    append_eod,
    encode_document,
    encode_documents,
    load_tokenizer,
    tokenizer_spec,
)
from megatron_tokedit.tokenizers.segments import split_at_ids

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
SHARED = ROOT.parent / "shared" / "data"
BPE = ("HuggingFaceTokenizer", str(DATA / "tiny_byte_level_bpe"))
PIECES = ("SentencePieceTokenizer", str(DATA / "tiny_sentencepiece.model"))
TEXTS = [
    "",
    " ",
    "a",
    "  two  spaces  ",
    "line\n\n\ttab\r\n",
    "\0nul",
    "caf\u00e9 \u4f60\u597d \U0001f600 \ufb01 \u00bd",
    "don't , you . see !",
    "</s><s> <unk> it<|endoftext|> spells",
    "<s>",
]
any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=40)


def llama_folder(folder: Path, *, every_segment: bool) -> Path:
    """A Llama-style tokenizer.json: BOS template, byte fallback, and a space put before the text.

    ``every_segment``: before every segment between special tokens (Llama 2), or only before the text.
    """
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "\u2581a"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [("\u2581", "a")]
    tokenizer = RustTokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if every_segment:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
        strip = [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
        tokenizer.decoder = decoders.Sequence(strip)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme="first", split=False)
        metaspace = decoders.Metaspace("\u2581", prepend_scheme="first")
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), metaspace])
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False) for piece in pieces[:3]])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("llama")
    return {
        "pieces": load_tokenizer(*PIECES),
        "bpe": load_tokenizer(*BPE),
        "llama": load_tokenizer(
            "HuggingFaceTokenizer", str(llama_folder(folder / "every", every_segment=True))
        ),
        "metaspace": load_tokenizer(
            "HuggingFaceTokenizer", str(llama_folder(folder / "first", every_segment=False))
        ),
    }


NAMES = ["pieces", "bpe", "llama", "metaspace"]


@pytest.mark.parametrize("name", NAMES)
def test_the_protocol_is_met(loaded: dict[str, Tokenizer], name: str) -> None:
    tokenizer = loaded[name]
    assert isinstance(tokenizer, Tokenizer)
    assert 0 <= tokenizer.eod < tokenizer.vocab_size
    assert tokenizer.eod in tokenizer.special_ids
    assert all(0 <= special < tokenizer.vocab_size for special in tokenizer.special_ids)
    assert {*tokenizer.prefix_ids, *tokenizer.suffix_ids} <= tokenizer.special_ids


@pytest.mark.parametrize("name", NAMES)
def test_batches_are_single_texts(loaded: dict[str, Tokenizer], name: str) -> None:
    tokenizer = loaded[name]
    batch = tokenizer.encode_batch(TEXTS)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in TEXTS]
    assert all(ids.dtype == np.int32 for ids in batch)
    assert tokenizer.encode_batch([]) == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", TEXTS)
def test_decoding_loses_nothing(loaded: dict[str, Tokenizer], name: str, text: str) -> None:
    if name == "metaspace" and text.startswith(" "):
        pytest.skip("its pre-tokenizer gives ' a' the ids of 'a': nobody can tell them apart")
    ids = loaded[name].encode(text)
    assert loaded[name].decode(ids) == text
    assert loaded[name].decode(np.array(ids, np.uint16)) == text


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=80, deadline=None)
@given(text=any_text)
def test_decoding_loses_nothing_in_any_text(loaded: dict[str, Tokenizer], name: str, text: str) -> None:
    assume(name != "metaspace" or not text.startswith(" "))
    assert loaded[name].decode(loaded[name].encode(text)) == text


@pytest.mark.parametrize("name", NAMES)
def test_any_ids_decode(loaded: dict[str, Tokenizer], name: str) -> None:
    """Edited documents hold ids in orders that no text has; they decode to something, whatever it is."""
    generator = np.random.default_rng(0)
    for _ in range(50):
        ids = generator.integers(0, loaded[name].vocab_size, 20)
        loaded[name].decode(ids).encode()


def test_sentencepiece_ids_are_the_library_s(loaded: dict[str, Tokenizer]) -> None:
    tokenizer = loaded["pieces"]
    library = sentencepiece.SentencePieceProcessor(model_file=PIECES[1])
    assert [tokenizer.encode(text) for text in TEXTS] == [library.encode(text) for text in TEXTS]
    assert (tokenizer.bos, tokenizer.eod, tokenizer.pad) == (1, 2, 3)
    assert tokenizer.vocab_size == library.get_piece_size()
    assert tokenizer.prepends_bos
    assert tokenizer.prefix_ids == ()


def test_user_defined_and_control_pieces_are_special(loaded: dict[str, Tokenizer]) -> None:
    library = sentencepiece.SentencePieceProcessor(model_file=PIECES[1])
    assert loaded["pieces"].special_ids == {0, 1, 2, 3, library.piece_to_id("<sep>")}
    assert loaded["pieces"].decode(loaded["pieces"].encode("a <sep>b")) == "a <sep>b"


def test_control_pieces_are_spelled_out(loaded: dict[str, Tokenizer]) -> None:
    tokenizer = loaded["pieces"]
    ids = [tokenizer.bos, *tokenizer.encode("the river"), tokenizer.eod, 0, 3]
    assert tokenizer.decode(ids) == "<s>the river</s><unk><pad>"


@pytest.mark.parametrize("name", ["bpe", "llama", "metaspace"])
def test_hugging_face_ids_are_transformers_own(loaded: dict[str, Tokenizer], name: str) -> None:
    tokenizer = loaded[name]
    library = AutoTokenizer.from_pretrained(tokenizer.tokenizer_model)
    assert [tokenizer.encode(text) for text in TEXTS] == [library(text).input_ids for text in TEXTS]
    assert tokenizer.vocab_size == len(library)
    assert tokenizer.eod == library.eos_token_id


def test_bos_is_known_from_the_template(loaded: dict[str, Tokenizer]) -> None:
    assert (loaded["llama"].bos, loaded["llama"].prefix_ids, loaded["llama"].prepends_bos) == (1, (1,), True)
    assert (loaded["bpe"].bos, loaded["bpe"].prefix_ids, loaded["bpe"].prepends_bos) == (None, (), False)


def test_the_template_is_left_out_once(loaded: dict[str, Tokenizer]) -> None:
    tokenizer = loaded["llama"]
    assert tokenizer.encode("<s>") == [1, 1]
    assert tokenizer.decode([1, 1]) == "<s>"
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.eod]) == "a</s>"


def test_fingerprints_tell_tokenizers_apart(loaded: dict[str, Tokenizer]) -> None:
    assert len({tokenizer.fingerprint for tokenizer in loaded.values()}) == len(loaded)
    assert load_tokenizer(*BPE).fingerprint == loaded["bpe"].fingerprint
    assert load_tokenizer(*PIECES).fingerprint == loaded["pieces"].fingerprint


def test_the_fingerprint_does_not_depend_on_the_form(loaded: dict[str, Tokenizer], tmp_path: Path) -> None:
    AutoTokenizer.from_pretrained(BPE[1]).save_pretrained(tmp_path / "again")
    assert load_tokenizer(BPE[0], str(tmp_path / "again")).fingerprint == loaded["bpe"].fingerprint


def test_the_fingerprint_sees_a_changed_merge(loaded: dict[str, Tokenizer], tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(BPE[1], folder)
    contents = json.loads((folder / "tokenizer.json").read_text())
    contents["model"]["merges"][-2:] = contents["model"]["merges"][:-3:-1]
    (folder / "tokenizer.json").write_text(json.dumps(contents))
    assert load_tokenizer(BPE[0], str(folder)).fingerprint != loaded["bpe"].fingerprint


def test_spec(loaded: dict[str, Tokenizer]) -> None:
    assert tokenizer_spec(loaded["pieces"]) == {
        "type": "SentencePieceTokenizer",
        "model": PIECES[1],
        "vocab_size": loaded["pieces"].vocab_size,
        "eod": 2,
        "fingerprint": loaded["pieces"].fingerprint,
    }


def test_documents_are_encoded_as_megatron_does(loaded: dict[str, Tokenizer]) -> None:
    tokenizer = loaded["bpe"]
    first, second = tokenizer.encode("first"), tokenizer.encode("second")
    documents = encode_documents(tokenizer, [["first", "", "second"], [""], [], ["first"]])
    assert [[ids.tolist() for ids in document] for document in documents] == [
        [first, second],
        [],
        [],
        [first],
    ]
    assert [ids.tolist() for ids in encode_document(tokenizer, ["", "first"])] == [first]
    ended = append_eod(documents[0], tokenizer.eod)
    assert [ids.tolist() for ids in ended] == [first, [*second, tokenizer.eod]]
    assert ended[1].dtype == np.int32
    assert append_eod([], tokenizer.eod) == []


@given(ids=st.lists(st.integers(0, 5)), cuts=st.sets(st.integers(0, 5)))
def test_segments_put_together_are_the_input(ids: list[int], cuts: set[int]) -> None:
    together: list[int] = []
    for segment, cut in split_at_ids(np.array(ids, np.int32), np.array(sorted(cuts), np.int32)):
        assert not cuts & set(segment.tolist())
        together += segment.tolist() if cut is None else [*segment.tolist(), cut]
    assert together == ids


def without_eos(folder: Path) -> str:
    shutil.copytree(BPE[1], folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return str(folder)


def test_a_usual_eod_is_taken_where_none_is_configured(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = load_tokenizer(BPE[0], without_eos(tmp_path / "t"))
    assert tokenizer.eod == 0
    assert "taking <|endoftext|> (id 0) as end of document" in caplog.text


def test_no_eod_is_refused(tmp_path: Path) -> None:
    folder = Path(without_eos(tmp_path / "t"))
    contents = (folder / "tokenizer.json").read_text().replace("<|endoftext|>", "<|unusual|>")
    (folder / "tokenizer.json").write_text(contents)
    with pytest.raises(TokenizerError, match='names no end-of-text token; add "eos_token"'):
        load_tokenizer(BPE[0], str(folder))


def test_sentencepiece_without_eos_is_refused(tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d"] * 9),
        model_writer=model,
        vocab_size=12,
        eos_id=-1,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    (tmp_path / "no_eos.model").write_bytes(model.getvalue())
    with pytest.raises(TokenizerError, match=r"no_eos\.model has no EOS piece"):
        load_tokenizer("SentencePieceTokenizer", str(tmp_path / "no_eos.model"))


def test_a_folder_with_tokenizer_model_will_do(tmp_path: Path) -> None:
    shutil.copy(PIECES[1], tmp_path / "tokenizer.model")
    assert (
        load_tokenizer("SentencePieceTokenizer", str(tmp_path)).fingerprint
        == load_tokenizer(*PIECES).fingerprint
    )


@pytest.mark.parametrize(
    ("kind", "model", "message"),
    [
        (
            "GPT2BPETokenizer",
            "x",
            "'GPT2BPETokenizer' is not known; choose one of SentencePieceTokenizer, Hugging",
        ),
        (
            "SentencePieceTokenizer",
            "{tmp}/gone.model",
            r"cannot read the sentencepiece model .*gone\.model: No such",
        ),
        (
            "SentencePieceTokenizer",
            "{tmp}",
            r"cannot read the sentencepiece model .*tokenizer\.model: No such",
        ),
        ("SentencePieceTokenizer", "{tmp}/garbage", "garbage is not a sentencepiece model"),
        ("SentencePieceTokenizer", "{tmp}/empty", "empty is not a sentencepiece model"),
        ("HuggingFaceTokenizer", "{tmp}/gone", "gone does not exist; HuggingFaceTokenizer takes a folder"),
        ("HuggingFaceTokenizer", "{tmp}/garbage", "garbage is a file; HuggingFaceTokenizer takes a folder"),
        ("HuggingFaceTokenizer", "{tmp}", "cannot load a Hugging Face tokenizer from"),
        ("HuggingFaceTokenizer", "{tmp}/broken", "cannot load a Hugging Face tokenizer from .*broken"),
    ],
)
def test_what_cannot_be_loaded_is_named(tmp_path: Path, kind: str, model: str, message: str) -> None:
    (tmp_path / "garbage").write_bytes(b"\x0a\x05garbage")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{broken")
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(kind, model.format(tmp=tmp_path))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder ../shared is not beside this checkout")
@pytest.mark.parametrize(
    ("kind", "model", "bos", "prefix"),
    [
        ("SentencePieceTokenizer", "priors/stories260K", True, ()),
        ("HuggingFaceTokenizer", "priors/stories260K", True, (1,)),
        ("HuggingFaceTokenizer", "tokenizers/gpt2", False, ()),
        ("HuggingFaceTokenizer", "tokenizers/gpt-neox", False, ()),
        ("SentencePieceTokenizer", "tokenizers/mistral-v1", True, ()),
    ],
)
def test_real_tokenizers(kind: str, model: str, bos: bool, prefix: tuple[int, ...]) -> None:
    tokenizer = load_tokenizer(kind, str(SHARED / model))
    assert (tokenizer.prepends_bos, tokenizer.prefix_ids) == (bos, prefix)
    corpus = (SHARED / "corpora" / "wikitext2" / "valid.txt").read_text()[:50_000]
    for text in [*TEXTS, corpus]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
