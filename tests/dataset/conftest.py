from __future__ import annotations

import os

import pytest


@pytest.fixture
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that write thousands of files and cut no power: waiting for the disk would take minutes."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
