"""``tools/preprocess_edit.py`` as users meet it: exit codes, messages, outputs, golden bytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tokedit.cli.preprocess_edit import build_parser, main
from megatron_tokedit.config.preprocess import PreprocessConfig
from megatron_tokedit.testing.models import write_hf_llama

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
TOKENIZER = str(ROOT / "tests" / "data" / "tiny_sentencepiece.model")
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared is not beside the checkout")


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "the river rises"}\n{"text": "in the hills"}\n')
    return path


def arguments(corpus, *flags, tokenizer=TOKENIZER, strategy="none"):
    return [
        *("--input", str(corpus), "--output-prefix", str(Path(corpus).parent / "out")),
        *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", tokenizer),
        *("--edit-strategy", strategy),
        *map(str, flags),
    ]


def fails(capsys, argv, *words):
    """The command exits 1 with one message that holds the words, and leaves nothing that looks whole."""
    assert main(argv) == 1
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert "error: " in captured.err
    for word in words:
        assert word in captured.err, captured.err
    prefix = Path(argv[argv.index("--output-prefix") + 1])
    assert not list(prefix.parent.glob(prefix.name + "_*.idx"))


def test_success_is_0_and_says_what_was_written(corpus, capsys):
    assert main(arguments(corpus, "--append-eod")) == 0
    assert "2 documents" in capsys.readouterr().out
    assert main(arguments(corpus, "--append-eod")) == 0
    assert "already complete" in capsys.readouterr().out
    assert main([*arguments(corpus, "--append-eod"), "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize("flags", [["--no-such-flag"], ["--edit-strategy", "loud"], ["--workers", "two"], []])
def test_wrong_usage_is_2(corpus, capsys, flags):
    argv = [*arguments(corpus), *flags] if flags else ["--input", str(corpus)]
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"text": "fine"}\n{"text": "bro', ["corpus.jsonl:2", "--max-bad-lines"]),
        (b'{"text": "fine"}\n{"title": "x"}\n', ["corpus.jsonl:2", "text", "title"]),
        (b'{"text": 5}\n', ["corpus.jsonl:1"]),
        (b'{"text": ["a", 5]}\n', ["corpus.jsonl:1"]),
        (b'{"text": null}\n', ["corpus.jsonl:1"]),
        (b'{"text": "\xff\xfe"}\n', ["corpus.jsonl:1", "UTF-8"]),
        (b"", ["corpus.jsonl", "no document"]),
        (b"\n\n", ["corpus.jsonl", "no document"]),
        (b'["text"]\n', ["corpus.jsonl:1"]),
    ],
)
def test_bad_content(tmp_path, capsys, content, words):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(content)
    fails(capsys, arguments(path), *words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--input", "nowhere.jsonl"], ["nowhere.jsonl"]),
        (["--input", "no*where.jsonl"], ["no*where.jsonl"]),
        (["--tokenizer-model", "nowhere.model"], ["nowhere.model"]),
        (["--json-keys", "body"], ["corpus.jsonl:1", "body"]),
        (["--json-keys", "a/b"], ["json_keys"]),
        (["--edit-strategy", "up_revise"], ["prior", "missing"]),
        (["--edit-strategy", "up_revise", "--prior", "nowhere"], ["nowhere", "no such folder"]),
        (["--edit-threshold", "1.5"], ["edit_threshold"]),
        (["--edit-sampler", "top_p"], ["edit_sampler=top_p", "not available yet"]),
        (["--edit-generations", "3"], ["not available yet"]),
        (["--special-tokens-in-text", "split"], ["not available yet", "encode"]),
        (["--workers", "0"], ["workers"]),
        (["--rank", "1"], ["--world-size"]),
        (["--stage", "merge"], ["cannot merge"]),
        (["--output-prefix", "/proc/nowhere/out"], ["/proc/nowhere"]),
    ],
)
def test_bad_settings(corpus, capsys, flags, words):
    fails(capsys, [*arguments(corpus), *flags], *words)


def test_all_faults_of_the_settings_are_told_together(corpus, capsys):
    flags = ["--edit-threshold", "2", "--workers", "0", "--edit-top-k", "0"]
    fails(
        capsys,
        [*arguments(corpus), *flags],
        "edit_threshold",
        "workers",
        "edit_top_k",
        "3 settings are wrong",
    )


def test_a_prior_too_small_for_the_tokenizer(corpus, capsys, tmp_path):
    prior = write_hf_llama(tmp_path / "prior", vocab_size=100)
    fails(capsys, arguments(corpus, "--prior", prior, strategy="up_revise"), "340 ids", "vocabulary of 100")


def test_a_context_the_prior_cannot_take(corpus, capsys, tmp_path):
    prior = write_hf_llama(tmp_path / "prior", vocab_size=340)
    flags = ("--prior", prior, "--prior-device", "cpu")
    fails(
        capsys,
        arguments(corpus, *flags, "--prior-context", 4096, strategy="up_revise"),
        "context of 4096 tokens",
    )


def test_dry_run(corpus, capsys, tmp_path):
    assert main([*arguments(corpus), "--dry-run"]) == 0
    assert "2 documents" in capsys.readouterr().out
    assert main([*arguments(corpus), "--dry-run", "--tokenizer-model", "nowhere.model"]) == 1
    assert "problem:" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [corpus]


def test_every_setting_has_a_flag():
    flags = {option for action in build_parser()._actions for option in action.option_strings}
    assert {"--" + name.replace("_", "-") for name in PreprocessConfig.model_fields} <= flags


def test_a_job_without_a_prior_does_not_import_torch(corpus):
    code = (
        "import sys; from megatron_tokedit.cli.preprocess_edit import main; code = main(sys.argv[1:]);"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'imported'; sys.exit(code)"
    )
    subprocess.run([sys.executable, "-c", code, *arguments(corpus)], check=True, capture_output=True)


@needs_shared
@pytest.mark.parametrize(
    ("name", "model"), [("gpt2", "tokenizers/gpt2"), ("stories260K", "priors/stories260K")]
)
def test_golden_files_of_megatron_lm(tmp_path, name, model):
    golden = SHARED / "golden"
    command = [sys.executable, str(ROOT / "tools" / "preprocess_edit.py")]
    command += ["--input", str(golden / "wikitext_1000.jsonl"), "--output-prefix", str(tmp_path / "w")]
    command += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(SHARED / "data" / model)]
    subprocess.run([*command, "--append-eod", "--edit-strategy", "none"], check=True, capture_output=True)
    for suffix in (".bin", ".idx"):
        expected = (golden / f"wikitext_1000_{name}_text_document{suffix}").read_bytes()
        assert (tmp_path / f"w_text_document{suffix}").read_bytes() == expected
