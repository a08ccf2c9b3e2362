"""The training progress bar, on a terminal only; elsewhere the log lines say it all."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tqdm import tqdm

from megatron_tokedit.log import ROOT_NAME

if TYPE_CHECKING:
    from megatron_tokedit.training.trainer import Progress


class _Bar:
    """Drives a tqdm bar; the step a run resumes at is where the bar starts."""

    def __init__(self, bar: tqdm) -> None:
        self.bar = bar

    def update(self, step: int, loss: float) -> None:
        """Show ``step`` finished steps."""
        if self.bar.n == 0:
            self.bar.n = self.bar.initial = step - 1
        self.bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        self.bar.update(step - self.bar.n)


class _AboveBar:
    """A stream that writes whole lines above the bar."""

    def write(self, text: str) -> None:
        """Write ``text``."""
        tqdm.write(text, file=sys.stderr, end="")

    def flush(self) -> None:
        """Write out."""
        sys.stderr.flush()


@contextmanager
def progress_shown(train_steps: int, *, enabled: bool) -> Iterator[Progress | None]:
    """A progress bar over the steps of a run, with log lines above it; None where there is no terminal."""
    if not enabled or not sys.stderr.isatty():
        yield None
        return
    handlers = [
        handler
        for handler in logging.getLogger(ROOT_NAME).handlers
        if isinstance(handler, logging.StreamHandler)
    ]
    streams = [handler.setStream(_AboveBar()) for handler in handlers]
    try:
        with tqdm(total=train_steps, unit="step", dynamic_ncols=True) as bar:
            yield _Bar(bar)
    finally:
        for handler, stream in zip(handlers, streams, strict=True):
            handler.setStream(stream)
