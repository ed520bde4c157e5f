"""Whether a request may join the line."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ood_runners.errors import Overloaded
from ood_runners.telemetry import metrics

SMOOTHING = 0.03  # weight of the last picture in the mean: a pause counts little, a hundred pictures all


@dataclass
class Place:
    """A request's places; `served` is to be False where nothing was computed, which teaches nothing."""

    served: bool = True


class Admission:
    """Counts the pictures on their way and refuses what could not be served in time.

    The time a picture costs is learned from the time between one answer and the next, as long as there is work, so
    a slow machine refuses earlier than a fast one. Where a runner was away, the time until it failed is nobody's cost,
    or the line would stay short after it came back. A refused request costs nothing: it is told at once, and the
    service goes on at its full rate.

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
        self._last = 0.0  # when there was an answer, or nothing to do

    @contextmanager
    def admit(self, pictures: int = 1) -> Iterator[Place]:
        """Hold places for `pictures` pictures; raise Overloaded where there are none."""
        wait = self.pending * self.seconds_per_picture
        if self.pending and (self.pending + pictures > self.most or wait > self.patience_s):
            raise Overloaded(
                f"{self.pending} pictures are waiting, about {wait:.1f} s of work; send this request again later."
            )
        if not self.pending:
            self._last = time.monotonic()
        self._add(pictures)
        place = Place()
        try:
            yield place
        except BaseException:
            place.served = False
            raise
        finally:
            self._add(-pictures)
            now = time.monotonic()
            if place.served:
                self._learn(now - self._last, pictures)
            self._last = now

    def _add(self, pictures: int) -> None:
        self.pending += pictures
        metrics.pending_pictures.set(self.pending)

    def _learn(self, seconds: float, pictures: int) -> None:
        weight = 1 - (1 - SMOOTHING) ** pictures
        self.seconds_per_picture += weight * (seconds / pictures - self.seconds_per_picture)
