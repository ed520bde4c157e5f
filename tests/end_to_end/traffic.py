"""Requests in numbers, and the processes of a server."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import aiohttp
import psutil
from urllib3 import encode_multipart_formdata


@dataclass(frozen=True)
class Answer:
    """What became of a request: `status` is 0 for one without an answer, `picture` the index of what was sent."""

    status: int
    body: Any
    picture: int
    seconds: float
    retry_after: str | None = None


@cache
def form_of(picture: bytes, product: str) -> tuple[bytes, str]:
    """A form with a picture, and its media type; made once, for senders are to cost little."""
    body, kind = encode_multipart_formdata({"image": ("a.jpg", picture), "product": product})
    return body, kind


def clients_of(url: str) -> aiohttp.ClientSession:
    """A client with as many connections as are wanted."""
    return aiohttp.ClientSession(
        url, connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=60, connect=60)
    )


async def send(http: aiohttp.ClientSession, pictures: Sequence[bytes], i: int, product: str = "parts") -> Answer:
    """Post one of `pictures` to a product."""
    start = time.monotonic()
    body, kind = form_of(pictures[i % len(pictures)], product)
    try:
        async with http.post("/detect", data=body, headers={"Content-Type": kind}) as answer:
            content = await answer.json()
    except (aiohttp.ClientError, TimeoutError) as error:
        return Answer(0, repr(error), i % len(pictures), time.monotonic() - start)
    took, retry_after = time.monotonic() - start, answer.headers.get("retry-after")
    return Answer(answer.status, content, i % len(pictures), took, retry_after)


async def load(url: str, pictures: Sequence[bytes], requests: int, clients: int) -> list[Answer]:
    """`requests` requests from `clients` clients, each of which sends its next one when it has an answer."""
    left = iter(range(requests))
    answers: list[Answer] = []

    async def client(http: aiohttp.ClientSession) -> None:
        for i in left:
            answers.append(await send(http, pictures, i))

    async with clients_of(url) as http:
        await asyncio.gather(*(client(http) for _ in range(clients)))
    return answers


async def persistent(url: str, pictures: Sequence[bytes], served: int, clients: int) -> tuple[list[Answer], float]:
    """As `load`, of clients who come back when they were told to, until `served` are answered with 200; the rate."""
    answers: list[Answer] = []
    left = served
    start = time.monotonic()
    done = asyncio.Event()

    async def client(http: aiohttp.ClientSession) -> None:
        nonlocal left
        while True:
            answers.append(answer := await send(http, pictures, len(answers)))
            left -= answer.status == 200
            if left <= 0:
                done.set()
            if answer.status == 503:
                await asyncio.sleep(float(answer.retry_after or "nan"))

    async with clients_of(url) as http:
        running = [asyncio.create_task(client(http)) for _ in range(clients)]
        await done.wait()
        seconds = time.monotonic() - start
        for one in running:
            one.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    return answers, served / seconds


async def paced(
    url: str, pictures: Sequence[bytes], a_second: float, until: asyncio.Event, product: str
) -> list[Answer]:
    """`a_second` requests a second, whether or not those before are answered, until the event."""
    tasks: list[asyncio.Task[Answer]] = []
    async with clients_of(url) as http:
        start = time.monotonic()
        while not until.is_set():
            tasks.append(asyncio.create_task(send(http, pictures, len(tasks), product)))
            await asyncio.sleep(max(0.0, start + len(tasks) / a_second - time.monotonic()))
        return list(await asyncio.gather(*tasks))


def processes(server: Any) -> list[psutil.Process]:
    """All processes of a server."""
    top = psutil.Process(server.process.pid)
    return [top, *top.children(recursive=True)]


def process_of(server: Any, service: str) -> psutil.Process:
    """The process that runs one service of it."""
    [found] = processes_of(server, service)
    return found


def processes_of(server: Any, service: str) -> list[psutil.Process]:
    """The processes that run one service of it: none while it is being started again."""
    found = []
    for one in processes(server):
        with suppress(psutil.Error):  # it has ended meanwhile
            if service in " ".join(one.cmdline()):
                found.append(one)
    return found


def in_progress(server: Any) -> float:
    """How many requests to /detect it is at."""
    lines = server.http.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if 'request_in_progress{endpoint="/detect"' in line)


def alike(one: Any, other: Any) -> bool:
    """Whether two answers, or parts of them, are the same but for timing and for how float32 rounds sums."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = {*one, *other} - {"timing_ms"}
        return all(name in one and name in other and alike(one[name], other[name]) for name in names)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-4)
    return bool(one == other)
