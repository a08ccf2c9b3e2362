"""``tools/generate.py`` on tiny checkpoints: prompts from everywhere, texts and JSON lines, faults."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_tokedit.cli.generate import _parser, _settings, main
from megatron_tokedit.generation import GenerationSettings, load_text_model
from megatron_tokedit.testing.models import tiny_llama, write_hf_llama

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests" / "generation"))
TOKENIZER = ROOT / "tests" / "data" / "tiny_sentencepiece.model"


def save(folder: str) -> None:
    import generation_cases

    model = tiny_llama(init_method_std=0.3)
    generation_cases.save_checkpoint(folder, model, "sentencepiece")


@pytest.fixture(scope="module")
def run_folder(ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    ranks.run(save, str(folder), world_size=1)
    return folder


def lines(*arguments: str) -> list[dict]:
    """The records that a command writes to a file."""
    output = Path(arguments[arguments.index("--output") + 1])
    assert main(["--quiet", "--max-new-tokens", "12", "--overwrite", *arguments]) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_json_lines(run_folder: Path, tmp_path: Path) -> None:
    output = ["--output", str(tmp_path / "new folder" / "out.jsonl")]
    arguments = ["--checkpoint", str(run_folder), "--prompt", "The river", "", "hills", "--num-samples", "3"]
    records = lines(*arguments, "--logprobs", *output)
    assert [(r["prompt_index"], r["sample"]) for r in records] == [(i, j) for i in range(3) for j in range(3)]
    for record in records:
        assert record["text"] == record["prompt"] + record["completion"]
        assert (
            record["num_new_tokens"] == len(record["ids"]) == len(record["logprobs"]) == len(record["tokens"])
        )
        assert max(record["logprobs"]) <= 0.0
        assert record["finish"] in ("eod", "length")
    assert len({record["completion"] for record in records[:3]}) == 3
    assert [record["num_prompt_tokens"] for record in records[3:6]] == [1, 1, 1]
    step = next((run_folder / "checkpoints").glob("step_*"))
    again = lines("--checkpoint", str(step), *arguments[2:], "--batch-size", "1", *output)
    shared = again[0].keys()
    assert again == [{key: record[key] for key in shared} for record in records]
    rest = lines(*arguments, "--first-sample", "2", *output)
    assert rest[0] == again[2]


def test_prompts_from_files_and_standard_input(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.txt").write_bytes("The river\n\ncaf\u00e9\r\n".encode())
    (tmp_path / "p.jsonl").write_text('{"q": "The river"}\n{"q": ""}\n{"q": "caf\\u00e9"}\n')
    common = ["--checkpoint", str(run_folder), "--output", str(tmp_path / "out.jsonl")]
    given = lines(*common, "--prompt", "The river", "", "caf\u00e9")
    assert lines(*common, "--prompt-file", str(tmp_path / "p.txt")) == given
    assert lines(*common, "--prompt-file", str(tmp_path / "p.jsonl"), "--json-key", "q") == given
    monkeypatch.setattr(sys, "stdin", io.StringIO("The river\n"))
    assert lines(*common) == given[:1]
    bare = lines(*common, "--prompt", "The river", "--no-document-start")
    assert bare[0]["num_prompt_tokens"] == given[0]["num_prompt_tokens"] - 1


def test_text_on_standard_output(
    run_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    common = ["--checkpoint", str(run_folder), "--max-new-tokens", "12"]
    assert main([*common, "--prompt", "The river", "--temperature", "0"]) == 0
    shown = capsys.readouterr()
    (record,) = lines(
        "--checkpoint", str(run_folder), "--prompt", "The river", "--temperature", "0",
        "--output", str(tmp_path / "o.jsonl"),
    )  # fmt: skip
    capsys.readouterr()
    assert shown.out == record["text"] + "\n"
    assert "1 texts, 12 new tokens" in shown.err or record["finish"] == "eod"
    assert main([*common, "--quiet", "--prompt", "a", "b", "--num-samples", "2", "--logprobs"]) == 0
    text = capsys.readouterr().out
    heads = [line for line in text.splitlines() if line.startswith("===")]
    assert heads == [f"=== prompt {i}, sample {j} ===" for i in range(2) for j in range(2)]
    assert main([*common, "--quiet", "--prompt", "a", "--output", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "a"


def test_conversation(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "The river\nThe river\n:set temperature 0\n:set top_k none\n:show\nThe river\nThe\\nriver\n"
    monkeypatch.setattr(
        sys, "stdin", io.StringIO(said + ":set top_p 7\n:set seed x\n:nonsense\n:quit\nnever\n")
    )
    assert main(["--quiet", "--checkpoint", str(run_folder), "--interactive", "--max-new-tokens", "8"]) == 0
    shown = capsys.readouterr()
    starts = [line for line in shown.out.split("The") if line]
    assert len(starts) >= 4
    assert len(set(starts[:3])) == 3  # a repeated prompt gets another sample
    assert "The\nriver" in shown.out
    assert "never" not in shown.out
    assert "temperature 0.0  top_k None" in shown.err
    assert "top_p: 7.0, expected a share" in shown.err
    assert "seed: 'x' is not a number" in shown.err
    assert shown.err.count(":quit") == 2  # the greeting, and the answer to nonsense


def test_a_terminal_sees_the_text_grow(run_folder: Path) -> None:
    """A real terminal: dim prompt, streamed text, the reason of the end; then a prompt is asked for."""
    master, slave = pty.openpty()
    arguments = ["--checkpoint", str(run_folder), "--max-new-tokens", "12", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "tools/generate.py", *arguments],
        cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TERM": "dumb"},
    )  # fmt: skip
    os.close(slave)
    os.write(master, b"The river\n:quit\n")
    shown, deadline = b"", time.monotonic() + 120
    with contextlib.suppress(OSError):  # which is what Linux says when the other side has gone
        while select.select([master], [], [], max(0.0, deadline - time.monotonic()))[0]:
            shown += os.read(master, 4096)
    os.close(master)
    if time.monotonic() > deadline:
        process.kill()
    assert process.wait() == 0, shown
    text = shown.decode().replace("\r", "")
    assert "\x1b[2mThe river\x1b[0m" in text
    assert "[--max-new-tokens]" in text or "[end of document]" in text
    assert "Traceback" not in text


def test_a_recorded_tokenizer_that_moved_or_changed(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = next((run_folder / "checkpoints").glob("step_*"))
    state = json.loads((step / "state.json").read_text())
    other = ROOT / "tests" / "data" / "tiny_byte_level_bpe"
    common = ["--quiet", "--prompt", "a", "--checkpoint", str(run_folder), "--max-new-tokens", "2"]
    assert main([*common, "--tokenizer-model", str(TOKENIZER)]) == 0
    changed = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(other)]
    assert main([*common, *changed]) == 1
    assert "is not the tokenizer that" in capsys.readouterr().err
    try:
        moved = state | {"tokenizer": state["tokenizer"] | {"model": "/no/such.model"}}
        rewrite(step, moved)
        assert main(common) == 1
        assert "give --tokenizer-model where it lies now" in capsys.readouterr().err
        rewrite(step, {key: value for key, value in state.items() if key != "tokenizer"})
        assert main(common) == 1
        assert "records no tokenizer; give --tokenizer-type" in capsys.readouterr().err
        rewrite(step, state | {"start_id": None})
        assert main([*common[:1], "--prompt", "", *common[3:]]) == 1
        assert "there is nothing to continue" in capsys.readouterr().err
        assert main(common) == 0
        rewrite(step, state | {"start_id": 1})  # BOS, as in a converted checkpoint
        model = load_text_model(step, device="cpu")
        assert (model.start_id, model.stop_ids) == (1, {1, model.tokenizer.eod})
    finally:
        rewrite(step, state)


def rewrite(step: Path, state: dict) -> None:
    """Another state file in a checkpoint that stays complete."""
    (step / "state.json").write_text(json.dumps(state))
    marker = json.loads((step / "COMPLETE.json").read_text())
    marker["files"]["state.json"] = (step / "state.json").stat().st_size
    (step / "COMPLETE.json").write_text(json.dumps(marker))


def test_a_converted_model_writes_what_its_original_writes(tmp_path: Path) -> None:
    """The same document start, ends and texts, though one decodes padded batches and the other a cache."""
    from megatron_tokedit.cli.convert_checkpoint import main as convert

    original = write_hf_llama(tmp_path / "hf", vocab_size=420, bos_token_id=0, eos_token_id=0)
    for file in (ROOT / "tests" / "data" / "tiny_byte_level_bpe").iterdir():
        shutil.copy(file, original)
    converted = tmp_path / "megatron"
    arguments = ["--from", "hf", "--to", "megatron", "--input", str(original), "--output", str(converted)]
    assert convert(["--quiet", *arguments]) == 0
    prompts = ["--prompt", "The river", "hills and", "a", "--num-samples", "4", "--max-new-tokens", "30"]
    written = [
        lines("--checkpoint", str(folder), *prompts, *chosen, "--output", str(tmp_path / "out.jsonl"))
        for chosen in ([], ["--top-k", "9", "--top-p", "0.8", "--batch-size", "3"])
        for folder in (original, converted)
    ]
    assert written[0] == written[1] != written[2] == written[3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a", "--temperature", "-1"], "temperature: -1.0, expected 0 (greedy)"),
        (["--prompt", "a", "--top-p", "0"], "top_p: 0.0"),
        (["--prompt", "a", "--temperature", "0", "--num-samples", "2"], "writes the same text every time"),
        (["--prompt", "a", "--num-samples", "0"], "--num-samples: expected at least 1"),
        (["--prompt", "", "--no-document-start"], "prompt 0: there is nothing to continue"),
        (["--prompt", "river " * 40], "takes at most 32; shorten it"),
        (["--prompt-file", "/no/such"], "/no/such: cannot be read"),
        (["--prompt-file", "{bad}"], "bad.jsonl:2: has no text under the key 'prompt'"),
        (["--prompt-file", "{binary}"], "is not UTF-8 text"),
        (["--prompt-file", "{empty}"], "empty.txt: is empty; there are no prompts in it"),
        (["--prompt", "a\udcff"], "the prompt 'a\\udcff' is not UTF-8 text"),
        (["--prompt", "a", "--temperature", "1e-38"], "temperature: 1e-38, expected 0 (greedy) or at least"),
        (["--prompt", "a", "--first-sample", str(1 << 64)], "--first-sample: expected less than 2**64"),
        (["--prompt", "a", "--output", "{folder}"], "is a folder; give the name of a file"),
        (["--prompt-file", "{bad}", "--output", "{bad}"], "bad.jsonl: is the --prompt-file, which it would"),
        (["--prompt", "a", "--checkpoint", "/no/such"], "/no/such: no such folder"),
    ],
)
def test_faults(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    (tmp_path / "binary.txt").write_bytes(b"a\xff\n")
    (tmp_path / "empty.txt").touch()
    places = {"bad": tmp_path / "bad.jsonl", "binary": tmp_path / "binary.txt"}
    places |= {"empty": tmp_path / "empty.txt", "folder": tmp_path}
    output = ["--output", str(tmp_path / "out.jsonl")]
    arguments = [argument.format(**places) for argument in arguments]
    assert main(["--quiet", "--checkpoint", str(run_folder), *output, *arguments]) == 1
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--checkpoint", "x", "--prompt", "a", "--prompt-file", "b"],
        ["--checkpoint", "x", "--dtype", "int8"],
        ["--checkpoint", "x", "--interactive", "--output", "y"],
    ],
)
def test_wrong_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2


def test_defaults_are_those_of_the_settings() -> None:
    assert _settings(_parser().parse_args(["--checkpoint", "x"])) == GenerationSettings()


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; import megatron_tokedit.cli.generate as g; g._parser(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_standard_input_that_is_closed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    for more in ([], ["--interactive"]):
        with pytest.raises(SystemExit) as end:
            main(["--checkpoint", "x", *more])
        assert end.value.code == 2
    assert "standard input is closed" in capsys.readouterr().err
    assert main(["--checkpoint", "/no/such", "--prompt", "a"]) == 1
