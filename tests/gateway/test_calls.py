"""The client of a runner against a server that misbehaves on purpose."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import bentoml
import numpy as np
import pytest
from _bentoml_impl.client import RemoteProxy
from aiohttp import web

from ood_runners.errors import ArtifactError, DeadlineExceeded, OODError, Overloaded
from ood_runners.gateway import calls
from ood_runners.gateway.calls import Runner
from ood_runners.wire.frames import MEDIA_TYPE, encode
from ood_runners.wire.transport import framed

Handler = Callable[[web.Request, int], Awaitable[web.StreamResponse]]


@framed
@bentoml.service
class Echo:
    @bentoml.api(batchable=True)
    def infer(self, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return items


class Answers:
    """What became of a call, and how often the server was asked."""

    def __init__(self) -> None:
        self.value: list[dict[str, Any] | OODError] = []
        self.error: OODError | None = None
        self.asked = 0
        self.ready: bool | None = None


def call(handler: Handler, *, ready: bool = True, seconds: float = 5.0, missed: bool = False) -> Answers:
    """Call a runner whose n-th request is answered by ``handler(request, n)``.

    With `missed`, the runner is not ready when it is first asked, while the call is on its way.
    """
    result = Answers()
    probes = iter([not missed])

    async def infer(request: web.Request) -> web.StreamResponse:
        await request.read()
        result.asked += 1
        return await handler(request, result.asked)

    async def readyz(_: web.Request) -> web.Response:
        return web.Response(status=200 if next(probes, ready) and ready else 503)

    async def go() -> None:
        app = web.Application()
        app.router.add_post("/infer", infer)
        app.router.add_get("/readyz", readyz)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        Echo.inject_config()  # as BentoML does when it serves
        proxy: Any = RemoteProxy(f"tcp://127.0.0.1:{port}", service=Echo, media_type=MEDIA_TYPE)
        echo, deadline = Runner("Echo", proxy), time.monotonic() + seconds
        try:
            async with proxy._async:
                items = [{"tag": "a", "x": np.arange(3)}, {"tag": "a", "x": np.arange(3) + 1}]
                first = asyncio.create_task(echo.infer(items, deadline))
                if missed:
                    await asyncio.sleep(0.3)
                    assert not await echo.is_ready(0.2)
                try:
                    result.value = await first
                except OODError as error:
                    result.error = error
                result.ready = await echo.is_ready()
        finally:
            await runner.cleanup()

    asyncio.run(go())
    return result


async def answer(request: web.Request, _: int) -> web.Response:
    items = [{"score": np.float32(1)}, {"error": {"code": "artifact_refused", "message": "m"}}]
    return web.Response(body=encode(items))


async def drop(request: web.Request, _: int) -> web.Response:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def hang(request: web.Request, _: int) -> web.Response:
    await asyncio.sleep(30)
    return web.Response()


def test_answers_come_in_order_and_errors_as_errors() -> None:
    result = call(answer)
    assert result.value[0] == {"score": np.float32(1)}
    assert isinstance(result.value[1], ArtifactError)
    assert result.value[1].message == "m"


@pytest.mark.parametrize("broken", [1, 2])
def test_a_broken_connection_is_tried_again(broken: int) -> None:
    async def at_last(request: web.Request, count: int) -> web.Response:
        return await (drop if count <= broken else answer)(request, count)

    result = call(at_last)
    assert (result.error, result.asked, len(result.value)) == (None, broken + 1, 2)


def test_a_runner_that_keeps_breaking_is_away() -> None:
    result = call(drop)
    assert isinstance(result.error, Overloaded)
    assert result.asked == 3


def test_a_late_runner_that_lives_is_past_the_deadline() -> None:
    assert isinstance(call(hang, seconds=1.2).error, DeadlineExceeded)


def test_a_late_runner_that_broke_the_connection_before_was_away() -> None:
    async def then_hang(request: web.Request, count: int) -> web.StreamResponse:
        return await (drop if count == 1 else hang)(request, count)

    error = call(then_hang, seconds=1.2).error
    assert isinstance(error, Overloaded)
    assert "away" in error.message


def test_a_late_runner_that_missed_a_probe_meanwhile_was_away() -> None:
    error = call(hang, missed=True, seconds=1.2).error
    assert isinstance(error, Overloaded)
    assert "away" in error.message


def test_a_late_runner_that_does_not_live_is_away() -> None:
    assert isinstance(call(hang, ready=False, seconds=1.2).error, Overloaded)


@pytest.mark.parametrize(("status", "kind"), [(503, Overloaded), (504, DeadlineExceeded), (500, OODError)])
def test_a_runners_own_failures(status: int, kind: type[OODError]) -> None:
    async def fail(request: web.Request, _: int) -> web.Response:
        return web.json_response({"error": "x"}, status=status)

    result = call(fail)
    assert type(result.error) is kind
    assert result.asked == 1


def test_a_key_that_a_runner_is_about_to_read_is_shown_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "KEY_PAUSE_S", 0.01)

    async def at_last(request: web.Request, count: int) -> web.StreamResponse:
        return web.Response(status=401) if count == 1 else await answer(request, count)

    result = call(at_last)
    assert (result.error, result.asked, len(result.value)) == (None, 2, 2)


def test_a_runner_with_other_keys_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "KEY_PAUSE_S", 0.01)

    async def refuse(request: web.Request, _: int) -> web.StreamResponse:
        return web.Response(status=401)

    result = call(refuse)
    assert isinstance(result.error, Overloaded)
    assert result.ready is False
    assert call(answer).ready is True
