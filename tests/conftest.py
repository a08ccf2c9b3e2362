from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
from forks import ForkedRanks, forked_for_spawned
from hypothesis import settings

from megatron_tokedit.testing.ranks import RankPool

os.environ.setdefault("HF_HUB_OFFLINE", "1")
settings.register_profile("on a busy machine", deadline=None)
settings.load_profile("on a busy machine")
LONG_FILES = (
    "test_kill", "test_replica", "test_tasks_cli", "test_train_stops", "test_collapse", "test_quickstart",
    "test_train_cli", "test_layouts", "test_fine_tuning", "test_sft_kill", "test_extra_state",
)  # fmt: skip
"""Begun first: files are given to processes one by one, and a long one would be the last to end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files come first; all else, and the tests of a file, stay in order."""
    order = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(autouse=True)
def _messages_reach_caplog() -> None:
    """A command that ran before in this process has made the package's messages its own."""
    package = logging.getLogger("megatron_tokedit")
    package.setLevel(logging.NOTSET)
    package.propagate = True


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Gloo ranks that live as long as the test session: ``ranks.run(function, *args, world_size=n)``."""
    pool = ForkedRanks()
    yield pool
    pool.close()


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of jobs do not import everything again; for tests that are not about their start or end."""
    monkeypatch.setattr("multiprocessing.get_context", forked_for_spawned)
