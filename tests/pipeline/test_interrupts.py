"""Ctrl-C is never lost, wherever it finds the main thread."""

from __future__ import annotations

import os
import signal

import pytest

from megatron_tokedit.pipeline.interrupts import Interrupts


class InterruptedWhenDeleted:
    """An object in whose destructor SIGINT arrives; Python prints what is raised there, and goes on."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        sum(range(1000))  # the handler runs between two bytecodes


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_a_destructor_swallows_is_raised_at_the_next_check():
    with Interrupts(raise_at_once=True) as interrupts:
        thing = InterruptedWhenDeleted()
        del thing
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
        interrupts.check()  # answered once


def interrupted_block(log: list[str]) -> None:
    with Interrupts(raise_at_once=False):
        os.kill(os.getpid(), signal.SIGINT)
        log.append("went on")


def test_an_interrupt_waits_for_the_check_or_the_end():
    log: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        interrupted_block(log)
    assert log == ["went on"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def failing_block() -> None:
    with Interrupts(raise_at_once=False):
        os.kill(os.getpid(), signal.SIGINT)
        raise ValueError("first")


def test_an_error_is_not_replaced_by_the_interrupt():
    with pytest.raises(ValueError, match="first"):
        failing_block()
