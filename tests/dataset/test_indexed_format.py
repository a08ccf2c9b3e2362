"""The .bin/.idx format: against bytes written by hand, against megatron-core, against stored goldens."""

from __future__ import annotations

import filecmp
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset as MegatronDataset
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_tokedit.corpus import expand_inputs, plan_units, read_unit
from megatron_tokedit.dataset import IndexedDataset, IndexedDatasetWriter, best_dtype, merge_datasets
from megatron_tokedit.errors import DataFormatError
from megatron_tokedit.tokenizers import append_eod, encode_documents, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
SHARED = ROOT.parent / "shared"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the folder ../shared is not beside this checkout"
)

pytestmark = pytest.mark.usefixtures("no_fsync")
DTYPES = {"uint16": st.integers(0, 2**16 - 1), "int32": st.integers(0, 2**31 - 1)}
DOCUMENTS = [[[1, 2, 3]], [], [[4], [5, 6]], [[7]]]
HAND_MADE_BIN = bytes.fromhex("0100 0200 0300 0400 0500 0600 0700")
HAND_MADE_IDX = bytes.fromhex(
    "4d4d49444944580000"  # MMIDIDX, two zeros
    "0100000000000000"  # version 1
    "08"  # uint16
    "0400000000000000"  # four sequences
    "0500000000000000"  # four documents, and one
    "03000000 01000000 02000000 01000000"  # lengths
    "0000000000000000 0600000000000000 0800000000000000 0c00000000000000"  # byte offsets
    "0000000000000000 0100000000000000 0100000000000000 0300000000000000 0400000000000000"  # document ends
)


def joined(lists: list[list]) -> list:
    return [item for items in lists for item in items]


def write(prefix: Path, documents: list[list[list[int]]], dtype: str = "uint16") -> str:
    with IndexedDatasetWriter(str(prefix), dtype) as writer:
        for document in documents:
            writer.add_document([np.array(ids, np.int64) for ids in document])
        summary = writer.finalize()
    assert summary.num_documents == len(documents)
    assert summary.num_sequences == sum(len(ids) > 0 for document in documents for ids in document)
    assert summary.num_tokens == sum(len(ids) for document in documents for ids in document)
    return str(prefix)


def write_with_megatron(prefix: Path, documents: list[list[list[int]]], dtype: str) -> str:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=getattr(np, dtype))
    for document in documents:
        sequences = [ids for ids in document if ids]
        builder.add_document(np.array(joined(sequences)), [len(ids) for ids in sequences])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def documents_of(dataset: IndexedDataset) -> list[list[list[int]]]:
    return [[ids.tolist() for ids in document] for document in dataset.iter_documents()]


def same_files(first: str, second: str) -> bool:
    return all(
        filecmp.cmp(f"{first}.{suffix}", f"{second}.{suffix}", shallow=False) for suffix in ("bin", "idx")
    )


