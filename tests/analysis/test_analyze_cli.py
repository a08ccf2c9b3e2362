"""``tools/analyze_corpus.py`` from files to report: workers, cache, pairs, selection, bad input, the page."""

from __future__ import annotations

import html.parser
import itertools
import json
import random
import re
import shutil
import subprocess
from pathlib import Path

import orjson
import pytest

from megatron_tokedit.cli.analyze_corpus import main
from megatron_tokedit.cli.preprocess_edit import main as preprocess
from megatron_tokedit.dataset import IndexedDataset, read_manifest, verify_dataset
from megatron_tokedit.testing.models import write_hf_llama
from megatron_tokedit.tokenizers import load_tokenizer

DATA = Path(__file__).resolve().parents[1] / "data"
SENTENCEPIECE = DATA / "tiny_sentencepiece.model"
BYTE_LEVEL = DATA / "tiny_byte_level_bpe"
TOKENIZER = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(SENTENCEPIECE)]


def sentences(seed: int, count: int, num_words: int) -> list[str]:
    generator = random.Random(seed)
    words = [f"{a}{b}" for a in ("ka", "lo", "mi", "ne", "pu") for b in ("ra", "st", "t", "x<b>", "")][
        :num_words
    ]
    texts = [generator.choices(words, k=generator.randint(20, 60)) for _ in range(count)]
    if num_words > 4:  # something that is said once only
        texts = [[*text, str(generator.randrange(10**9))] for text in texts]
    return [" ".join(text) for text in texts]


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(texts)))
    return path


