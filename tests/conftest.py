from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from megatron_tokedit.testing.ranks import RankPool

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Gloo ranks that live as long as the test session: ``ranks.run(function, *args, world_size=n)``."""
    pool = RankPool()
    yield pool
    pool.close()