def test_bytes_written_by_hand(tmp_path: Path) -> None:
    write(tmp_path / "a", DOCUMENTS)
    assert (tmp_path / "a.bin").read_bytes() == HAND_MADE_BIN
    assert (tmp_path / "a.idx").read_bytes() == HAND_MADE_IDX
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_bytes_read_by_hand(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(HAND_MADE_BIN)
    (tmp_path / "a.idx").write_bytes(HAND_MADE_IDX)
    dataset = IndexedDataset(str(tmp_path / "a"))
    assert documents_of(dataset) == DOCUMENTS
    assert (len(dataset), dataset.num_sequences, dataset.num_tokens) == (4, 4, 7)
    assert dataset.sequence(2).tolist() == [5, 6]
    assert dataset.document(0)[0].dtype == np.uint16
    with pytest.raises(IndexError, match="no document 4; there are 4"):
        dataset.document(4)
    assert documents_of(pickle.loads(pickle.dumps(dataset))) == DOCUMENTS


def corpora(ids: st.SearchStrategy[int]) -> st.SearchStrategy[list[list[list[int]]]]:
    return st.lists(st.lists(st.lists(ids, max_size=6), max_size=4), max_size=10)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_same_bytes_as_megatron_core_and_each_reads_the_other(
    tmp_path: Path, dtype: str, data: st.DataObject
) -> None:
    documents = data.draw(corpora(DTYPES[dtype]))
    kept = [[ids for ids in document if ids] for document in documents]
    ours = write(tmp_path / "ours", documents, dtype)
    theirs = write_with_megatron(tmp_path / "theirs", documents, dtype)
    assert same_files(ours, theirs)
    assert documents_of(IndexedDataset(theirs)) == kept
    if any(kept):  # megatron-core cannot map an empty .bin
        megatron = MegatronDataset(ours)
        assert [megatron[i].tolist() for i in range(len(megatron))] == joined(kept)
        assert megatron.document_indices.tolist() == IndexedDataset(ours).document_ends.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_merging_parts_gives_the_bytes_of_a_single_pass(
    tmp_path: Path, dtype: str, data: st.DataObject
) -> None:
    parts = data.draw(st.lists(corpora(DTYPES[dtype]), min_size=1, max_size=5))
    prefixes = [write(tmp_path / f"part{i}", part, dtype) for i, part in enumerate(parts)]
    single = write(tmp_path / "single", joined(parts), dtype)
    summary = merge_datasets(prefixes, str(tmp_path / "merged"))
    assert same_files(single, str(tmp_path / "merged"))
    assert summary.num_documents == sum(map(len, parts))
    again = merge_datasets([str(tmp_path / "merged")], str(tmp_path / "again"))
    assert again == summary


def test_merge_crosses_chunk_borders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_tokedit.dataset.merge._CHUNK_ITEMS", 2)
    monkeypatch.setattr("megatron_tokedit.dataset.writer._CHUNK_ITEMS", 3)
    parts = [DOCUMENTS, [], DOCUMENTS * 3, [[]]]
    prefixes = [write(tmp_path / f"part{i}", part) for i, part in enumerate(parts)]
    merge_datasets(prefixes, str(tmp_path / "merged"))
    theirs = write_with_megatron(tmp_path / "theirs", joined(parts), "uint16")
    assert same_files(str(tmp_path / "merged"), theirs)


def test_merge_refuses_what_does_not_fit(tmp_path: Path) -> None:
    first = write(tmp_path / "first", DOCUMENTS)
    wide = write(tmp_path / "wide", DOCUMENTS, "int32")
    cut = write(tmp_path / "cut", DOCUMENTS)
    Path(f"{cut}.bin").write_bytes(HAND_MADE_BIN[:-2])
    for prefixes, output, message in [
        ([first, wide], "out", "wide has int32 ids, .*first has uint16"),
        ([], "out", "no dataset to merge"),
        ([first], "first", "both a part and the output"),
        ([first, str(tmp_path / "gone")], "out", r"gone\.idx: cannot be read"),
        ([first, cut], "out", r"cut\.bin has 6 tokens, but its index says 7"),
    ]:
        with pytest.raises(DataFormatError, match=message):
            merge_datasets(prefixes, str(tmp_path / output))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("size", "dtype"), [(1, "uint16"), (65499, "uint16"), (65500, "int32"), (200_000, "int32")]
)
def test_dtype_is_megatron_s(size: int, dtype: str) -> None:
    assert best_dtype(size) == np.dtype(dtype)


@pytest.mark.parametrize("bad_id", [65536, -1])
def test_ids_beyond_the_dtype_are_refused(tmp_path: Path, bad_id: int) -> None:
    with IndexedDatasetWriter(str(tmp_path / "a"), np.uint16) as writer:
        writer.add_document([np.array([65535])])
        with pytest.raises(
            DataFormatError, match=f"document 1 has token id {bad_id}, which uint16 cannot hold"
        ):
            writer.add_document([np.array([1]), np.array([2, bad_id])])
        writer.add_document([np.array([3])])
        writer.finalize()
    assert documents_of(IndexedDataset(str(tmp_path / "a"))) == [[[65535]], [[3]]]


@pytest.mark.parametrize("ids", [np.array([1.0]), np.array([[1]]), np.array(["a"])])
def test_what_is_no_row_of_ids_is_our_own_bug(tmp_path: Path, ids: np.ndarray) -> None:
    with (
        IndexedDatasetWriter(str(tmp_path / "a"), np.uint16) as writer,
        pytest.raises(ValueError, match="integer"),
    ):
        writer.add_document([ids])
    with pytest.raises(ValueError, match="uint16 or int32"):
        IndexedDatasetWriter(str(tmp_path / "a"), np.int64)


def test_an_error_leaves_nothing_new_and_the_old_as_it_was(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", DOCUMENTS)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.add_document([np.array([9])])  # left without finalize, as an exception leaves it
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]
    assert (tmp_path / "a.idx").read_bytes() == HAND_MADE_IDX


