"""The fused profile: the runners' engines in the gateway's own process, with no hops between them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ood_runners.batches import largest_batch
from ood_runners.engines import AnyEngine, detector_engine, feature_engine
from ood_runners.gateway.calls import Item, Runner
from ood_runners.gateway.graph import Graph
from ood_runners.settings import Settings

STUCK_S = 60.0  # a batch that takes longer than loading a version and computing could


@dataclass(frozen=True)
class _Call:
    items: Sequence[Item]
    answers: asyncio.Future[list[Item]]


class LocalRunner(Runner):
    """An engine with a thread of its own, which takes what has gathered while it computed as its next batch.

    Batches form by themselves where there is load, and a single picture waits for nobody.

    Parameters
    ----------
    name : how messages and logs call it
    engine : computes
    max_batch : pictures computed at once; a call with more is computed whole
    """

    learns = False

    def __init__(self, name: str, engine: AnyEngine, max_batch: int) -> None:
        self.name, self.elsewhere = name, False
        self._answered = time.monotonic()
        self._engine = engine
        self._max_batch = max_batch
        self._waiting: deque[_Call] = deque()
        self._task: asyncio.Task[None] | None = None
        self._began = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)

    async def _persist(self, items: list[Item]) -> list[Item]:
        call = _Call(items, asyncio.get_running_loop().create_future())
        self._waiting.append(call)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work())
        return await call.answers

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while calls := self._gather():
            items = [item for call in calls for item in call.items]
            self._began = time.monotonic()
            try:
                answers = await loop.run_in_executor(self._thread, self._engine.infer, items)
            except BaseException as error:  # an engine answers; this is the process ending
                for call in calls:
                    if not call.answers.done():
                        call.answers.set_exception(error)
                raise
            start = 0
            for call in calls:
                if not call.answers.done():  # nobody waits for it any more
                    call.answers.set_result(answers[start : start + len(call.items)])
                start += len(call.items)

    def _gather(self) -> list[_Call]:
        """The calls of the next batch: at least one, if any waits."""
        calls: list[_Call] = []
        pictures = 0
        while self._waiting and (not calls or pictures + len(self._waiting[0].items) <= self._max_batch):
            call = self._waiting.popleft()
            if not call.answers.done():
                calls.append(call)
                pictures += len(call.items)
        return calls

    async def is_ready(self, timeout: float = 1.0) -> bool:
        """Whether it is idle, or computes and is not stuck."""
        if self._task is not None and not self._task.done() and time.monotonic() - self._began > STUCK_S:
            return False
        self._answered = time.monotonic()
        return True


def fused_graph(settings: Settings) -> Graph:
    """The graph in one process."""
    most = largest_batch(settings)

    def detector(name: str, label: str) -> LocalRunner:
        engine = detector_engine(name, settings.device, settings.memory_bytes, most)
        return LocalRunner(label, engine, most)

    features = feature_engine(settings.device, settings.memory_bytes, most)
    return Graph(
        features=LocalRunner("ResNet50Runner", features, most),
        vae=detector("vae", "VAERunner"),
        memory_bank=detector("memory_bank", "NearestNeighbourRunner"),
        mahalanobis=detector("mahalanobis", "MahalanobisRunner"),
    )
