"""``tools/inspect_dataset.py`` as users meet it: what it prints, what it writes, what it refuses."""

from __future__ import annotations

import filecmp
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orjson
import pytest

from megatron_tokedit.cli.inspect_dataset import main
from megatron_tokedit.cli.preprocess_edit import main as preprocess
from megatron_tokedit.dataset import (
    IndexedDatasetWriter,
    InputRecord,
    JournalWriter,
    Manifest,
    TokenizerRecord,
    align,
    best_dtype,
    read_manifest,
    write_manifest,
)
from megatron_tokedit.testing.models import write_hf_llama
from megatron_tokedit.tokenizers import append_eod, encode_documents, load_tokenizer, tokenizer_spec

ROOT = Path(__file__).resolve().parents[2]
SENTENCEPIECE = ("SentencePieceTokenizer", str(ROOT / "tests" / "data" / "tiny_sentencepiece.model"))
BYTE_LEVEL = ("HuggingFaceTokenizer", str(ROOT / "tests" / "data" / "tiny_byte_level_bpe"))
ORIGINAL = [
    ["the river rises in the hills and falls into the sea"],
    [],
    ["nobody counts its stones", "caf\u00e9 \U0001f600 at the sea"],
    ["the same text"],
]
EDITED = [
    ["the river sleeps in the hills and into the sea"],
    [],
    ["nobody counts its old stones", "caf\u00e9 \U0001f600 at the sea"],
    ["the same text"],
]
EDIT = {
    "strategy": "up_revise",
    "rules": [{"action": "resample", "at_least": 0.9}],
    "sampler": "top_k",
    "top_k": 8,
}


def write(
    prefix: Path,
    texts: list[list[str]],
    original: list[list[str]] | None = None,
    *,
    tokenizer: tuple[str, str] = SENTENCEPIECE,
    manifest: bool = True,
    **fields: object,
) -> str:
    """A dataset as preprocessing writes it; with ``original`` an edited one, with a journal."""
    loaded = load_tokenizer(*tokenizer)
    dtype = best_dtype(loaded.vocab_size)
    encoded, before = (
        [append_eod(document, loaded.eod) for document in encode_documents(loaded, documents)]
        for documents in (texts, original or texts)
    )
    with IndexedDatasetWriter(str(prefix), dtype) as writer:
        for document in encoded:
            writer.add_document(document)
        summary = writer.finalize()
    checksums = {"bin": summary.bin_sha256, "idx": summary.idx_sha256}
    if original is not None:
        with JournalWriter(f"{prefix}.edits", dtype) as journal:
            for old, new in zip(before, encoded, strict=True):
                entries = align(*(np.concatenate([np.empty(0, np.int32), *ids]) for ids in (old, new)))
                journal.add_document([len(ids) for ids in old], *entries)
            checksums["edits"] = journal.finalize()
    if manifest:
        record = InputRecord(path=f"{prefix.name}.jsonl", format="jsonl", num_bytes=1, sha256=prefix.name,
                             num_documents=len(texts))  # fmt: skip
        values = {
            "versions": {"numpy": "2"}, "inputs": [record], "json_key": "text", "append_eod": True,
            "tokenizer": TokenizerRecord(**tokenizer_spec(loaded)), "dtype": dtype.name,
            "edit": EDIT if original is not None else None, "counts": summary.counts(),
            "checksums": checksums,
        }  # fmt: skip
        write_manifest(str(prefix), Manifest.model_validate(values | fields))
    return str(prefix)


@pytest.fixture
def original(tmp_path: Path) -> str:
    return write(tmp_path / "original", ORIGINAL)


