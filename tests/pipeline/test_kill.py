"""kill -9 anywhere, the same command again: the same bytes, and finished units are left alone."""

from __future__ import annotations

import itertools
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fork_server import ForkServer
from kill_cases import Case, kill_at_random_times, kill_before_every_step, markers, sleep_until
from pipeline_cases import TOKENIZER, VOCAB_SIZE, editing, output_bytes, settings, write_corpus

from megatron_tokedit.config.preprocess import preprocess_config
from megatron_tokedit.pipeline import run
from megatron_tokedit.testing.models import write_hf_llama

TOOL = str(Path(__file__).resolve().parents[2] / "tools" / "preprocess_edit.py")


def start(folder, name, *flags):
    command = [
        sys.executable,
        TOOL,
        "--input",
        str(folder / "corpus.jsonl"),
        "--output-prefix",
        str(folder / name),
    ]
    command += [
        "--tokenizer-type",
        "SentencePieceTokenizer",
        "--tokenizer-model",
        TOKENIZER,
        "--append-eod",
        *flags,
    ]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )


def finish(folder, name, *flags):
    process = start(folder, name, *flags)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()


def kill_when(process, condition):
    while not condition() and process.poll() is None:
        time.sleep(0.002)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def crash_loop(folder, name, points, *flags):
    """Kill at each point (number of finished units), then run to the end; returns how often it was killed."""
    kills = 0
    for point in points:
        before = {path: path.stat().st_mtime_ns for path in markers(folder, name)}
        process = start(folder, name, *flags)
        kills += kill_when(process, lambda: len(markers(folder, name)) >= point)  # noqa: B023
        now = {path: path.stat().st_mtime_ns for path in markers(folder, name)}
        assert before.items() <= now.items() or not now  # finished units are left alone, or all are merged
    finish(folder, name, *flags)
    return kills


NONE = ("--edit-strategy", "none", "--unit-documents", "1")


def test_killed_at_several_points_gives_the_same_bytes(tmp_path):
    write_corpus(tmp_path / "corpus.jsonl", num_documents=60)
    finish(tmp_path, "whole", *NONE)
    assert crash_loop(tmp_path, "out", (0, 3, 30, 59, 60), *NONE) >= 3
    assert output_bytes(tmp_path, "out") == output_bytes(tmp_path, "whole")
    assert not list(tmp_path.rglob("out.work/**/*.tmp"))


def test_killed_while_editing_with_workers(tmp_path):
    write_corpus(tmp_path / "corpus.jsonl", num_documents=60)
    changes = editing(write_hf_llama(tmp_path / "prior", vocab_size=VOCAB_SIZE), unit_documents=4)
    run(preprocess_config(settings(tmp_path, "whole", **changes)))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in changes.items()]
    process = start(tmp_path, "out", *flags, "--workers", "2")
    assert kill_when(process, lambda: len(markers(tmp_path, "out")) >= 2)
    assert len(markers(tmp_path, "out")) < 15
    run(
        preprocess_config(settings(tmp_path, "out", **changes))
    )  # with one worker: that is not part of the plan
    suffixes = (".bin", ".idx", ".edits", ".manifest.json")
    assert output_bytes(tmp_path, "out", suffixes=suffixes) == output_bytes(
        tmp_path, "whole", suffixes=suffixes
    )


MERGED = (".bin", ".idx", ".manifest.json")
EDIT_SUFFIXES = (*MERGED, ".edits")


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture
def none_case(server: ForkServer, tmp_path: Path) -> Case:
    write_corpus(tmp_path / "corpus.jsonl", num_documents=24)
    return Case(server, tmp_path, ["--edit-strategy", "none", "--unit-documents", "3"], MERGED)


@pytest.fixture
def edit_case(server: ForkServer, tmp_path: Path) -> Case:
    write_corpus(tmp_path / "corpus.jsonl", num_documents=24)
    changes = editing(write_hf_llama(tmp_path / "prior", vocab_size=VOCAB_SIZE), unit_documents=3, workers=2)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in changes.items()]
    return Case(server, tmp_path, flags, EDIT_SUFFIXES)


@pytest.mark.parametrize("seed", [1])
def test_killed_at_random_times(none_case: Case, seed: int) -> None:
    kill_at_random_times(none_case, seed, 20)


@pytest.mark.parametrize("seed", [2])
def test_killed_at_random_times_while_editing(edit_case: Case, seed: int) -> None:
    kill_at_random_times(edit_case, seed, 20)


@pytest.mark.stress
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [3])
def test_killed_a_hundred_times(none_case: Case, seed: int) -> None:
    kill_at_random_times(none_case, seed, 100)


@pytest.mark.stress
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [4])
def test_killed_a_hundred_times_while_editing(edit_case: Case, seed: int) -> None:
    kill_at_random_times(edit_case, seed, 100)