def test_a_dataset_is_replaced_whole(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", [[[1]] * 5] * 5)
    write(tmp_path / "a", DOCUMENTS)
    assert documents_of(IndexedDataset(prefix)) == DOCUMENTS


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataFormatError, match=r"cannot write .*gone/a\.bin: No such file"):
        IndexedDatasetWriter(str(tmp_path / "gone" / "a"), np.uint16)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"", "is truncated"),
        (HAND_MADE_IDX[:20], "fewer than the header"),
        (HAND_MADE_IDX[:-1], "has 121 bytes, but its header says 122"),
        (HAND_MADE_IDX + b"\0", "has 123 bytes"),
        (b"X" + HAND_MADE_IDX[1:], r"is not an \.idx file"),
        (HAND_MADE_IDX[:9] + b"\2" + HAND_MADE_IDX[10:], "of version 1"),
        (HAND_MADE_IDX[:17] + b"\5" + HAND_MADE_IDX[18:], "dtype code 5; token ids are uint16"),
        (HAND_MADE_IDX[:26] + b"\0" + HAND_MADE_IDX[27:], "a document count of 0"),
    ],
)
def test_a_damaged_index_is_refused_when_opened(tmp_path: Path, index: bytes, message: str) -> None:
    (tmp_path / "a.bin").write_bytes(HAND_MADE_BIN)
    (tmp_path / "a.idx").write_bytes(index)
    with pytest.raises(DataFormatError, match=message):
        IndexedDataset(str(tmp_path / "a"))


def test_a_damaged_bin_is_refused_when_opened(tmp_path: Path) -> None:
    (tmp_path / "a.idx").write_bytes(HAND_MADE_IDX)
    with pytest.raises(DataFormatError, match=r"a\.bin: cannot be read: No such file"):
        IndexedDataset(str(tmp_path / "a"))
    (tmp_path / "a.bin").write_bytes(HAND_MADE_BIN[:-1])
    with pytest.raises(DataFormatError, match="no multiple of 2"):
        IndexedDataset(str(tmp_path / "a"))


def tokenize(corpus: Path, tokenizer_type: str, model: Path, prefix: Path, unit_documents: int) -> str:
    """Text to an indexed dataset with eod, through this package's reader, tokenizer and writer."""
    tokenizer = load_tokenizer(tokenizer_type, str(model))
    _, units = plan_units(expand_inputs([str(corpus)]), unit_documents=unit_documents)
    with IndexedDatasetWriter(str(prefix), best_dtype(tokenizer.vocab_size)) as writer:
        for unit in units:
            documents = [
                document.fields["text"] for document in read_unit(unit, ["text"], on_bad=pytest.fail)
            ]
            for sequences in encode_documents(tokenizer, documents):
                writer.add_document(append_eod(sequences, tokenizer.eod))
        writer.finalize()
    return str(prefix)


@pytest.mark.parametrize(
    ("name", "tokenizer_type", "model"),
    [
        ("sentencepiece", "SentencePieceTokenizer", "tiny_sentencepiece.model"),
        ("byte_level_bpe", "HuggingFaceTokenizer", "tiny_byte_level_bpe"),
    ],
)
@pytest.mark.parametrize("unit_documents", [1, 3, 100])
def test_own_golden_files(
    tmp_path: Path, name: str, tokenizer_type: str, model: str, unit_documents: int
) -> None:
    """Against bytes made by tests/data/make_golden.py, in which no code of this package takes part."""
    made = tokenize(
        DATA / "golden_corpus.jsonl", tokenizer_type, DATA / model, tmp_path / "made", unit_documents
    )
    assert same_files(made, str(DATA / f"golden_{name}_text_document"))


@needs_shared
@pytest.mark.parametrize(
    ("name", "model"), [("gpt2", "tokenizers/gpt2"), ("stories260K", "priors/stories260K")]
)
def test_megatron_lm_s_own_golden_files(tmp_path: Path, name: str, model: str) -> None:
    """Against datasets that Megatron-LM's preprocess_data.py wrote, both with its HuggingFaceTokenizer."""
    corpus = SHARED / "golden" / "wikitext_1000.jsonl"
    made = tokenize(corpus, "HuggingFaceTokenizer", SHARED / "data" / model, tmp_path / "made", 64)
    assert same_files(made, str(SHARED / "golden" / f"wikitext_1000_{name}_text_document"))


@needs_shared
def test_sentencepiece_differs_from_hugging_face_as_megatron_lm_does(tmp_path: Path) -> None:
    """SentencePieceTokenizer writes no BOS and takes <unk> for text, HuggingFaceTokenizer does neither."""
    pieces = load_tokenizer("SentencePieceTokenizer", str(SHARED / "data/priors/stories260K"))
    hugging_face = load_tokenizer("HuggingFaceTokenizer", str(SHARED / "data/priors/stories260K"))
    text = "One day , the \u00e9\u00df cat\nsat ."
    assert [1, *pieces.encode(text)] == hugging_face.encode(text)
    assert pieces.encode("<unk>")[-1] != 0
    assert hugging_face.encode("<unk>") == [1, 0]
