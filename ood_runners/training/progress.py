"""How long work reports what it is doing: a bar on a terminal, plain lines in a log, nothing in a library call."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress


class Stage(Protocol):
    """One stage of the work, open until its ``with`` block ends."""

    def advance(self, n: int = 1, note: str = "", total: int | None = None) -> None:
        """`n` more are done, of `total` where only the work itself knows it; `note` (``loss 0.012``) stands beside."""


class Progress(Protocol):
    """Where a fit or an evaluation reports its stages."""

    def stage(self, name: str, total: int | None = None) -> AbstractContextManager[Stage]:
        """Open the stage `name`; `total` is how many `advance` steps it will take, where that is known."""


class SilentProgress:
    """Says nothing; for library calls and tests."""

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        """A stage that nobody watches."""
        yield self

    def advance(self, n: int = 1, note: str = "", total: int | None = None) -> None:
        """Nothing."""


class RenamedProgress:
    """Another progress's stages under other names, for work that is done more than once."""

    def __init__(self, progress: Progress, rename: Callable[[str], str]) -> None:
        self._progress, self._rename = progress, rename

    def stage(self, name: str, total: int | None = None) -> AbstractContextManager[Stage]:
        """The stage of the other name."""
        return self._progress.stage(self._rename(name), total)


class BarProgress:
    """Bars on a terminal, with the remaining time; a finished stage leaves its line, stages may be nested."""

    def __init__(self, console: Console) -> None:
        self._bars = RichProgress(
            TextColumn("{task.description:<14}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._open = 0

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        """A stage with a bar of its own."""
        if self._open == 0:
            self._bars.start()
        self._open += 1
        task = self._bars.add_task(name, total=total, note="")
        try:
            yield _BarStage(self._bars, task)
        finally:
            self._open -= 1
            if self._open == 0:
                self._bars.stop()
                # What is finished stays on the screen, and is not drawn again under the next stage.
                for finished in self._bars.task_ids:
                    self._bars.remove_task(finished)


class _BarStage:
    def __init__(self, bars: RichProgress, task: TaskID) -> None:
        self._bars, self._task = bars, task

    def advance(self, n: int = 1, note: str = "", total: int | None = None) -> None:
        self._bars.update(self._task, total=total, advance=n, note=note)


class LineProgress:
    """Plain lines in a log: one when a stage ends, and on the way at most one every `every` seconds."""

    def __init__(self, stream: TextIO, every: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.stream, self.every, self.clock = stream, every, clock

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        """A stage that writes lines."""
        stage = _LineStage(self, name, total)
        yield stage
        stage.finish()


class _LineStage:
    def __init__(self, log: LineProgress, name: str, total: int | None) -> None:
        self._log, self._name, self._total = log, name, total
        self._done, self._note = 0, ""
        self._began = self._said = log.clock()

    def advance(self, n: int = 1, note: str = "", total: int | None = None) -> None:
        self._total = total or self._total
        self._done, self._note = self._done + n, note
        now = self._log.clock()
        if now - self._said < self._log.every or self._done == self._total:
            return
        self._said = now
        if self._total is None:
            self._write(f"{self._done} done")
        else:
            left = (now - self._began) / max(self._done, 1) * (self._total - self._done)
            self._write(f"{self._done} of {self._total}, about {left:.0f} s left")

    def finish(self) -> None:
        self._write(f"{self._done} done in {self._log.clock() - self._began:.1f} s")

    def _write(self, text: str) -> None:
        print(f"{self._name}: {text}{', ' + self._note if self._note else ''}", file=self._log.stream, flush=True)


def progress_for(stream: TextIO | None = None) -> Progress:
    """Bars if `stream` (standard error unless given) is a terminal, lines if it is a file or a pipe."""
    stream = sys.stderr if stream is None else stream
    console = Console(file=stream)
    return BarProgress(console) if console.is_terminal else LineProgress(stream)