def test_killed_before_every_step_on_the_file_system(server: ForkServer, tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus.jsonl", num_documents=4)
    case = Case(server, tmp_path, ["--edit-strategy", "none", "--unit-documents", "4"], MERGED)
    assert kill_before_every_step(case) > 20


@pytest.mark.stress
@pytest.mark.timeout(1800)
def test_killed_before_every_step_on_the_file_system_while_editing(edit_case: Case) -> None:
    assert kill_before_every_step(edit_case, "--workers", "1") > 100


def test_a_second_process_on_a_unit_that_is_killed_leaves_the_first_ones_work(
    server: ForkServer, tmp_path: Path
) -> None:
    """The second one stops when it begins to write its unit, the first one finishes it, the second goes on
    and is killed at each of its steps."""
    write_corpus(tmp_path / "corpus.jsonl", num_documents=4)
    case = Case(server, tmp_path, ["--edit-strategy", "none", "--unit-documents", "4"], MERGED)
    for step in itertools.count(2):
        name = f"twice{step}"
        edit = ("--stage", "edit", "--rank", "0", "--world-size", "1")
        second = case.start(
            name, *edit, stop_at_step=1, kill_at_step=step, steps_under=".work/units/0000/0000000_"
        )
        sleep_until(second, second.is_stopped)
        case.start(name, *edit).finish()
        os.kill(second.pid, signal.SIGCONT)
        code = second.wait()
        assert code in (0, -signal.SIGKILL), second.log.read_text()
        case.start(name).finish()
        case.check_end(name)
        if code == 0:
            break
    assert step > 5


def test_only_a_worker_is_killed(edit_case: Case) -> None:
    rng = random.Random(5)
    for trial in range(4):
        name = f"worker{trial}"
        job = edit_case.start(name)
        wanted = rng.randrange(edit_case.num_units - 2)
        sleep_until(job, lambda: len(markers(edit_case.folder, name)) >= wanted and len(job.children()) == 2)  # noqa: B023
        os.kill(rng.choice(job.children()), signal.SIGKILL)
        if job.wait() == 0:  # the other one did the rest: it was killed between two units
            edit_case.check_end(name)
            continue
        assert "1 work unit is not done" in (log := job.log.read_text())
        assert "a worker was killed by signal 9" in log
        assert len(markers(edit_case.folder, name)) == edit_case.num_units - 1
        edit_case.check_outputs(name)
        edit_case.start(name).finish()
        edit_case.check_end(name)


def test_processes_that_share_the_edit_stage_are_killed(edit_case: Case) -> None:
    rng = random.Random(6)
    for trial in range(3):
        name = f"shared{trial}"
        ranks = [("0", "2"), ("1", "2"), ("0", "2")]  # the third one by mistake
        flags = [("--stage", "edit", "--rank", r, "--world-size", w, "--workers", "1") for r, w in ranks]
        for _ in range(3):
            before = edit_case.finished(name)
            jobs = [edit_case.start(name, *flag) for flag in flags]
            for job in rng.sample(jobs, rng.randint(1, 3)):
                time.sleep(rng.uniform(0.0, edit_case.planned_seconds))
                job.kill()
            assert {job.wait() for job in jobs} <= {0, -signal.SIGKILL}
            assert before.keys() <= edit_case.finished(name).keys()
            edit_case.check_outputs(name)
        for flag in flags[:2]:
            edit_case.start(name, *flag).finish()
        edit_case.start(name, "--stage", "merge").finish()
        edit_case.check_end(name)


def test_a_full_disk_is_told_and_the_next_run_goes_on(none_case: Case) -> None:
    merged = len(none_case.whole[".bin"])
    unit = max(merged // none_case.num_units, 400)
    seen = set()
    for file_bytes in (200, unit // 2, merged - 1):
        name = f"full{file_bytes}"
        job = none_case.start(name, file_bytes=file_bytes)
        assert job.wait() == 1, job.log.read_text()
        (error,) = re.findall(r"error: cannot write .*/(\S+): File too large", job.log.read_text())
        seen.add(error.removeprefix(f"{name}_"))
        assert "Traceback" not in job.log.read_text()
        none_case.check_outputs(name)
        done = none_case.finished(name)
        assert not [*none_case.folder.rglob(f"{name}*/**/*.tmp"), *none_case.folder.glob("*.tmp")]
        again = none_case.start(name)
        again.finish()
        told = re.findall("done before: ([0-9]+)", again.log.read_text())
        num_done = sum(path.suffix == ".json" for path in done)
        assert told == ([] if num_done == none_case.num_units else [str(num_done)])
        none_case.check_end(name)
    assert {"plan.json", "text_document.bin"} <= seen


def test_an_input_that_cannot_be_read_is_told_and_the_next_run_goes_on(none_case: Case) -> None:
    corpus = none_case.folder / "corpus.jsonl"
    job = none_case.start("unreadable")
    sleep_until(job, lambda: len(markers(none_case.folder, "unreadable")) >= 2)
    assert job.kill()
    done = none_case.finished("unreadable")
    corpus.rename(none_case.folder / "kept")
    corpus.symlink_to("/proc/self/mem")  # a regular file whose first bytes cannot be read, not even by root
    job = none_case.start("unreadable")
    assert job.wait() == 1
    assert f"error: {corpus}: cannot be read: Input/output error" in job.log.read_text()
    corpus.unlink()
    (none_case.folder / "kept").rename(corpus)
    assert none_case.finished("unreadable") == done
    none_case.start("unreadable").finish()
    none_case.check_end("unreadable")
