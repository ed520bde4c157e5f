"""Many clients at once, versions that change below them, and a runner that dies."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import psutil
import pytest


async def load(url: str, pictures: Sequence[bytes], requests: int, clients: int) -> list[tuple[int, Any]]:
    """The status and body of each of `requests` requests from `clients` clients; 0 for one without an answer."""
    left = iter(range(requests))
    answers: list[tuple[int, Any]] = [(0, None)] * requests

    async def client(http: httpx.AsyncClient) -> None:
        for i in left:
            files = {"image": ("a.jpg", pictures[i % len(pictures)])}
            try:
                answer = await http.post("/detect", files=files, data={"product": "parts"})
                answers[i] = answer.status_code, answer.json()
            except httpx.TransportError as error:
                answers[i] = 0, repr(error)

    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        await asyncio.gather(*(client(http) for _ in range(clients)))
    return answers


def test_no_request_is_lost_at_32_clients(server: Any, many: list[bytes]) -> None:
    alone = [server.detect(data, product="parts") for data in many]
    answers = asyncio.run(load(server.url, many, 200, 32))
    assert Counter(status for status, _ in answers) == {200: 200}
    for i, (_, answer) in enumerate(answers):
        expected = alone[i % len(many)]
        assert answer["score"] == pytest.approx(expected["score"], rel=1e-3)
        assert answer["verdict"] == expected["verdict"]


def test_a_version_promoted_under_load_is_taken_up_without_a_gap(
    server: Any, fitted: Any, many: list[bytes], command_line: Callable[..., str]
) -> None:
    scores = {
        version: [server.detect(data, product="parts", version=version)["score"] for data in many]
        for version in (fitted.first, fitted.second)
    }

    async def switch() -> list[tuple[int, Any]]:
        running = asyncio.create_task(load(server.url, many, 150, 4))
        await asyncio.to_thread(command_line, "promote", f"parts:{fitted.second}", home=fitted.home)
        return await running

    try:
        answers = asyncio.run(switch())
        server.wait_for(lambda: server.detect(many[0], product="parts")["version"] == fitted.second, 5)
    finally:
        command_line("rollback", "parts", home=fitted.home)
    assert Counter(status for status, _ in answers) == {200: 150}
    for i, (_, answer) in enumerate(answers):
        assert answer["score"] == pytest.approx(scores[answer["version"]][i % len(many)], rel=1e-3)
    server.wait_for(lambda: server.detect(many[0], product="parts")["version"] == fitted.first, 5)


def runner_process(server: Any, name: str) -> psutil.Process:
    found = [
        child
        for child in psutil.Process(server.process.pid).children(recursive=True)
        if name in " ".join(child.cmdline())
    ]
    assert len(found) == 1
    return found[0]


@pytest.mark.slow
def test_a_killed_runner_loses_nothing_but_what_it_held(serve: Any, fitted: Any, many: list[bytes]) -> None:
    with serve(fitted.home) as server:
        runner_process(server, "NearestNeighbourRunner").send_signal(signal.SIGSTOP)
        server.wait_for(lambda: server.http.get("/readyz").status_code == 503, 3)

        async def kill() -> list[tuple[int, Any]]:
            running = asyncio.create_task(load(server.url, many, 32, 32))
            await asyncio.sleep(0.5)
            runner_process(server, "NearestNeighbourRunner").kill()
            return await running

        statuses = Counter(status for status, _ in asyncio.run(kill()))
        assert set(statuses) <= {200, 503}, statuses
        server.wait_for(server.is_ready, 30)
        assert {status for status, _ in asyncio.run(load(server.url, many, 24, 8))} == {200}


def test_more_than_can_be_served_is_refused_at_once(serve: Any, fitted: Any, many: list[bytes]) -> None:
    with serve(fitted.home, "max_pending=2") as server:
        answers = asyncio.run(load(server.url, many, 100, 16))
        statuses = Counter(status for status, _ in answers)
        assert set(statuses) == {200, 503}
        refusals = [answer["error"] for status, answer in answers if status == 503]
        assert {error["code"] for error in refusals} == {"overloaded"}


def test_an_orderly_end_under_load(serve: Any, fitted: Any, many: list[bytes]) -> None:
    with serve(fitted.home) as server:

        async def end() -> list[tuple[int, Any]]:
            running = asyncio.create_task(load(server.url, many, 24, 24))
            while in_progress(await asyncio.to_thread(server.http.get, "/metrics")) < 12:
                await asyncio.sleep(0.01)
            server.process.send_signal(signal.SIGTERM)
            return await running

        answers = asyncio.run(end())
        statuses = Counter(status for status, _ in answers)
        assert statuses[200] >= 12, answers
        # What had been taken on is answered; what came after finds the door closed.
        assert set(statuses) <= {200, 0}, answers
        try:
            assert server.process.wait(timeout=30) == 0
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running 30 s after SIGTERM:\n{server.tail()}")


def in_progress(metrics: httpx.Response) -> float:
    lines = [line for line in metrics.text.splitlines() if 'request_in_progress{endpoint="/detect"' in line]
    return sum(float(line.rpartition(" ")[2]) for line in lines)
