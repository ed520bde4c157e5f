"""Whether a request may join the line, and when one that may not should come back."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ood_runners.errors import Overloaded
from ood_runners.telemetry import metrics

SMOOTHING = 0.03  # weight of the last picture in the mean: a pause counts little, a hundred pictures all
LONGEST_RETRY_S = 30


class Place:
    """A request's places in the line.

    Attributes
    ----------
    pictures : how many it holds
    work : seconds that they were measured to take, alone on an idle machine
    served : to be False where nothing was computed, which teaches nothing
    """

    def __init__(self, gate: Admission, pictures: int, work: float) -> None:
        self._gate = gate
        self._others = gate.pending > 0
        self._taken = gate.taken + pictures
        self.pictures = pictures
        self.work = work
        self.served = True

    @property
    def shared(self) -> bool:
        """Whether there were pictures of other requests on their way at any time since it has its places."""
        return self._others or self._gate.taken != self._taken

    def weigh(self, seconds: float) -> None:
        """Say what one of its pictures takes, once its version is known; raise Overloaded where that is too much."""
        self._gate.weigh(self, seconds)


class Admission:
    """Counts the pictures on their way and refuses what could not be served in time.

    What a picture takes is known before the first request: each version's golden picture was scored on this machine,
    alone. How much of that time it takes in a busy service, where pictures are computed together and processes share
    the cores, is learned from the time between one answer and the next, as long as there is work. Where a runner was
    away, the time until it failed is nobody's cost, or the line would stay short after it came back.

    A refused request costs next to nothing and is told at once when to come back: each one somewhat later than the one
    before, so that those who wait do not come back all together.

    Parameters
    ----------
    most : pictures that may be on their way at once
    patience_s : seconds that those on their way may take together
    """

    def __init__(self, most: int, patience_s: float) -> None:
        self.most = most
        self.patience_s = patience_s
        self.pending = 0
        self.taken = 0  # pictures that ever got a place
        self.work = 0.0  # of the pending pictures, in seconds as measured
        self.pace = 1.0  # seconds that go by for each second as measured
        self.typical = 0.0  # seconds of a picture whose version is not known yet
        self._last = 0.0  # when there was an answer, or nothing to do
        self._promised = 0.0  # when the last of those who were sent away has its turn

    @property
    def wait_s(self) -> float:
        """How long it takes to serve what is on its way."""
        return self.work * self.pace

    def refusal(self, pictures: int = 1) -> Overloaded | None:
        """Why `pictures` more pictures cannot be taken on now, if they cannot; an empty service takes any."""
        own = pictures * self.typical
        if self.pending and (self.pending + pictures > self.most or (self.work + own) * self.pace > self.patience_s):
            return self._refuse(pictures, own)
        return None

    @contextmanager
    def admit(self, pictures: int = 1) -> Iterator[Place]:
        """Hold places for `pictures` pictures; raise Overloaded where there are none."""
        error = self.refusal(pictures)
        if error is not None:
            raise error
        if not self.pending:
            self._last = time.monotonic()
        place = Place(self, pictures, pictures * self.typical)
        self.taken += pictures
        self._add(pictures, place.work)
        try:
            yield place
        except BaseException:
            place.served = False
            raise
        finally:
            self._add(-pictures, -place.work)
            now = time.monotonic()
            if place.served and place.work:
                self._learn((now - self._last) / place.work, pictures)
            self._last = now

    def weigh(self, place: Place, seconds: float) -> None:
        """See `Place.weigh`."""
        own = place.pictures * seconds
        ahead = self.work - place.work
        self._add(0, own - place.work)
        place.work = own
        self.typical = seconds
        if self.pending > place.pictures and (ahead + own) * self.pace > self.patience_s:
            raise self._refuse(place.pictures, own)

    def _refuse(self, pictures: int, work: float) -> Overloaded:
        """The refusal of pictures that would take `work` seconds as measured."""
        now, own = time.monotonic(), work * self.pace
        room = max(own, self.wait_s + own - self.patience_s)  # until so much is done that they fit
        self._promised = max(self._promised, now + room) + own
        self._promised = min(self._promised, now + LONGEST_RETRY_S)
        return Overloaded(
            f"{self.pending} pictures are waiting, about {self.wait_s:.1f} s of work; send this request again later.",
            retry_after=math.ceil(self._promised - now),
        )

    def _add(self, pictures: int, work: float) -> None:
        self.pending += pictures
        self.work = self.work + work if self.pending else 0.0  # no rounding is left over
        metrics.pending_pictures.set(self.pending)

    def _learn(self, pace: float, pictures: int) -> None:
        weight = 1 - (1 - SMOOTHING) ** pictures
        self.pace += weight * (pace - self.pace)
