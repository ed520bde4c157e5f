from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ood_runners.errors import DeadlineExceeded, Overloaded
from ood_runners.gateway.calls import Runner
from ood_runners.gateway.gateway import SILENT_S, Ask, Gateway
from ood_runners.gateway.graph import Graph
from ood_runners.gateway.timing import Timing
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


@pytest.mark.parametrize(("requests", "kind"), [(1, DeadlineExceeded), (3, Overloaded)])
def test_only_who_is_late_alone_is_past_the_deadline(
    monkeypatch: pytest.MonkeyPatch, requests: int, kind: type[Exception]
) -> None:
    async def never(*_: Any) -> None:
        await asyncio.sleep(60)

    async def go() -> list[Any]:
        runners: list[Any] = [Runner(name, Gone()) for name in "abcd"]
        gateway = Gateway(Graph(*runners), Settings(deadline_s=1))
        monkeypatch.setattr(gateway.versions, "get", never)
        asked = (gateway.judge([b""], Ask("parts"), Timing()) for _ in range(requests))
        return await asyncio.gather(*asked, return_exceptions=True)

    assert [type(error) for error in asyncio.run(go())] == [kind] * requests
