"""An interruption that a library swallows still ends the work.

Each in a process of its own: an interruption that went astray would end the one that runs the tests.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORK = """
import signal, sys
from contextlib import suppress

from ood_runners.cli import interrupts
from ood_runners.training.progress import SilentProgress

number, steps = int(sys.argv[1]), int(sys.argv[2])
interrupts.listen()
try:
    with interrupts.Interruptible(SilentProgress()).stage("work") as stage:
        for step in range(steps):
            print("step", step, flush=True)
            stage.advance()
            if number and step == 1:
                with suppress(BaseException):
                    signal.raise_signal(number)
        if number and not steps:
            with suppress(BaseException):
                signal.raise_signal(number)
except KeyboardInterrupt:
    print("interrupted")
else:
    print("done")
"""


def printed(number: int, steps: int) -> list[str]:
    """What is said by work of so many steps, in whose second one, or whose only part, the signal is swallowed."""
    command = [sys.executable, "-c", WORK, str(number), str(steps)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize("number", [2, 15])  # SIGINT and SIGTERM
def test_what_was_swallowed_is_raised_at_the_next_step(number: int) -> None:
    assert printed(number, 5) == ["step 0", "step 1", "step 2", "interrupted"]


def test_a_stage_without_steps_ends_it_too() -> None:
    assert printed(2, 0) == ["interrupted"]


def test_work_that_nobody_interrupts_goes_on() -> None:
    assert printed(0, 2) == ["step 0", "step 1", "done"]
