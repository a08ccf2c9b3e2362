from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from cluster import Cluster, NoSlurm, running_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A real Slurm of two nodes; the tests that use it are skipped where there is none.

    ``TOKEDIT_REQUIRE_SLURM=1`` makes that a failure.
    """
    running = running_cluster()
    try:
        started = running.__enter__()
    except NoSlurm as error:
        if os.environ.get("TOKEDIT_REQUIRE_SLURM") == "1":
            pytest.fail(str(error))
        pytest.skip(str(error))
    try:
        yield started
    finally:
        running.__exit__(None, None, None)
