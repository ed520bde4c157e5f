"""An interruption that a library swallows still ends the work."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import suppress

import pytest

from ood_runners.cli import interrupts
from ood_runners.training.progress import SilentProgress


@pytest.fixture(autouse=True)
def listening(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(interrupts, "_asked", False)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    interrupts.listen()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_was_swallowed_is_raised_at_the_next_step(number: signal.Signals) -> None:
    progress, steps = interrupts.Interruptible(SilentProgress()), 0
    with pytest.raises(KeyboardInterrupt), progress.stage("work") as stage:
        for _ in range(5):
            steps += 1
            stage.advance()
            if steps == 2:
                with suppress(BaseException):
                    signal.raise_signal(number)
    assert steps == 3


def test_a_stage_without_steps_ends_it_too() -> None:
    stage = interrupts.Interruptible(SilentProgress()).stage("work")
    with pytest.raises(KeyboardInterrupt), stage, suppress(BaseException):
        signal.raise_signal(signal.SIGINT)


def test_work_that_nobody_interrupts_goes_on() -> None:
    with interrupts.Interruptible(SilentProgress()).stage("work") as stage:
        stage.advance()
