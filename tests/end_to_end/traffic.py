"""Requests in numbers, and the processes of a server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import psutil


@dataclass(frozen=True)
class Answer:
    """What became of a request: `status` is 0 for one without an answer, `picture` the index of what was sent."""

    status: int
    body: Any
    picture: int
    seconds: float
    retry_after: str | None = None


async def send(http: httpx.AsyncClient, pictures: Sequence[bytes], i: int) -> Answer:
    """Post one of `pictures` to the product "parts"."""
    start = time.monotonic()
    files = {"image": ("a.jpg", pictures[i % len(pictures)])}
    try:
        answer = await http.post("/detect", files=files, data={"product": "parts"})
    except httpx.TransportError as error:
        return Answer(0, repr(error), i % len(pictures), time.monotonic() - start)
    took, retry_after = time.monotonic() - start, answer.headers.get("retry-after")
    return Answer(answer.status_code, answer.json(), i % len(pictures), took, retry_after)


async def load(url: str, pictures: Sequence[bytes], requests: int, clients: int) -> list[Answer]:
    """`requests` requests from `clients` clients, each of which sends its next one when it has an answer."""
    left = iter(range(requests))
    answers: list[Answer] = []

    async def client(http: httpx.AsyncClient) -> None:
        for i in left:
            answers.append(await send(http, pictures, i))

    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        await asyncio.gather(*(client(http) for _ in range(clients)))
    return answers


async def paced(url: str, pictures: Sequence[bytes], a_second: float, until: asyncio.Event) -> list[Answer]:
    """`a_second` requests a second, whether or not those before are answered, until the event."""
    tasks: list[asyncio.Task[Answer]] = []
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=httpx.Limits(max_connections=None)) as http:
        start = time.monotonic()
        while not until.is_set():
            tasks.append(asyncio.create_task(send(http, pictures, len(tasks))))
            await asyncio.sleep(max(0.0, start + len(tasks) / a_second - time.monotonic()))
        return list(await asyncio.gather(*tasks))


def processes(server: Any) -> list[psutil.Process]:
    """All processes of a server."""
    top = psutil.Process(server.process.pid)
    return [top, *top.children(recursive=True)]


def process_of(server: Any, service: str) -> psutil.Process:
    """The process that runs one service of it."""
    [found] = [one for one in processes(server) if service in " ".join(one.cmdline())]
    return found


def in_progress(server: Any) -> float:
    """How many requests to /detect it is at."""
    lines = server.http.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if 'request_in_progress{endpoint="/detect"' in line)
