"""From the files of a request to what they are judged to be."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ood_runners import images
from ood_runners.calibration import Judgement
from ood_runners.calibration.calibration import ANOMALOUS
from ood_runners.errors import DeadlineExceeded, OODError, Overloaded, TooLarge
from ood_runners.features import Scores
from ood_runners.gateway.admission import Admission, Place
from ood_runners.gateway.graph import Graph
from ood_runners.gateway.served import FUSED, Served
from ood_runners.gateway.timing import Timing
from ood_runners.gateway.versions import Versions
from ood_runners.settings import Settings
from ood_runners.telemetry import logs, metrics

logger = logging.getLogger(f"bentoml.{__name__}")  # configured by BentoML when it serves
Result = TypeVar("Result")
# Share of the deadline for what is on its way: a machine may become half as fast as it was, and nobody is late.
PATIENCE = 0.5
# The runners' deadline is earlier than the request's by this much, or by this share of a short one: time to find out
# whether a late runner is away, and to judge.
RESERVE_S, RESERVE = 2.0, 0.3
SILENT_S = 60.0
DECODERS = 4  # pictures decoded at once, at most: a large one takes several hundred megabytes


@dataclass(frozen=True)
class Ask:
    """What a request wants to know, besides its pictures; None leaves it to the product."""

    product: str | None = None
    version: str | None = None
    alpha: float | None = None


@dataclass(frozen=True)
class Picture:
    """A decoded picture.

    Attributes
    ----------
    size : height and width as sent
    resized : uint8 (h, w, 3) at the version's input size
    sent : uint8 (height, width, 3), where it was asked to be kept
    """

    size: tuple[int, int]
    resized: NDArray[np.uint8]
    sent: NDArray[np.uint8] | None


@dataclass(frozen=True)
class Judged:
    """A judged picture; `map` is its calibrated map, float32 (h, w) at the input size, where there is one."""

    picture: Picture
    judgement: Judgement
    map: NDArray[np.float32] | None


class Gateway:
    """Decodes, calls the runners, judges.

    Everything that computes runs in a bounded pool of threads, so that the event loop stays free to accept, refuse
    and time out.

    Parameters
    ----------
    graph : the runners
    settings : deadlines and limits
    """

    def __init__(self, graph: Graph, settings: Settings) -> None:
        self.versions = Versions(graph, settings.pins)
        self._graph = graph
        self._settings = settings
        self._limits = images.Limits()
        self._admission = Admission(settings.max_pending, PATIENCE * settings.deadline_s)
        self._pool = ThreadPoolExecutor(min(DECODERS, os.cpu_count() or 1), thread_name_prefix="gateway")

    def start(self) -> None:
        """Begin to load and warm up, and to follow the production records; returns at once."""
        self.versions.start()

    async def stop(self) -> None:
        """Stop following the records."""
        await self.versions.stop()
        self._pool.shutdown(wait=False)

    def refusal(self) -> OODError | None:
        """Why no request can be taken on now, whatever it holds; None where one can."""
        return self._admission.refusal()

    async def is_ready(self) -> bool:
        """Whether the versions are warm, those that are pinned were not refused, and every runner answers."""
        if not (self.versions.warm and self.versions.complete):
            return False
        return all(await asyncio.gather(*(runner.is_ready() for runner in self._graph.runners)))

    async def is_alive(self) -> bool:
        """Whether no runner beside it has been silent for longer than it takes to start one.

        Where BentoML does not start a dead runner again (in a container), this is what has the container replaced.
        """
        beside = [runner for runner in self._graph.runners if not runner.elsewhere]
        await asyncio.gather(*(runner.is_ready() for runner in beside))
        return all(runner.silent_s < SILENT_S for runner in beside)

    async def judge(
        self, files: Sequence[bytes], ask: Ask, timing: Timing, *, keep: bool = False
    ) -> tuple[Served, list[Judged | OODError]]:
        """Judge the pictures in `files`, in order, each on its own: an error in the place of a bad one.

        With `keep`, the decoded pictures come back as well, at their own size.

        Raises
        ------
        TooLarge, Overloaded, DeadlineExceeded
            For the request as a whole.
        OODError
            As `Versions.get`, and for an `alpha` that the product cannot judge by.
        """
        if len(files) > self._settings.max_pictures:
            most = self._settings.max_pictures
            raise TooLarge(f"{len(files)} pictures in one request; send at most {most} at a time.")
        seconds = self._settings.deadline_s
        deadline = time.monotonic() + seconds - min(RESERVE_S, RESERVE * seconds)
        with self._admission.admit(len(files)) as place:
            try:
                async with asyncio.timeout(seconds):
                    served = await self.versions.get(ask.product, ask.version)
                    served.calibration.check_alpha(ask.alpha)
                    place.weigh(served.picture_s)
                    with timing.stage("decode"):
                        decoded = await asyncio.gather(*(self._decode(data, served.size, keep) for data in files))
                    pictures = {row: one for row, one in enumerate(decoded) if isinstance(one, Picture)}
                    resized = [picture.resized for picture in pictures.values()]
                    outcomes = await self._graph.scores(served, resized, deadline, timing)
                    of_row = dict(zip(pictures, outcomes, strict=True))
                    failed = {row: one for row, one in enumerate(decoded) if isinstance(one, OODError)}
                    failed |= {row: _late(one, place) for row, one in of_row.items() if isinstance(one, OODError)}
                    scored = {row: one for row, one in of_row.items() if not isinstance(one, OODError)}
                    place.served = bool(scored)
                    with timing.stage("judge"):
                        judged = await self.run(lambda: _judge(served, pictures, scored, ask.alpha))
                    results: dict[int, Judged | OODError] = {**failed, **judged}
                    _tell(served, results.values())
                    return served, [results[row] for row in range(len(files))]
            except TimeoutError:
                error = DeadlineExceeded(f"The request did not finish within {seconds:g} s; send it again later.")
                raise _late(error, place) from None

    async def _decode(self, data: bytes, size: tuple[int, int], keep: bool) -> Picture | OODError:
        def work() -> Picture:
            if not keep:
                resized, own_size = images.decode_at(data, size, self._limits)
                return Picture(own_size, resized, None)
            sent = images.decode(data, self._limits)
            return Picture(sent.shape[:2], images.resize(sent, size), sent)

        try:
            return await self.run(work)
        except OODError as error:
            return error

    async def run(self, work: Callable[[], Result]) -> Result:
        """Run `work` in the pool of threads."""
        asked = time.perf_counter()

        def start() -> Result:
            metrics.queue_seconds.labels("gateway").observe(time.perf_counter() - asked)
            return work()

        return await asyncio.get_running_loop().run_in_executor(self._pool, start)


def _late(error: OODError, place: Place) -> OODError:
    """`error`, unless it says that a request was too late by itself and others were on their way with it."""
    if isinstance(error, DeadlineExceeded) and place.shared:
        return Overloaded("There is more to do than can be finished in time; send this request again later.")
    return error


def _tell(served: Served, results: Collection[Judged | OODError]) -> None:
    """Count what became of a request's pictures, and log it."""
    judgements = [one.judgement for one in results if isinstance(one, Judged)]
    metrics.alpha.labels(served.product, served.version).set(served.calibration.alpha)
    for judgement in judgements:
        metrics.verdicts.labels(served.product, served.version, judgement.verdict).inc()
        p_values = {FUSED: judgement.p_value} | {name: one.p_value for name, one in judgement.detectors.items()}
        scores = {FUSED: judgement.score} | {name: one.score for name, one in judgement.detectors.items()}
        for name, (centre, width) in served.scales.items():
            metrics.p_values.labels(served.product, name).observe(p_values[name])
            metrics.relative_scores.labels(served.product, name).observe((scores[name] - centre) / width)
    for error in results:
        if isinstance(error, OODError):
            metrics.rejected_pictures.labels(error.code).inc()
    logs.event(
        logger,
        "judged",
        product=served.product,
        version=served.version,
        pictures=len(results),
        anomalous=sum(judgement.verdict == ANOMALOUS for judgement in judgements),
        rejected=len(results) - len(judgements),
        smallest_p=min((judgement.p_value for judgement in judgements), default=None),
    )


def _judge(
    served: Served, pictures: Mapping[int, Picture], scored: Mapping[int, Mapping[str, Scores]], alpha: float | None
) -> dict[int, Judged]:
    """Judge the scored pictures, by row."""
    if not scored:
        return {}
    joined = {name: Scores.concatenate([scores[name] for scores in scored.values()]) for name in served.detectors}
    judgements = served.calibration.judge(joined, alpha)
    maps: Sequence[NDArray[np.float32] | None] = [None] * len(scored)
    if served.calibration.localises:
        maps = list(served.calibration.anomaly_map(joined, served.size))
    rows = zip(scored, judgements, maps, strict=True)
    return {row: Judged(pictures[row], judgement, one) for row, judgement, one in rows}
