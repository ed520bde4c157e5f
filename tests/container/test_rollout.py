"""Three containers behind a proxy: a new image takes over while requests come, and one is killed."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.container.conftest import Images
from tests.container.podman import Container, remove, start, wait_for
from tests.container.proxy import Proxy
from tests.end_to_end.traffic import Answer, clients_of, send

pytestmark = [pytest.mark.container, pytest.mark.timeout(900)]
CLIENTS = 12
# One process each, for three of them share this machine's cores; whoever dies is started again, as in a pod.
OPTIONS = ("--env", "OOD_PROFILE=fused", "--restart", "on-failure")
PAUSE_S = 2.0  # as the manifests' preStop, between the last request and SIGTERM


async def ask(url: str, pictures: list[bytes], least: int, enough: asyncio.Event) -> list[Answer]:
    """The answers to `CLIENTS` clients in the order they came: at least `least`, and until the event is set."""
    answers: list[Answer] = []
    sent = 0

    async def client() -> None:
        nonlocal sent
        while sent < least or not enough.is_set():
            sent += 1
            answers.append(await send(http, pictures, sent))

    async with clients_of(url) as http:
        await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return answers


@pytest.fixture(scope="module")
def three(images: Images, service_proxy: Proxy) -> Iterator[list[Container]]:
    """Three containers that get requests. A test may put others in their places; those are removed in the end."""
    containers = [start(images.first, *OPTIONS) for _ in range(3)]
    try:
        for container in containers:
            container.wait_until_ready()
            service_proxy.add(container)
        yield containers
    finally:
        with ThreadPoolExecutor() as pool:
            list(pool.map(remove, containers))


def replace(containers: list[Container], image: str, proxy: Proxy) -> list[int]:
    """As a Deployment with `maxUnavailable` 0 and `maxSurge` 1 does; the exit statuses of those that went."""
    statuses = []
    for old in list(containers):
        containers.append(new := start(image, *OPTIONS))
        new.wait_until_ready()
        proxy.add(new)
        proxy.drain(old)
        time.sleep(PAUSE_S)
        statuses.append(old.stop())
        proxy.forget(old)
        containers.remove(old)
        remove(old)
    return statuses


def test_a_rolling_replacement_loses_no_request(
    three: list[Container], images: Images, service_proxy: Proxy, many: list[bytes]
) -> None:
    async def roll() -> tuple[list[Answer], list[int]]:
        done = asyncio.Event()
        asking = asyncio.create_task(ask(service_proxy.url, many, 2000, done))
        try:
            statuses = await asyncio.to_thread(replace, three, images.second, service_proxy)
        finally:
            done.set()
        return await asking, statuses

    answers, statuses = asyncio.run(roll())
    assert statuses == [0, 0, 0]
    assert len(answers) >= 2000
    failed = [answer for answer in answers if answer.status != 200]
    assert not failed, (len(failed), failed[:5])
    versions = [answer.body["version"] for answer in answers]
    assert set(versions) == {images.versions.first, images.versions.second}
    assert versions[0] == images.versions.first
    assert set(versions[-CLIENTS:]) == {images.versions.second}


def test_one_that_is_killed_takes_along_no_more_than_it_had(
    three: list[Container], service_proxy: Proxy, many: list[bytes]
) -> None:
    killed = three[0]

    async def kill() -> list[Answer]:
        done = asyncio.Event()
        asking = asyncio.create_task(ask(service_proxy.url, many, 100, done))
        try:
            await asyncio.sleep(1)
            first = killed.state()["Pid"]
            killed.end(signal.SIGKILL)
            # It comes back by itself, and gets requests again.
            await asyncio.to_thread(wait_for, lambda: killed.state()["Pid"] not in (0, first), 60, killed.log)
            await asyncio.to_thread(killed.wait_until_ready)
            await asyncio.to_thread(wait_for, lambda: service_proxy.is_up(killed), 30, killed.log)
        finally:
            done.set()
        return await asking

    answers = asyncio.run(kill())
    statuses = Counter(answer.status for answer in answers)
    assert statuses[200] >= len(answers) - CLIENTS, statuses
    assert {answer.status for answer in answers[-CLIENTS:]} == {200}
