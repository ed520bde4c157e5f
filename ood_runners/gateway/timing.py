"""Where the time of a request goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from ood_runners.telemetry import metrics, tracing


class Timing:
    """Milliseconds by stage, by the clock on the wall; stages that run at the same time overlap."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._stages: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block; of blocks with one name the longest counts, as they run at the same time.

        It is a span and an observation of the metrics as well.
        """
        start = time.perf_counter()
        try:
            with tracing.span(name):
                yield
        finally:
            seconds = time.perf_counter() - start
            metrics.stage_seconds.labels(name).observe(seconds)
            took = seconds * 1000
            self._stages[name] = max(took, self._stages.get(name, 0.0))

    def finish(self) -> dict[str, float]:
        """Every stage and the total, in milliseconds."""
        total = (time.perf_counter() - self._start) * 1000
        return {name: round(ms, 2) for name, ms in (self._stages | {"total": total}).items()}