@pytest.fixture
def edited(tmp_path: Path) -> str:
    return write(tmp_path / "edited", EDITED, ORIGINAL)


Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command; returns stdout, or stderr where it is to fail."""

    def run(*argv: object, code: int = 0) -> str:
        assert main([str(argument) for argument in argv]) == code
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        assert ("error: " in captured.err) == (code == 1)
        return captured.err if code else captured.out

    return run


def same(first: str, second: str, *suffixes: str) -> bool:
    return all(filecmp.cmp(first + suffix, second + suffix, shallow=False) for suffix in suffixes)


# show


def test_show_gives_a_summary(run: Run, edited: str) -> None:
    text = run("show", f"{edited}.bin")
    for part in ("4 in 4 sequences", "uint16", ".edits ", "edited.jsonl; key 'text'", "tiny_sentencepiece",
                 "with end-of-document ids", "up_revise: resample where p >= 0.9", "drawn by top_k: k = 8",
                 "0 to "):  # fmt: skip
        assert part in text
    bars = re.findall(r"^ +(?:[\d,]+-)?[\d,]+ +(\d+)(?:  (#*))?$", text, re.M)
    assert sum(int(count) for count, _ in bars) == 4
    assert max(len(bar) for _, bar in bars) == 40


def test_show_says_when_there_is_no_manifest(run: Run, tmp_path: Path) -> None:
    prefix = write(tmp_path / "bare", ORIGINAL, manifest=False)
    assert "manifest    none" in run("show", prefix)
    ids = run("show", prefix, "--document", 3).splitlines()[1]
    assert re.fullmatch(r"( \d+)+", ids)
    given = ("--tokenizer-type", SENTENCEPIECE[0], "--tokenizer-model", SENTENCEPIECE[1])
    assert "the same text</s>" in run("show", prefix, "--document", 3, *given)
    assert "give both" in run("show", prefix, "--document", 3, *given[:2], code=1)


def test_show_prints_documents(run: Run, edited: str) -> None:
    text = run("show", edited, "--document", 2, -1, 1)
    assert text.splitlines() == [
        text.splitlines()[0],
        "sequence 0",
        "nobody counts its old stones",
        "sequence 1",
        "caf\u00e9 \U0001f600 at the sea</s>",
        "",
        text.splitlines()[6],
        "the same text</s>",
        "",
        "document 1 of 4: 0 tokens in 0 sequences; unedited",
        "",
    ]
    assert re.fullmatch(r"document 2 of 4: \d+ tokens in 2 sequences; .*\d+ inserted", text.splitlines()[0])
    for index in (4, -5):
        assert f"no document {index}; there are 4, numbered 0 to 3" in run(
            "show", edited, "--document", index, code=1
        )


def test_show_highlights_what_was_edited_in_colour_only(run: Run, edited: str) -> None:
    text = run("show", edited, "--document", 0, "--color", "always")
    lit = "".join(re.findall(r"\x1b\[32m(.*?)\x1b\[0m", text))
    assert lit
    assert set(lit.replace(" ", "")) <= set("sleeps")
    assert "\x1b" not in run("show", edited, "--document", 0)


def test_show_lists_tokens(run: Run, edited: str) -> None:
    lines = run("show", edited, "--document", 0, "--tokens").splitlines()[1:-1]
    rows = [re.fullmatch(r"([* ]) +(\d+) +(\d+)  '(.*)'", line) for line in lines]
    assert all(rows)
    assert [int(row[2]) for row in rows] == list(range(len(rows)))
    assert "".join(row[4] for row in rows) == EDITED[0][0] + "</s>"
    assert "*" in {row[1] for row in rows}


def test_show_of_a_tokenizer_that_has_moved_shows_ids(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = write(tmp_path / "a", ORIGINAL)
    manifest = read_manifest(prefix)
    moved = manifest.tokenizer.model_copy(update={"model": str(tmp_path / "gone.model")})
    write_manifest(prefix, manifest.model_copy(update={"tokenizer": moved}))
    assert main(["show", prefix, "--document", "3"]) == 0
    captured = capsys.readouterr()
    assert "showing ids" in captured.err
    assert re.fullmatch(r"( \d+)+", captured.out.splitlines()[1])
    assert "the same text" in run("show", prefix, "--document", 3, "--tokenizer-model", SENTENCEPIECE[1])


# verify


def test_verify(run: Run, original: str, edited: str) -> None:
    text = run("verify", original, edited)
    assert text.count("whole. 4 documents, 4 sequences") == 2
    assert text.count("checksums agree") == 2
    assert run("verify", original, "--quiet") == ""
    assert "the vocabulary has 5" in run("verify", original, "--vocab-size", 5, code=1)


def test_verify_lists_every_fault_of_every_dataset(
    run: Run, original: str, edited: str, tmp_path: Path
) -> None:
    for prefix in (original, edited):
        data = Path(f"{prefix}.bin").read_bytes()
        Path(f"{prefix}.bin").write_bytes(data[:-4])
    text = run("verify", edited, tmp_path / "gone", original, code=1)
    for part in (
        f"dataset {edited} is not whole",
        f"dataset {original} is not whole",
        "gone.idx: cannot be read",
    ):
        assert part in text
    assert text.count(".bin: SHA-256") == 2
    assert text.count("the index says") == 2


# diff


def test_diff_of_an_edited_dataset_shows_the_way_back(run: Run, edited: str) -> None:
    text = run("diff", edited, "--document", 0, 2, 3)
    first, second, third = (block.split("\n", 1) for block in text.split("\n\n")[:3])
    for block, old, new in (
        (first, ORIGINAL[0], EDITED[0]), (second, ORIGINAL[2], EDITED[2]), (third, ORIGINAL[3], EDITED[3])
    ):  # fmt: skip
        removed = re.sub(r"\{\+.*?\+\}", "", block[1]).replace("[-", "").replace("-]", "")
        added = re.sub(r"\[-.*?-\]", "", block[1]).replace("{+", "").replace("+}", "")
        assert removed == " ".join(old) + "</s>"
        assert added == " ".join(new) + "</s>"
    assert "no difference" in third[0]
    assert "[-" not in third[1]
    assert text.splitlines()[-1].startswith("2 of 3 documents differ; ")


def test_diff_of_two_datasets_finds_the_same(run: Run, original: str, edited: str) -> None:
    alone, pair = run("diff", edited), run("diff", original, edited)
    assert alone == pair
    assert "document 0 of 4" in pair
    assert "document 2 of 4" in pair
    assert "document 3 of 4" not in pair
    assert re.search(r"2 of 4 documents differ; \d+ -> \d+ tokens; \d+ tokens changed", pair)
    assert run("diff", original, original).startswith("0 of 4 documents differ; ")


def test_diff_stops_at_the_limit(run: Run, original: str, edited: str) -> None:
    alone, pair = run("diff", edited, "--limit", 1), run("diff", original, edited, "--limit", 1)
    for text in (alone, pair):
        assert "document 2 of 4" not in text
        assert "stopped after 1 that differ; --limit 0 shows all" in text
    assert "2 of 4 documents differ" in alone
    assert "1 of the first 1 documents differ" in pair
    assert "stopped" not in run("diff", original, edited, "--limit", 0)


def test_diff_shortens_what_is_far_from_a_change(run: Run, edited: str) -> None:
    text = run("diff", edited, "--context", 1)
    assert text.splitlines()[1] == "the river[- rises-]{+ sleeps+} in ... and[- falls-] into ..."
    assert text.splitlines()[4].startswith("... its")
    assert "..." not in run("diff", edited, "--document", 0)


def test_diff_in_colour(run: Run, edited: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = run("diff", edited, "--color", "always", "--document", 0)
    assert "\x1b[31;9m" in text
    assert "\x1b[32m" in text
    assert "[-" not in text.replace("\x1b[", "")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert "\x1b[32m" in run("diff", edited)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in run("diff", edited)
    assert "\x1b[32m" in run("diff", edited, "--color", "always")


def test_diff_side_by_side(run: Run, edited: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "50")
    text = run("diff", edited, "--document", 0, "--side-by-side", "--color", "always")
    lines = [line.split(" | ") for line in re.sub(r"\x1b\[[\d;]*m", "", text).splitlines()[1:-2]]
    assert all(len(left) <= 23 and len(right) <= 23 for left, right in lines)
    for side, expected in ((0, ORIGINAL[0][0]), (1, EDITED[0][0])):
        shown = "".join(line[side] for line in lines).replace(" ", "")
        assert shown == expected.replace(" ", "") + "</s>"


def test_diff_of_different_tokenizers_compares_words(run: Run, original: str, tmp_path: Path) -> None:
    other = write(tmp_path / "other", EDITED, tokenizer=BYTE_LEVEL)
    text = run("diff", original, other)
    assert "the river[- rises-]{+ sleeps+} in the hills and[- falls-] into the sea" in text
    assert "nobody counts its{+ old+} stones" in text
    assert "2 of 4 documents differ; 24 words; 1 word changed, 1 dropped, 1 inserted" in text


def test_diff_makes_spaces_line_ends_and_equal_texts_visible(run: Run, tmp_path: Path) -> None:
    old = [["two lines\nhere"], ["a\tb"], ["plain"], ["x\x1b[31my"]]
    new = [["two lines here"], ["a b"], ["plain "], ["x\x1b[31mz"]]
    prefixes = [
        write(tmp_path / name, texts, tokenizer=BYTE_LEVEL) for name, texts in (("o", old), ("n", new))
    ]
    text = run("diff", *prefixes)
    assert "two lines[-\\n-]{+\u00b7+}here" in text
    assert "a[-\\tb-]{+ b+}" in text
    assert "plain{+\u00b7+}" in text
    assert "x\\x1b[31m[-y-]{+z+}" in text


def test_what_cannot_be_compared(run: Run, original: str, edited: str, tmp_path: Path) -> None:
    shorter = write(tmp_path / "shorter", ORIGINAL[:2])
    assert "original has 4 documents, " in run("diff", original, shorter, code=1)
    assert "original.edits: cannot be read" in run("diff", original, code=1)
    assert "diff takes two datasets" in run("diff", original, edited, shorter, code=1)
    assert "no document 9" in run("diff", edited, "--document", 9, code=1)
    Path(f"{edited}.edits").write_bytes(
        Path(f"{write(tmp_path / 'x', EDITED[:1], ORIGINAL[:1])}.edits").read_bytes()
    )
    assert "do not belong together" in run("diff", edited, code=1)
    assert "is for 1 documents" in run("show", edited, "--document", 0, code=1)


# undo


def test_undo(run: Run, original: str, edited: str, tmp_path: Path) -> None:
    output = str(tmp_path / "undone")
    assert "4 documents" in run("undo", edited, "--output-prefix", output)
    assert same(output, original, ".bin", ".idx")
    manifest, expected = read_manifest(output), read_manifest(original)
    assert manifest == expected.model_copy(update={"inputs": manifest.inputs})
    run("verify", output)
    assert "nothing is overwritten" in run("undo", edited, "--output-prefix", output, code=1)
    assert "original.edits: is not there" in run("undo", original, "--output-prefix", f"{output}2", code=1)
    assert not list(tmp_path.glob("undone2*"))


def test_undo_tells_of_documents_that_are_in_no_journal(run: Run, tmp_path: Path) -> None:
    counts = {"num_documents": 4, "num_documents_in": 7, "num_documents_dropped": 3, "num_changed_tokens": 5}
    edited = write(tmp_path / "edited", EDITED, ORIGINAL, counts=counts)
    text = run("undo", edited, "--output-prefix", tmp_path / "undone")
    assert "without the 3 documents that the job dropped whole" in text
    manifest = read_manifest(str(tmp_path / "undone"))
    assert (manifest.edit, manifest.counts["num_documents_dropped"]) == (None, 3)
    assert "num_changed_tokens" not in manifest.counts


# merge


def test_merging_gives_what_a_single_pass_gives(run: Run, tmp_path: Path) -> None:
    first = write(tmp_path / "first", EDITED[:1], ORIGINAL[:1])
    second = write(tmp_path / "second", EDITED[1:], ORIGINAL[1:])
    inputs = [*read_manifest(first).inputs, *read_manifest(second).inputs]
    single = write(tmp_path / "single", EDITED, ORIGINAL, inputs=inputs)
    output = str(tmp_path / "merged")
    assert "2 parts, 4 documents" in run("merge", output, first, f"{second}.idx")
    assert same(output, single, ".bin", ".idx", ".edits", ".manifest.json")
    assert "nothing is overwritten" in run("merge", output, first, second, code=1)
    run("verify", output)


def test_merging_real_jobs_gives_the_single_job_with_its_statistics(run: Run, tmp_path: Path) -> None:
    prior = write_hf_llama(tmp_path / "prior", vocab_size=340)
    for name in ("first", "second"):
        lines = [{"text": f"{name} the river rises {number} stones"} for number in range(6)]
        (tmp_path / f"{name}.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    for output, names in (("a", ["first"]), ("b", ["second"]), ("single", ["first", "second"])):
        argv = ["--input", *(str(tmp_path / f"{name}.jsonl") for name in names), "--append-eod", "--quiet"]
        argv += ["--output-prefix", str(tmp_path / output), "--workers", "1", "--unit-documents", "6"]
        argv += ["--tokenizer-type", SENTENCEPIECE[0], "--tokenizer-model", SENTENCEPIECE[1]]
        argv += ["--prior", str(prior), "--prior-device", "cpu", "--edit-threshold", "0.003"]
        assert preprocess(argv) == 0
    parts = [str(tmp_path / f"{name}_text_document") for name in ("a", "b")]
    single, output = str(tmp_path / "single_text_document"), str(tmp_path / "merged")
    run("merge", output, *parts)
    assert same(output, single, ".bin", ".idx", ".edits", ".manifest.json")
    run("verify", output, single)
    found, expected = (orjson.loads(Path(f"{prefix}.stats.json").read_bytes()) for prefix in (output, single))
    assert found["edit"]["changed"] > 0
    assert found == {name: expected[name] for name in found}
    assert {"documents", "bytes", "tokens", "edit"} <= set(found)
    assert "tokens_per_worker_second" not in found
    Path(f"{parts[0]}.stats.json").write_bytes(b'{"tokens": 3}')
    assert "stats.json" in run("merge", f"{output}2", *parts, code=1)


def test_parts_that_do_not_fit_are_refused_with_the_difference(run: Run, edited: str, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    for name, fields, words in (
        ("key", {"json_key": "body"}, ["json_key: text and body"]),
        ("eod", {"append_eod": False}, ["append_eod: True and False"]),
        (
            "k",
            {"edit": EDIT | {"top_k": 64}},
            ["edited differently", "edit.top_k: 8 and 64", "--allow-different"],
        ),
        ("seed", {"seed": 5}, ["seed: nothing and 5"]),
        ("none", {"edit": None}, ["edit: some and none"]),
    ):
        other = write(tmp_path / name, EDITED, ORIGINAL, **fields)
        error = run("merge", output, edited, other, code=1)
        for word in [f"{edited} and {other}", *words]:
            assert word in error
    other = write(tmp_path / "other", ORIGINAL, tokenizer=BYTE_LEVEL)
    assert "tokenizer.fingerprint" in run("merge", output, edited, other, code=1)
    data = Path(f"{edited}.bin").read_bytes()
    Path(f"{edited}.bin").write_bytes(bytes([data[0] ^ 1]) + data[1:])
    assert "SHA-256" in run("merge", output, edited, edited, code=1)
    assert not list(tmp_path.glob("merged*"))


def test_different_edits_are_recorded_part_by_part(
    run: Run, original: str, edited: str, tmp_path: Path
) -> None:
    third = write(tmp_path / "third", EDITED, ORIGINAL, edit=EDIT | {"top_k": 64}, seed=7)
    allow = "--allow-different-edits"
    run("merge", tmp_path / "two", original, edited, allow)
    run("merge", tmp_path / "all", tmp_path / "two", third, allow)
    manifest = read_manifest(str(tmp_path / "all"))
    parts = manifest.edit["parts"]
    assert [part["num_documents"] for part in parts] == [4, 4, 4]
    assert [part["edit"] for part in parts] == [None, EDIT, EDIT | {"top_k": 64}]
    assert [part["seed"] for part in parts] == [None, None, 7]
    assert manifest.seed is None
    assert "4 documents: none" in run("show", tmp_path / "all")
    run("verify", tmp_path / "all")
    run("undo", tmp_path / "all", "--output-prefix", tmp_path / "undone")
    run("merge", tmp_path / "thrice", original, original, original)
    assert same(str(tmp_path / "undone"), str(tmp_path / "thrice"), ".bin", ".idx")


def test_parts_without_a_manifest_make_one_without(
    run: Run, edited: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = write(tmp_path / "bare", ORIGINAL, manifest=False)
    assert main(["merge", str(tmp_path / "merged"), edited, bare]) == 0
    assert "merged gets no manifest; without one: " in capsys.readouterr().err
    assert read_manifest(str(tmp_path / "merged")) is None
    run("undo", tmp_path / "merged", "--output-prefix", tmp_path / "undone")
    run("merge", tmp_path / "twice", bare, bare)
    assert same(str(tmp_path / "undone"), str(tmp_path / "twice"), ".bin", ".idx")
    assert not (tmp_path / "twice.edits").exists()


# the command


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["look"], ["show"], ["diff"], ["undo", "a"], ["diff", "a", "--limit", "-1"]):
        with pytest.raises(SystemExit) as exit_:
            main(argv)
        assert exit_.value.code == 2
    for command in ("show", "verify", "diff", "undo", "merge"):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([command, "--help"])
        assert exit_.value.code == 0
        assert len(capsys.readouterr().out.splitlines()) < 40


def test_text_that_the_terminal_cannot_show_does_not_stop_it(edited: str) -> None:
    command = [sys.executable, str(ROOT / "tools" / "inspect_dataset.py"), "show", edited, "--document", "2"]
    result = subprocess.run(
        command, env={"PYTHONIOENCODING": "ascii", "PATH": ""}, capture_output=True, check=True, cwd=ROOT
    )
    assert b"caf? ? at the sea" in result.stdout
