"""``tools/preprocess_edit.py`` as users meet it: exit codes, messages, outputs, golden bytes."""

from __future__ import annotations

import json
import re
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
        (
            ["--edit-strategy", "up_revise", "--prior-dtype", "fp8", "--prior-device", "cpu"],
            ["prior: missing", "prior_dtype=fp8: needs a GPU, and prior_device is cpu"],
        ),
        (
            ["--edit-strategy", "filtering", "--prior", "x", "--prior-dtype", "mxfp8", "--prior-backend=hf"],
            ["prior_dtype=mxfp8: is for Megatron checkpoints, and prior_backend is hf"],
        ),
        (["--edit-generations", "3"], ["edit_strategy none edits nothing"]),
        (["--edit-top-p", "0"], ["edit_top_p"]),
        (["--edit-config", "nowhere.yaml"], ["edit_strategy: edit_config=nowhere.yaml takes its place"]),
        (["--output-tokenizer-model", TOKENIZER], ["output_tokenizer_type", "both or none"]),
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


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_a_precision_the_prior_is_not_scored_in(corpus, capsys, tmp_path, flags):
    prior = write_hf_llama(tmp_path / "prior", vocab_size=340)
    argv = arguments(corpus, "--prior", prior, "--prior-dtype", "fp8", *flags, strategy="up_revise")
    assert main(argv) == 1
    assert "prior_dtype=fp8: the Hugging Face prior" in capsys.readouterr().err


def test_dry_run(corpus, capsys, tmp_path):
    assert main([*arguments(corpus), "--dry-run"]) == 0
    assert "2 documents" in capsys.readouterr().out
    assert main([*arguments(corpus), "--dry-run", "--tokenizer-model", "nowhere.model"]) == 1
    assert "problem:" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [corpus]


def test_dry_run_tells_the_cost(corpus, capsys, tmp_path):
    prior = write_hf_llama(tmp_path / "prior", vocab_size=340)
    corpus.write_text('{"text": "the river rises in hills and falls into sea"}\n' * 300)
    flags = (
        "--prior",
        prior,
        "--prior-device",
        "cpu",
        "--edit-threshold",
        "0.003",
        "--workers",
        3,
        "--unit-documents",
        20,
    )
    before = sorted(tmp_path.rglob("*"))
    assert main([*arguments(corpus, *flags, strategy="up_revise"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"tokens +about \d", out)
    assert re.search(r"prior +[\d,]+ parameters, [\d.,]+ MFLOP a token", out)
    assert re.search(r"speed +\d+% of the matrix-product rate", out)
    assert re.search(r"time +\S.* on 1 worker \([\d,]+ tokens/s\), .* on 3, .* on 8; .* worker-hours", out)
    assert re.search(r"to expect +eligible [1-9].* \(of [\d,]+ sampled tokens\)", out)
    assert re.search(r"disk +about \S+ kB, and as much again", out)
    assert sorted(tmp_path.rglob("*")) == before


def test_dry_run_refuses_other_settings_before_it_measures(corpus, capsys):
    assert main(arguments(corpus, "--append-eod")) == 0
    capsys.readouterr()
    assert main([*arguments(corpus), "--dry-run"]) == 1
    captured = capsys.readouterr()
    assert "records another plan" in captured.err
    assert "tokens      about" not in captured.out
    assert "state" not in captured.out
    assert main([*arguments(corpus, "--append-eod"), "--dry-run"]) == 0
    assert "already complete" in capsys.readouterr().out


def test_dry_run_finds_text_that_spells_control_tokens(capsys, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "the river"}\n{"text": "rises <|endoftext|> twice <|endoftext|>"}\n')
    argv = arguments(corpus, "--dry-run", tokenizer=str(ROOT / "tests" / "data" / "tiny_byte_level_bpe"))
    argv[argv.index("SentencePieceTokenizer")] = "HuggingFaceTokenizer"
    assert main(argv) == 0
    assert "spells control tokens (<|endoftext|> 2 times)" in capsys.readouterr().out
    assert main([*argv, "--special-tokens-in-text", "split"]) == 0
    assert "spells" not in capsys.readouterr().out
    assert main([*argv, "--special-tokens-in-text", "error"]) == 1
    assert "corpus.jsonl:2: the text spells the control token" in capsys.readouterr().err


def test_the_estimate_is_what_the_job_then_writes(capsys, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    lines = ['{"text": "the river rises in hills"}\n', '{"text": "falls", "other": "not read at all"}\n']
    corpus.write_text(lines[0] * 100 + lines[1] * 100)
    argv = [*arguments(corpus), "--unit-documents", "20"]
    assert main([*argv, "--dry-run"]) == 0
    found = re.search(r"tokens +about ([\d,]+)", capsys.readouterr().out)
    assert main(argv) == 0
    tokens = json.loads((tmp_path / "out_text_document.stats.json").read_text())["tokens"]
    assert int(found[1].replace(",", "")) == pytest.approx(tokens, rel=0.1)


RULES = "rules:\n  - {action: drop, at_most: 0.0028}\n  - {action: resample, at_least: 0.004}\ntop_k: 3\n"


def test_free_rules_from_a_file(corpus, capsys, tmp_path):
    corpus.write_text('{"text": "the river rises in hills and falls into sea ; nobody counts"}\n' * 20)
    prior = write_hf_llama(tmp_path / "prior", vocab_size=340)
    (tmp_path / "edit.yaml").write_text(RULES)
    argv = arguments(
        corpus, "--prior", prior, "--prior-device", "cpu", "--edit-config", tmp_path / "edit.yaml"
    )
    at = argv.index("--edit-strategy")
    del argv[at : at + 2]
    assert main(argv) == 0
    manifest = json.loads((tmp_path / "out_text_document.manifest.json").read_text())
    assert manifest["edit"]["strategy"] == "rules"
    assert manifest["edit"]["rules"][0] == {"action": "drop", "at_most": 0.0028}
    assert (manifest["edit"]["top_k"], manifest["edit"]["temperature"]) == (3, 1.5)
    assert manifest["counts"]["num_dropped_tokens"] > 0
    assert manifest["counts"]["num_resampled_tokens"] > 0
    capsys.readouterr()
    assert main([*argv, "--edit-threshold", "0.5"]) == 1
    assert "edit_threshold: edit_config" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("rules: [{action: resample, at_leest: 0.9}]", ["at_leest", "at_least"]),
        ("rules: [{action: swap, at_least: 0.9}]", ["swap", "resample"]),
        ("rules: [{action: drop}]", ["no condition"]),
        ("rule: []", ["rule: unknown; did you mean rules?", "rules: missing"]),
        ("rules: 3", ["rules: missing, or not a list"]),
        ("- a", ["expected a mapping"]),
        ("rules: [", ["not valid YAML"]),
        ("rules: []\ntop_k: many", ["edit.yaml", "edit_top_k"]),
    ],
)
def test_broken_rules(corpus, capsys, tmp_path, content, words):
    prior = write_hf_llama(tmp_path / "prior", vocab_size=340)
    (tmp_path / "edit.yaml").write_text(content)
    argv = arguments(
        corpus, "--prior", prior, "--prior-device", "cpu", "--edit-config", tmp_path / "edit.yaml"
    )
    at = argv.index("--edit-strategy")
    del argv[at : at + 2]
    fails(capsys, argv, *words)


def test_every_setting_has_a_flag():
    flags = {option for action in build_parser()._actions for option in action.option_strings}
    names = {*PreprocessConfig.model_fields, "edit_config"} - {"edit_rules"}  # the file holds the rules
    assert {"--" + name.replace("_", "-") for name in names} <= flags


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