class Files:
    """A varied corpus, a repetitive one, an edited dataset and a prior."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.human = write_lines(folder / "human.jsonl", sentences(0, 120, 25))
        self.robot = write_lines(folder / "robot.jsonl", sentences(1, 12, 4) * 10)
        vocab_size = load_tokenizer("SentencePieceTokenizer", str(SENTENCEPIECE)).vocab_size
        self.prior = write_hf_llama(folder / "prior", vocab_size=vocab_size)
        shutil.copy(SENTENCEPIECE, self.prior / "tokenizer.model")
        self.prefix = str(folder / "edited")
        command = ["--input", str(self.human), "--output-prefix", self.prefix, *TOKENIZER, "--append-eod"]
        edit = ["--prior", str(self.prior), "--edit-threshold", "0.005", "--edit-exclude-original"]
        assert preprocess([*command, *edit, "--workers", "1", "--quiet"]) == 0
        self.dataset = f"{self.prefix}_text_document"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("corpora"))


def analyze(folder: Path, *arguments: str) -> dict[str, object]:
    assert main([*arguments, "--output-dir", str(folder), "--quiet"]) == 0
    return orjson.loads((folder / "analysis.json").read_bytes())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def full(files: Files, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], dict[str, object]]:
    """Everything at once, with one process."""
    folder = tmp_path_factory.mktemp("full")
    arguments = ["--input", f"human={files.human}", f"robot & co={files.robot}", f"edited={files.dataset}"]
    arguments += [
        "--prior",
        str(files.prior),
        *TOKENIZER,
        "--prior-documents",
        "40",
        "--token-budget",
        "3000",
    ]
    return folder, arguments, analyze(folder, *arguments, "--workers", "1")


def test_two_workers_write_the_same(full: tuple[Path, list[str], dict[str, object]], tmp_path: Path) -> None:
    folder, arguments, found = full
    again = analyze(tmp_path, *arguments, "--workers", "2")
    assert again == found
    assert (tmp_path / "report.html").read_bytes() == (folder / "report.html").read_bytes()


def test_a_second_run_counts_nothing_again(
    full: tuple[Path, list[str], dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, arguments, found = full
    before = (folder / "analysis.json").read_bytes()

    def refuse(*_: object) -> None:
        raise AssertionError("counted again")

    for method in ("count", "tally", "score"):
        monkeypatch.setattr(f"megatron_tokedit.analysis.worker.PartWorker.{method}", refuse)
    assert analyze(folder, *arguments, "--workers", "1") == found
    assert (folder / "analysis.json").read_bytes() == before
    with pytest.raises(AssertionError, match="counted again"):
        main([*arguments, "--output-dir", str(folder), "--quiet", "--workers", "1", "--seed", "5"])


def test_what_the_report_finds(full: tuple[Path, list[str], dict[str, object]]) -> None:
    _, _, found = full
    corpora = {corpus["name"]: corpus for corpus in found["corpora"]}  # type: ignore[index,attr-defined]
    assert list(corpora) == ["human", "robot & co", "edited (original)", "edited"]
    human, robot, original = corpora["human"], corpora["robot & co"], corpora["edited (original)"]
    for key in ("num_tokens_counted", "at_budget", "whole", "top_bigrams", "perplexity"):
        assert original[key] == human[key], key  # rebuilt from the journal, the eod left out: the same text
    verdicts = {v["corpus"]: v for v in found["findings"]["verdicts"]}  # type: ignore[index]
    assert "repetitive" in {sign["sign"] for sign in verdicts["robot & co"]["signs"]}
    assert verdicts["edited (original)"]["verdict"] == "no sign of collapse"
    assert robot["whole"]["repeated"]["8"]["share"] > 0.99  # every document is there ten times
    (pair,) = found["pairs"]  # type: ignore[misc]
    assert (pair["edited"], pair["original"]) == ("edited", "edited (original)")
    assert pair["journal"]["changed"] > 0
    assert 0.0 <= pair["survival_of_hapaxes"]["3"]["share"] < 1.0


def test_top_bigrams_are_those_of_the_text(
    files: Files, full: tuple[Path, list[str], dict[str, object]]
) -> None:
    tokenizer = load_tokenizer("SentencePieceTokenizer", str(SENTENCEPIECE))
    counts: dict[tuple[int, int], int] = {}
    for line in files.human.read_text().splitlines():
        ids = tokenizer.encode(json.loads(line)["text"])
        for pair in itertools.pairwise(ids):
            counts[pair] = counts.get(pair, 0) + 1
    top = full[2]["corpora"][0]["top_bigrams"]  # type: ignore[index]
    assert top["is_complete"]
    expected = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:40]
    assert [(tuple(b["ids"]), b["count"]) for b in top["bigrams"]] == expected
    assert top["bigrams"][0]["text"] == tokenizer.decode(list(expected[0][0]))


class Page(html.parser.HTMLParser):
    """Checks nesting, and collects what the page would ask for."""

    VOID = frozenset({"meta", "img", "br", "hr", "link", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.asks: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.asks += [
            value or "" for name, value in attributes if name in ("src", "href", "srcset", "action")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_self_contained(full: tuple[Path, list[str], dict[str, object]]) -> None:
    text = (full[0] / "report.html").read_text()
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    assert page.asks
    assert all(address.startswith("data:image/png;base64,") for address in page.asks)
    assert not {"script", "link", "iframe", "object"} & set(page.seen)
    assert not re.search(r"https?://|@import|url\(", text)
    assert "robot &amp; co" in text
    assert "x<b>" not in text  # the corpus's own markup is escaped
    assert "x&lt;b" in text or "&lt;b" in text
    for name in ("rank_mass", "diversity", "divergence", "perplexity", "token_probability", "survival"):
        assert (full[0] / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert page.seen.count("img") == 6


def test_the_page_opens_in_a_browser(full: tuple[Path, list[str], dict[str, object]], tmp_path: Path) -> None:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no Chromium on PATH")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    command += [f"--user-data-dir={tmp_path}", "--dump-dom", (full[0] / "report.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    assert "Corpus analysis" in done.stdout


def test_selection_of_raw_text(files: Files, tmp_path: Path) -> None:
    mixture = write_lines(tmp_path / "mixture.jsonl", sentences(5, 30, 25) + sentences(6, 30, 4))
    arguments = ["--input", f"robot={files.robot}", f"mixture={mixture}", *TOKENIZER, "--workers", "1"]
    arguments += ["--select", "mixture=robot", "--select-documents", "20"]
    found = analyze(tmp_path / "out", *arguments)["selection"]
    lines = [
        json.loads(line) for line in (tmp_path / "out" / "selected_mixture.jsonl").read_text().splitlines()
    ]
    assert found["num_documents_selected"] == len(lines) == 20  # type: ignore[index]
    texts = [json.loads(line)["text"] for line in mixture.read_text().splitlines()]
    places = [line["selected_from"]["line"] for line in lines]
    assert places == sorted(places)
    assert [line["text"] for line in lines] == [texts[place - 1] for place in places]
    assert sum(place > 30 for place in places) >= 18  # like the target; the others are not
    assert main([*arguments, "--output-dir", str(tmp_path / "out"), "--quiet"]) == 1  # overwrites nothing


def test_selection_of_a_dataset_keeps_manifest_and_journal(files: Files, tmp_path: Path) -> None:
    arguments = ["--input", f"human={files.human}", f"edited={files.dataset}", "--workers", "1"]
    output = tmp_path / "chosen"
    arguments += ["--select", "edited=human", "--select-share", "0.25", "--select-output", str(output)]
    analyze(tmp_path / "out", *arguments)
    report = verify_dataset(str(output))  # checksums, counts and journal
    assert (report.num_documents, report.checksums_verified) == (30, True)
    manifest = read_manifest(str(output))
    assert manifest is not None
    assert manifest.counts["num_documents_selected_from"] == 120
    whole = {
        b"".join(s.tobytes() for s in document) for document in IndexedDataset(files.dataset).iter_documents()
    }
    for document in IndexedDataset(str(output)).iter_documents():
        assert b"".join(s.tobytes() for s in document) in whole


def test_samples_and_a_prior_of_another_tokenizer(files: Files, tmp_path: Path) -> None:
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(BYTE_LEVEL)]
    arguments = ["--input", f"a={files.human}", f"b={files.robot}", *tokenizer, "--workers", "1"]
    found = analyze(tmp_path, *arguments, "--sample-documents", "30", "--prior", str(files.prior))
    own = load_tokenizer("SentencePieceTokenizer", str(SENTENCEPIECE))
    for corpus in found["corpora"]:  # type: ignore[attr-defined]
        assert corpus["num_documents_counted"] == 30
        assert corpus["num_documents"] == 120
        assert corpus["perplexity"]["num_documents_scored"] == 30
        texts = [json.loads(line)["text"] for line in Path(corpus["paths"][0]).read_text().splitlines()]
        longest = sum(sorted(len(own.encode(text)) for text in texts)[-30:])
        assert 0 < corpus["perplexity"]["num_tokens_scored"] <= longest
    assert "30 of 120, drawn at random" in (tmp_path / "report.html").read_text()


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main([*arguments, "--quiet"]) == 1
    return capsys.readouterr().err


def test_refusals(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    human, out = f"human={files.human}", ["--output-dir", str(tmp_path / "out"), "--workers", "1"]
    assert "expected NAME=FILE_OR_PREFIX" in refused(capsys, "--input", str(files.human), *TOKENIZER, *out)
    assert "does not exist" in refused(capsys, "--input", "x=/nowhere.jsonl", *TOKENIZER, *out)
    assert "in whose tokens" in refused(capsys, "--input", human, *out)
    assert "there are human" in refused(capsys, "--input", human, "--pair", "human=no", *TOKENIZER, *out)
    message = refused(capsys, "--input", human, "--json-key", "story", *TOKENIZER, *out)
    assert "120 lines are no document" in message
    assert "human.jsonl:1: key 'story' is missing" in message
    other = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(BYTE_LEVEL)]
    assert "does not fit" in refused(capsys, "--input", f"e={files.dataset}", *other, *out)
    twice = ["--input", f"e={files.dataset}", f"e={files.human}"]
    assert "is an indexed dataset" in refused(capsys, *twice, *out)
    assert "no effect without --select" in refused(
        capsys, "--input", human, "--select-share", "0.5", *TOKENIZER, *out
    )
    chosen = ["--input", f"e={files.dataset}", human, "--select", "e (original)=human"]
    assert "inspect_dataset.py undo" in refused(capsys, *chosen, *out)
    with pytest.raises(SystemExit) as stopped:
        main(["--input", human, "--sample-share", "1.5", *TOKENIZER, *out])
    assert stopped.value.code == 2


def test_bad_lines_that_are_allowed_keep_the_others_in_place(files: Files, tmp_path: Path) -> None:
    lines = files.human.read_text().splitlines()
    broken = tmp_path / "broken.jsonl"
    broken.write_text("\n".join(["{", *lines[:50], "[]", *lines[50:]]) + "\n")
    arguments = [*TOKENIZER, "--workers", "1", "--max-bad-lines", "2", "--token-budget", "500"]
    found = analyze(tmp_path / "a", "--input", f"a={broken}", f"b={files.human}", *arguments)
    first, second = found["corpora"]  # type: ignore[misc]
    assert (first["num_bad_lines"], first["num_documents_counted"]) == (2, 120)
    assert first["whole"] == second["whole"]
    assert first["top_bigrams"] == second["top_bigrams"]
