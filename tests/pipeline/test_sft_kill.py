"""kill -9 of a job of conversations, with two workers and in its merge: the same bytes, masks included."""

from __future__ import annotations

import itertools
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from fork_server import ForkServer
from kill_cases import Case, kill_at_random_times
from pipeline_cases import VOCAB_SIZE
from sft_cases import CONTEXT, SUFFIXES, editing, write_conversations

from megatron_tokedit.dataset.loss_mask import LOSS_MASK_SUFFIXES
from megatron_tokedit.testing.models import write_hf_llama

ALL_SUFFIXES = (*SUFFIXES, ".edits", ".stats.json", ".manifest.json")


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()


class TalkCase(Case):
    """A job of conversations."""

    key = "sft"

    def what_to_read(self) -> list[str]:
        talks = str(self.folder / "talks.jsonl")
        return ["--input", talks, "--format", "sft", "--sft-chat-template", "tulu"]

    def check_outputs(self, name: str) -> None:
        """Also, where the data has an ``.idx``, so that it looks whole, its mask is there."""
        super().check_outputs(name)
        if self.output(name, ".idx").exists():
            missing = [suffix for suffix in LOSS_MASK_SUFFIXES if not self.output(name, suffix).exists()]
            assert not missing, name


@pytest.fixture
def case(server: ForkServer, tmp_path: Path) -> TalkCase:
    write_conversations(tmp_path / "talks.jsonl")
    prior = write_hf_llama(tmp_path / "prior", vocab_size=VOCAB_SIZE, max_position_embeddings=256)
    changes = editing(prior, edit_strategy="low_drop_up_revise", edit_low_threshold=0.0028, workers=2)
    changes |= {"sft_max_tokens": CONTEXT, "sft_too_long": "truncate", "unit_documents": 4}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in changes.items()]
    return TalkCase(server, tmp_path, flags, ALL_SUFFIXES)


def test_conversations_killed_at_random_times_with_two_workers(case: TalkCase) -> None:
    kill_at_random_times(case, seed=7, num_kills=12)


def kill_in_the_merge(case: TalkCase, every: int) -> int:
    """Kill merges of the same units before a step on an output's file, each ``every`` steps later than the
    one before, and again when they are repeated; returns the steps."""
    again = itertools.cycle(range(2, 9))
    case.start("edited", "--stage", "edit").finish()
    for step in itertools.count(1, every):
        name = f"merge{step}"
        shutil.copytree(case.folder / "edited.work", case.folder / f"{name}.work")
        job = case.start(name, kill_at_step=step, steps_under=f"_{case.key}_document")
        if job.wait() == 0:
            case.check_end(name)
            return step
        assert job.returncode == -signal.SIGKILL, job.log.read_text()
        assert case.phase(name) == "merge"
        case.check_outputs(name)
        second = case.start(name, kill_at_step=next(again), steps_under=f"_{case.key}_document")
        assert second.wait() == -signal.SIGKILL, second.log.read_text()
        case.check_outputs(name)
        case.start(name).finish()
        case.check_end(name)
    raise AssertionError


def test_conversations_killed_in_the_merge(case: TalkCase) -> None:
    assert kill_in_the_merge(case, every=3) > 20


@pytest.mark.stress
@pytest.mark.timeout(1800)
def test_conversations_killed_before_every_step_of_the_merge(case: TalkCase) -> None:
    assert kill_in_the_merge(case, every=1) > 20
