"""Whether a request may join the line."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from ood_runners.errors import Overloaded
from ood_runners.telemetry import metrics

SMOOTHING = 0.1


class Admission:
    """Counts the pictures on their way and refuses what could not be served in time.

    The time a picture costs is learned from the answers themselves (Little's law: time in the system over the
    number in the system), so a slow machine refuses earlier than a fast one. A refused request costs nothing:
    it is told at once, and the service goes on at its full rate.

    Parameters
    ----------
    most : pictures that may be on their way at once
    patience_s : seconds that a picture may wait for those before it
    """

    def __init__(self, most: int, patience_s: float) -> None:
        self.most = most
        self.patience_s = patience_s
        self.pending = 0
        self.seconds_per_picture = 0.0

    @contextmanager
    def admit(self, pictures: int = 1) -> Iterator[None]:
        """Hold places for `pictures` pictures; raise Overloaded where there are none."""
        wait = self.pending * self.seconds_per_picture
        if self.pending and (self.pending + pictures > self.most or wait > self.patience_s):
            raise Overloaded(
                f"{self.pending} pictures are waiting, about {wait:.1f} s of work; send this request again later."
            )
        self._add(pictures)
        ahead, start = self.pending, time.monotonic()
        try:
            yield
        finally:
            self._add(-pictures)
            cost = (time.monotonic() - start) / ahead
            self.seconds_per_picture += SMOOTHING * (cost - self.seconds_per_picture)

    def _add(self, pictures: int) -> None:
        self.pending += pictures
        metrics.pending_pictures.set(self.pending)
