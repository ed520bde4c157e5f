from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ood_runners.gateway.calls import Runner
from ood_runners.gateway.gateway import SILENT_S, Gateway
from ood_runners.gateway.graph import Graph
from ood_runners.settings import Settings


class Gone:
    """The client of a runner that answers nothing."""

    @property
    def to_async(self) -> Gone:
        return self

    async def is_ready(self, timeout: float | None = None) -> bool:
        raise ConnectionRefusedError


@pytest.mark.parametrize(("elsewhere", "alive"), [(True, True), (False, False)])
def test_a_gateway_is_replaced_for_a_runner_beside_it_only(elsewhere: bool, alive: bool) -> None:
    """A new container would start a runner beside the gateway again, and not one on another host."""
    runners: list[Any] = [Runner(name, Gone(), elsewhere) for name in "abcd"]
    for runner in runners:
        runner._answered -= SILENT_S + 1
    gateway = Gateway(Graph(*runners), Settings())
    assert asyncio.run(gateway.is_alive()) is alive
    assert asyncio.run(gateway.is_ready()) is False
