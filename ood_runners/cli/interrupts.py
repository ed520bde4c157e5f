"""Ctrl-C and SIGTERM that arrive, wherever they meet the process.

A library that is just being imported, or that calls back from compiled code, may swallow the exception that Python
raises for them. So it is remembered that somebody asked to stop, and each step of a stage asks again.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ood_runners.training.progress import Progress, Stage

_asked = False


def listen() -> None:
    """Have SIGINT and SIGTERM raise KeyboardInterrupt and be remembered."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = True
    raise KeyboardInterrupt


def check() -> None:
    """Raise KeyboardInterrupt if somebody has asked to stop."""
    if _asked:
        raise KeyboardInterrupt


class Interruptible:
    """A progress that ends the work at its next step once somebody has asked to stop."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        """As the progress's own."""
        check()
        with self._progress.stage(name, total) as stage:
            yield _Stage(stage)
        check()


class _Stage:
    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def advance(self, n: int = 1, note: str = "", total: int | None = None) -> None:
        check()
        self._stage.advance(n, note, total)
