"""Which version answers: follows the production records, takes a new version up aside, then swaps.

A request resolves its version once and sends that tag with every item, so it is answered wholly by the version
it started with. A version that is damaged, or that does not give its golden picture the scores it was stored with,
is refused: the reason is logged and listed, and the one before goes on answering.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import replace

from ood_runners.artifacts import list_versions, production, resolve, stamps
from ood_runners.artifacts.record import Stamp
from ood_runners.errors import (
    ArtifactError,
    BadParameter,
    DeadlineExceeded,
    MalformedRequest,
    NotFound,
    OODError,
    Overloaded,
)
from ood_runners.gateway.graph import Graph
from ood_runners.gateway.served import Served, load
from ood_runners.gateway.timing import Timing
from ood_runners.telemetry import metrics

logger = logging.getLogger(f"bentoml.{__name__}")  # configured by BentoML when it serves

POLL_S = 1.0
RETRY_S = 30.0
COLD_S = 60.0  # for loading a version in every runner and scoring its golden picture
KEPT = 64  # opened versions; in this process one is some hundred kilobytes
WARMED = 4  # products opened before the service is ready; the others are opened by their first request
# BentoML's dispatcher learns a runner's speed from its first 11 calls, which it does not batch.
TRAINING_CALLS = 12


class Versions:
    """The versions that can answer.

    Parameters
    ----------
    graph : scores the golden pictures
    pins : product to version; where there are any, the production records are not followed
    """

    def __init__(self, graph: Graph, pins: Mapping[str, str]) -> None:
        self._graph = graph
        self._pins = dict(pins)
        self._serving: dict[str, str] = {}
        self._refused: dict[str, str] = {}
        self._retry_at: dict[str, float] = {}
        self._stamps: dict[str, Stamp | None] = {}
        self._opened: OrderedDict[tuple[str, str], Served] = OrderedDict()
        self._opening: defaultdict[tuple[str, str], asyncio.Lock] = defaultdict(asyncio.Lock)
        self._following = asyncio.Lock()
        self._warm = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def warm(self) -> bool:
        """Whether the first look at the store is done and the versions it found are loaded."""
        return self._warm.is_set()

    @property
    def complete(self) -> bool:
        """Whether each pinned version answers; a service without pins answers with what there is."""
        return self._pins.keys() <= self._serving.keys()

    def start(self) -> None:
        """Load and warm up, then follow the records, in a task of its own."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """End that task."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def get(self, product: str | None, version: str | None = None) -> Served:
        """The version that answers a request, loaded.

        Raises
        ------
        MalformedRequest
            No product is named and there is not exactly one.
        NotFound
            No such product or version, or none in production.
        ArtifactError
            It was refused, and there is none before it.
        """
        await self._warm.wait()
        if product is None and len(self._serving) == 1:
            product = next(iter(self._serving))
        if product is not None and version is None and product not in self._serving:
            await self._follow()  # promoted less than a second ago, perhaps
        if product is None:
            raise self._unnamed()
        if version is not None:
            await asyncio.to_thread(_find, product, version)
            return await self._open(product, version)
        if product in self._serving:
            return await self._open(product, self._serving[product])
        if product in self._refused:
            raise ArtifactError(self._refused[product])
        if self._pins:
            raise NotFound(f"The product {product!r} is not served; this service is pinned to {', '.join(self._pins)}.")
        await asyncio.to_thread(_find, product, None)
        raise NotFound(f"The product {product!r} is not served yet; send this again in a second.")

    def listing(self) -> list[dict[str, object]]:
        """Each product in the store with its versions, the one in production, and the one that answers."""
        lines: dict[str, dict[str, object]] = {}
        for info in list_versions():
            line = lines.setdefault(
                info.product,
                {
                    "product": info.product,
                    "version": self._serving.get(info.product),
                    "production": self._pins.get(info.product),
                    "versions": [],
                    "refused": self._refused.get(info.product),
                },
            )
            line["versions"].append(info.version)  # type: ignore[attr-defined]
            if info.in_production and not self._pins:
                line["production"] = info.version
            if info.version == line["version"]:
                line["alpha"] = info.alpha
        for (product, version), served in list(self._opened.items()):
            if self._serving.get(product) == version and product in lines:
                lines[product]["detectors"] = list(served.detectors)
        return list(lines.values())

    def _unnamed(self) -> OODError:
        if not self._serving:
            return NotFound(
                "No product is in production; fit one with `python build_artifacts.py fit FOLDER --product NAME`."
            )
        return MalformedRequest(f"Name the product in the field 'product': {', '.join(sorted(self._serving))}.")

    async def _run(self) -> None:
        while True:
            try:
                await self._follow()
                if not self._warm.is_set():
                    self._warm.set()
                    await self._train()
            except Exception:
                logger.exception("The store could not be followed; tried again in %g s", POLL_S)
            self._warm.set()
            await asyncio.sleep(POLL_S)

    async def _follow(self) -> None:
        """Take up what the records say since the last look."""
        async with self._following:
            if self._pins:
                found: dict[str, Stamp | None] = dict.fromkeys(self._pins)
            else:
                found = dict(await asyncio.to_thread(stamps))
            for product in self._stamps.keys() - found.keys():
                for state in (self._stamps, self._serving, self._refused, self._retry_at):
                    state.pop(product, None)
            now = time.monotonic()
            due = [
                product
                for product, stamp in found.items()
                if product not in self._stamps
                or self._stamps[product] != stamp
                or now > self._retry_at.get(product, float("inf"))
            ]
            for product in sorted(due):
                await self._take_up(product, found[product])
            metrics.served_products.set(len(self._serving))
            metrics.refused_products.set(len(self._refused))

    async def _take_up(self, product: str, stamp: Stamp | None) -> None:
        before = self._serving.get(product)
        try:
            version = self._pins.get(product) or await asyncio.to_thread(production, product)
            if version is None:
                raise ArtifactError(f"The production record of {product!r} names no version.")
            if before is not None or len(self._opened) < WARMED:
                await self._open(product, version)
        except (Overloaded, DeadlineExceeded) as error:
            logger.warning("%s: %s Tried again in %g s.", product, error.message, POLL_S)
            return
        except OODError as error:
            if self._refused.get(product) != error.message:
                logger.error("%s: refused, %s goes on answering. %s", product, before or "nothing", error.message)
            self._refused[product] = error.message
            self._stamps[product], self._retry_at[product] = stamp, time.monotonic() + RETRY_S
            return
        self._stamps[product] = stamp
        self._refused.pop(product, None)
        self._retry_at.pop(product, None)
        self._serving[product] = version
        if before != version:
            logger.info("%s: %s answers now, before it %s", product, version, before or "none")

    async def _open(self, product: str, version: str) -> Served:
        """The version, loaded and proven on its golden picture."""
        key = (product, version)
        async with self._opening[key]:
            if key not in self._opened:
                served = await asyncio.to_thread(load, product, version)
                await self._graph.load(served, time.monotonic() + COLD_S)
                await self._prove(served)
                before = self._opened.get((product, self._serving.get(product, "")))
                if before is not None and before.size == served.size:  # requests are on their way: no time to measure
                    seconds = before.picture_s
                else:
                    seconds = await self._prove(served)  # once more, now that all is loaded
                self._opened[key] = replace(served, picture_s=seconds)
                while len(self._opened) > KEPT:
                    old, _ = self._opened.popitem(last=False)
                    self._opening.pop(old, None)
            self._opened.move_to_end(key)
            return self._opened[key]

    async def _prove(self, served: Served) -> float:
        """Score the golden picture through every runner, compare with what was stored at fit time; the seconds."""
        start = time.monotonic()
        [outcome] = await self._graph.scores(served, [served.golden], time.monotonic() + COLD_S, Timing())
        if isinstance(outcome, OODError):
            raise outcome
        served.check_golden(outcome)
        return time.monotonic() - start

    async def _train(self) -> None:
        """Let the runners learn their speed before there is a crowd; whoever comes meanwhile is served all the same."""
        if not any(runner.learns for runner in self._graph.runners):
            return
        for served in list(self._opened.values())[:1]:
            for _ in range(TRAINING_CALLS):
                await self._prove(served)


def _find(product: str, version: str | None) -> None:
    """Raise NotFound, with what there is, for a product or version that is not in the store."""
    try:
        resolve(product, version)
    except BadParameter as error:  # not even a name
        raise NotFound(error.message) from error
