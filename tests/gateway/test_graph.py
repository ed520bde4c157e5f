from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import cast

import pytest

from ood_runners.errors import Overloaded
from ood_runners.gateway.calls import Item, Runner
from ood_runners.gateway.graph import Graph
from ood_runners.gateway.served import Served


class Asked(Runner):
    """Notes what it is asked for, and answers only once as many are asked at the same time as are expected."""

    def __init__(self, name: str, together: asyncio.Barrier, fails: bool = False) -> None:
        self.name, self.items, self._together, self._fails = name, [], together, fails  # type: ignore[var-annotated]

    async def infer(self, items: list[Item], deadline: float) -> list[Item]:  # type: ignore[override]
        self.items += items
        await self._together.wait()
        if self._fails:
            raise Overloaded("away")
        return [{}]


@pytest.mark.parametrize(
    ("detectors", "expected"),
    [
        (("memory_bank", "mahalanobis", "softmax", "vae"), ["features", "vae", "memory_bank", "mahalanobis"]),
        (("memory_bank",), ["features", "memory_bank"]),
        (("softmax",), ["features"]),
        (("vae",), ["vae"]),
    ],
)
def test_all_runners_that_a_version_needs_load_it_at_once(detectors: tuple[str, ...], expected: list[str]) -> None:
    async def run() -> None:
        together = asyncio.Barrier(len(expected))
        graph = Graph(
            *(Asked(name, together, name == "vae") for name in ("features", "vae", "memory_bank", "mahalanobis"))
        )
        parts = [SimpleNamespace(tag="ood-parts:v1", scorers={name: name for name in detectors})]
        await asyncio.wait_for(graph.load(cast(Served, SimpleNamespace(parts=parts)), time.monotonic() + 9), 5)
        asked = [cast(Asked, runner) for runner in graph.runners]
        assert [one.name for one in asked if one.items] == expected
        assert all(item == {"tag": "ood-parts:v1", "load": True} for one in asked for item in one.items)

    asyncio.run(run())
