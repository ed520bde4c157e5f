"""The way of a picture through the runners, and what is left to score here.

Features and VAE run at the same time; then the memory bank gets the patches and Mahalanobis the pooled features.
Only the runners that a product's detectors need are called.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ood_runners import images
from ood_runners.batches import CALL
from ood_runners.errors import OODError
from ood_runners.features import LOAD, POOLED_PREFIX, Features, Scores
from ood_runners.gateway.calls import Item, Runner
from ood_runners.gateway.served import Served, ServedPart
from ood_runners.gateway.timing import Timing
from ood_runners.telemetry import metrics, tracing

Outcome = dict[str, Scores] | OODError


@dataclass(frozen=True)
class Graph:
    """The four runners.

    Attributes
    ----------
    features : pictures to patches, pooled features and logits
    vae, memory_bank, mahalanobis : to the scores of the detector of that name
    """

    features: Runner
    vae: Runner
    memory_bank: Runner
    mahalanobis: Runner

    @property
    def runners(self) -> tuple[Runner, ...]:
        """All of them."""
        return (self.features, self.vae, self.memory_bank, self.mahalanobis)

    async def load(self, served: Served, deadline: float) -> None:
        """Have all runners load the version at the same time; what fails is told by the first picture.

        `deadline` is a time of ``time.monotonic()``.
        """

        async def ask(runner: Runner, tag: str) -> None:
            with suppress(OODError):
                await runner.infer([{"tag": tag, LOAD: True}], deadline)

        await asyncio.gather(*(ask(runner, part.tag) for part in served.parts for runner in self._needed(part)))

    def _needed(self, part: ServedPart) -> list[Runner]:
        of_scorers = {"vae": self.vae, "memory_bank": self.memory_bank, "mahalanobis": self.mahalanobis}
        needed = [runner for name, runner in of_scorers.items() if name in part.scorers]
        return [self.features, *needed] if part.scorers.keys() - {"vae"} else needed

    async def scores(
        self, served: Served, pictures: Sequence[NDArray[np.uint8]], deadline: float, timing: Timing
    ) -> list[Outcome]:
        """Raw scores of each picture by each of the version's detectors, or the error of a picture that failed.

        Parameters
        ----------
        served : the version that every hop answers with
        pictures : uint8 (h, w, 3) each, at the version's input size
        deadline : a time of ``time.monotonic()``
        """
        found = await asyncio.gather(*(self._part(part, pictures, deadline, timing) for part in served.parts))
        return [_joined(outcomes) for outcomes in zip(*found, strict=True)]

    async def _part(
        self, part: ServedPart, pictures: Sequence[NDArray[np.uint8]], deadline: float, timing: Timing
    ) -> list[Outcome]:
        """The scores of one part, of pictures that are of its size or larger."""
        if any(picture.shape[:2] != part.size for picture in pictures):
            pictures = await asyncio.to_thread(lambda: [images.resize(picture, part.size) for picture in pictures])
        chunks = [
            _Chunk(self, part, pictures[start : start + CALL], deadline, timing)
            for start in range(0, len(pictures), CALL)
        ]
        outcomes = await asyncio.gather(*(chunk.score() for chunk in chunks))
        return [outcome for chunk in outcomes for outcome in chunk]


@dataclass
class _Chunk:
    """Pictures that travel together; a picture that fails on the way leaves its error and the others go on."""

    graph: Graph
    part: ServedPart
    pictures: Sequence[NDArray[np.uint8]]
    deadline: float
    timing: Timing
    found: dict[int, dict[str, Scores]] = field(default_factory=dict)
    failed: dict[int, OODError] = field(default_factory=dict)

    async def score(self) -> list[Outcome]:
        detectors = self.part.scorers
        rows = range(len(self.pictures))
        self.found = {row: {} for row in rows}
        pictures: dict[int, Item] = {row: {"pictures": picture} for row, picture in enumerate(self.pictures)}
        ways = []
        if detectors.keys() - {"vae"}:
            ways.append(self._through_features(pictures))
        if "vae" in detectors:
            ways.append(self._detect("vae", self.graph.vae, pictures))
        await asyncio.gather(*ways)
        return [self.failed.get(row) or self._named(self.found[row]) for row in rows]

    def _named(self, found: Mapping[str, Scores]) -> dict[str, Scores]:
        return {self.part.scorers[detector]: scores for detector, scores in found.items()}

    async def _through_features(self, pictures: Mapping[int, Item]) -> None:
        features = await self._call("features", self.graph.features, pictures)
        if not features:
            return
        hops = []
        if "memory_bank" in self.part.scorers:
            patches = {row: {"patches": item["patches"]} for row, item in features.items()}
            hops.append(self._detect("memory_bank", self.graph.memory_bank, patches))
        if "mahalanobis" in self.part.scorers:
            pooled = {row: _pooled(item) for row, item in features.items()}
            hops.append(self._detect("mahalanobis", self.graph.mahalanobis, pooled))
        hops.append(self._detect_here(features))
        await asyncio.gather(*hops)

    async def _detect_here(self, features: Mapping[int, Item]) -> None:
        """The detectors that cost less than a hop."""
        for name, detector in self.part.local.items():
            with self.timing.stage(name):
                # In a thread: some heads multiply by megabytes, and other requests wait for this one's thread.
                scores = await asyncio.to_thread(detector.score, Features.from_items(list(features.values())))
            for i, row in enumerate(features):
                self.found[row][name] = scores[i : i + 1]

    async def _detect(self, name: str, runner: Runner, items: Mapping[int, Item]) -> None:
        for row, item in (await self._call(name, runner, items)).items():
            self.found[row][name] = _scores(item)

    async def _call(self, stage: str, runner: Runner, items: Mapping[int, Item]) -> dict[int, Item]:
        """The answers by row, without those that failed."""
        answers: Sequence[Item | OODError]
        start = time.perf_counter()
        try:
            with self.timing.stage(stage):
                shared = {"tag": self.part.tag} | tracing.baggage()
                answers = await runner.infer([shared | item for item in items.values()], self.deadline)
        except OODError as error:
            answers = [error] * len(items)
        took = time.perf_counter() - start
        answered: dict[int, Item] = {}
        for row, answer in zip(items, answers, strict=True):
            if isinstance(answer, OODError):
                self.failed[row] = answer
            else:
                answered[row] = answer
        if answered:
            computed = max(float(answer.get("seconds", 0.0)) for answer in answered.values())
            metrics.queue_seconds.labels(stage).observe(max(took - computed, 0.0))
        return answered


def _joined(outcomes: Sequence[Outcome]) -> Outcome:
    """One picture's scores of all parts, or the first error among them."""
    scores: dict[str, Scores] = {}
    for outcome in outcomes:
        if isinstance(outcome, OODError):
            return outcome
        scores |= outcome
    return scores


def _pooled(item: Item) -> Item:
    return {name: array for name, array in item.items() if name.startswith(POOLED_PREFIX)}


def _scores(item: Item) -> Scores:
    """One picture's scores as they come over the wire."""

    def row(name: str, dtype: type[np.generic]) -> Any:
        return None if item.get(name) is None else np.asarray(item[name], dtype)[np.newaxis]

    return Scores(row("score", np.float32), row("map", np.float32), row("predicted", np.int64))
