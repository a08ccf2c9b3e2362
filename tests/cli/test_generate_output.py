"""A file of texts: stopped at any moment it goes on, and nothing is replaced that was not to be."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from forks import Forked

from megatron_tokedit.cli.generate import main
from megatron_tokedit.testing.models import tiny_llama

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests" / "generation"))
PROMPTS = [f"The river {number}" for number in range(6)]
NUM_TEXTS = 2 * len(PROMPTS)


def save(folder: str) -> None:
    import generation_cases

    model = tiny_llama(init_method_std=0.3, seq_length=512)
    generation_cases.save_checkpoint(folder, model, "sentencepiece")


@pytest.fixture(scope="module")
def run_folder(ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    ranks.run(save, str(folder), world_size=1)
    return folder


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    return file


def arguments_of(run_folder: Path, prompt_file: Path, output: Path, *more: str) -> list[str]:
    return [
        "--checkpoint", str(run_folder), "--prompt-file", str(prompt_file), "--output", str(output),
        "--num-samples", "2", "--max-new-tokens", "12", "--ignore-eod", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What a run that nobody stops writes."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    arguments = arguments_of(run_folder, folder / "prompts.txt", folder / "out.jsonl")
    assert main(["--quiet", *arguments]) == 0
    assert sorted(file.name for file in folder.iterdir()) == ["out.jsonl", "prompts.txt"]
    return (folder / "out.jsonl").read_bytes()


def begun(whole: bytes, run_folder: Path, prompt_file: Path, output: Path, num_bytes: int) -> None:
    """The state in which a run is killed that has written so many bytes."""
    arguments = arguments_of(run_folder, prompt_file, output)
    with pytest.MonkeyPatch.context() as patch:
        from megatron_tokedit.cli.generate_output import LinesFile

        patch.setattr(LinesFile, "finish", lambda self: None)
        assert main(["--quiet", *arguments]) == 0
    partial = output.with_name(output.name + ".partial")
    assert partial.read_bytes() == whole
    os.truncate(partial, num_bytes)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.4, 0.75, 0.999, 1.0])
def test_what_is_there_is_not_written_again(run_folder, prompt_file, tmp_path, whole, share, capsys):
    """Wherever in the file the kill came, the end of a line included."""
    output = tmp_path / "out.jsonl"
    num_bytes = int(share * len(whole))
    begun(whole, run_folder, prompt_file, output, num_bytes)
    num_there = whole[:num_bytes].count(b"\n")
    assert main(arguments_of(run_folder, prompt_file, output)) == 0
    shown = capsys.readouterr().err
    assert output.read_bytes() == whole
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.jsonl", "prompts.txt"]
    assert (f"{num_there} texts are there" in shown) == (num_there > 0)
    assert f"{NUM_TEXTS - num_there} texts, {12 * (NUM_TEXTS - num_there)} new tokens" in shown


LONG = ("--max-new-tokens", "150", "--batch-size", "1")


@pytest.fixture(scope="module")
def long_whole(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("long")
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    arguments = arguments_of(run_folder, folder / "prompts.txt", folder / "out.jsonl", *LONG)
    assert main(["--quiet", *arguments]) == 0
    return (folder / "out.jsonl").read_bytes()


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_process_is_gone_on_with(run_folder, prompt_file, tmp_path, long_whole, stop):
    """A real one, stopped while it writes."""
    output = tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.partial"
    command = ["tools/generate.py", *arguments_of(run_folder, prompt_file, output, *LONG)]
    process = Forked(command, os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not (partial.exists() and partial.stat().st_size) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(stop)
    shown = process.communicate()[1]
    assert process.returncode == (-signal.SIGKILL if stop == signal.SIGKILL else 130), shown
    num_there = partial.read_bytes().count(b"\n")
    assert 1 <= num_there < NUM_TEXTS
    if stop == signal.SIGINT:
        assert f"error: interrupted; {num_there} texts are in {partial}, and the same" in shown
    assert main(["--quiet", *arguments_of(run_folder, prompt_file, output, *LONG)]) == 0
    assert output.read_bytes() == long_whole


def test_a_finished_file_stays(run_folder, prompt_file, tmp_path, whole, capsys):
    output = tmp_path / "out.jsonl"
    output.write_text("the work of a week\n")
    arguments = arguments_of(run_folder, prompt_file, output)
    assert main(["--quiet", *arguments]) == 1
    assert "out.jsonl: exists; give another file, or --overwrite" in capsys.readouterr().err
    assert output.read_text() == "the work of a week\n"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.jsonl", "prompts.txt"]
    assert main(["--quiet", *arguments, "--overwrite"]) == 0
    assert output.read_bytes() == whole


def test_a_file_that_appears_meanwhile_stays(run_folder, prompt_file, tmp_path, whole, capsys, monkeypatch):
    from megatron_tokedit.cli.generate_output import LinesFile

    output, write = tmp_path / "out.jsonl", LinesFile.write

    def write_and_meddle(self, record):
        output.write_text("somebody else's\n")
        write(self, record)

    monkeypatch.setattr(LinesFile, "write", write_and_meddle)
    assert main(["--quiet", *arguments_of(run_folder, prompt_file, output)]) == 1
    assert "has appeared while the texts were written" in capsys.readouterr().err
    assert output.read_text() == "somebody else's\n"
    assert (tmp_path / "out.jsonl.partial").read_bytes() == whole


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("--temperature", "0.5"), "temperature: recorded 1.0, now 0.5"),
        (("--seed", "5"), "seed: recorded 1234, now 5"),
        (("--num-samples", "3"), "num_samples: recorded 2, now 3"),
        (("--no-document-start",), "document_start: recorded True, now False"),
        (("--dtype", "bfloat16"), "machine: recorded cpu float32, now cpu bfloat16"),
        (("--stop", "a"), "stop_texts: recorded [], now ['a']"),
    ],
)
def test_other_settings_are_refused(run_folder, prompt_file, tmp_path, whole, capsys, more, named):
    output = tmp_path / "out.jsonl"
    begun(whole, run_folder, prompt_file, output, len(whole) // 2)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert main(["--quiet", *arguments_of(run_folder, prompt_file, output, *more)]) == 1
    shown = capsys.readouterr().err
    assert "was begun with other settings" in shown
    assert named in shown
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert main(["--quiet", *arguments_of(run_folder, prompt_file, output, *more, "--overwrite")]) == 0
    assert output.read_bytes() != whole


def test_the_number_of_texts_at_a_time_may_change(run_folder, prompt_file, tmp_path, whole):
    output = tmp_path / "out.jsonl"
    begun(whole, run_folder, prompt_file, output, len(whole) // 2)
    assert main(["--quiet", *arguments_of(run_folder, prompt_file, output, "--batch-size", "3")]) == 0
    assert output.read_bytes() == whole


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (
            ["Another", *PROMPTS[1:]],
            "out.jsonl.partial:1: is sample 0 of prompt 0, 'The river 0'; now sample 0",
        ),
        (PROMPTS[:2], "holds texts of more prompts than there are now"),
    ],
)
def test_other_prompts_are_refused(run_folder, prompt_file, tmp_path, whole, capsys, prompts, message):
    output = tmp_path / "out.jsonl"
    begun(whole, run_folder, prompt_file, output, len(whole) * 3 // 4)
    prompt_file.write_text("".join(f"{prompt}\n" for prompt in prompts))
    before = (tmp_path / "out.jsonl.partial").read_bytes()
    assert main(["--quiet", *arguments_of(run_folder, prompt_file, output)]) == 1
    assert message in capsys.readouterr().err
    assert (tmp_path / "out.jsonl.partial").read_bytes().startswith(before[:1000])
    assert not output.exists()


def test_another_model_is_refused(run_folder, prompt_file, tmp_path, whole, capsys, ranks):
    output = tmp_path / "out.jsonl"
    begun(whole, run_folder, prompt_file, output, len(whole) // 2)
    other = tmp_path / "other"
    ranks.run(save, str(other), world_size=1)
    assert main(["--quiet", *arguments_of(other, prompt_file, output)]) == 1
    assert "checkpoint: recorded" in capsys.readouterr().err
    (tmp_path / "out.jsonl.partial.json").write_text("{")
    assert main(["--quiet", *arguments_of(run_folder, prompt_file, output)]) == 1
    assert "out.jsonl.partial.json, which says them, cannot be read" in capsys.readouterr().err


def test_two_processes_do_not_write_one_file(run_folder, prompt_file, tmp_path, capsys):
    import fcntl

    output = tmp_path / "out.jsonl"
    with (tmp_path / "out.jsonl.partial").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert main(["--quiet", *arguments_of(run_folder, prompt_file, output)]) == 1
    assert "another process is writing it" in capsys.readouterr().err


def test_overwriting_needs_a_file(capsys):
    for output in ([], ["--output", "-"]):
        with pytest.raises(SystemExit):
            main(["--checkpoint", "x", "--prompt", "a", "--overwrite", *output])
        assert "there is no file to replace" in capsys.readouterr().err


def test_a_fault_behind_some_texts_keeps_them(run_folder, tmp_path, capsys):
    """The third line is no prompt; mended, the command goes on."""
    file, output = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    good = [json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS]
    file.write_text("".join([*good[:3], "{\n", *good[4:]]))
    arguments = arguments_of(run_folder, file, output, "--batch-size", "1")
    assert main(["--quiet", *arguments]) == 1
    assert "p.jsonl:4: is not a JSON object" in capsys.readouterr().err
    there = (tmp_path / "out.jsonl.partial").read_bytes()
    assert there.count(b"\n") >= 2
    file.write_text("".join(good))
    assert main(["--quiet", *arguments]) == 0
    assert output.read_bytes().startswith(there)
    assert output.read_bytes().count(b"\n") == NUM_TEXTS
