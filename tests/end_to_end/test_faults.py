"""What goes wrong on a machine and in a network, tried on a real server."""

from __future__ import annotations

import asyncio
import signal
import socket
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from tests.artifacts.samples import mounted
from tests.end_to_end.traffic import Answer, in_progress, load, persistent, process_of, processes_of

DEADLINE_S, UPLOAD_S = 6, 2


@pytest.fixture(scope="module")
def faulty(serve: Any, fitted: Any, many: list[bytes]) -> Iterator[Any]:
    """A server with short limits that the tests here share; each leaves it whole."""
    with serve(fitted.home, f"deadline_s={DEADLINE_S}", f"upload_s={UPLOAD_S}") as server:
        asyncio.run(load(server.url, many, 48, 3))  # it learns what a picture takes when several are on their way
        yield server


def all_succeed(server: Any, pictures: Sequence[bytes], requests: int = 24) -> None:
    # So few at a time that a slow machine need not refuse any.
    statuses = Counter(answer.status for answer in asyncio.run(load(server.url, pictures, requests, 3)))
    assert statuses == {200: requests}


def during(server: Any, pictures: Sequence[bytes], clients: int, fault: Any) -> list[Answer]:
    """The answers to `clients` clients who send without a pause, with a fault in their midst."""

    async def run() -> list[Answer]:
        running = asyncio.create_task(load(server.url, pictures, 16 * clients, clients))
        while await asyncio.to_thread(in_progress, server) < clients / 8:  # a slow machine refuses most of them
            assert not running.done()
            await asyncio.sleep(0.01)
        await asyncio.to_thread(fault)
        return await running

    return asyncio.run(run())


def seconds_until(server: Any, status: int, limit: float) -> float:
    """How long it takes /readyz to answer with `status`."""
    start = time.monotonic()
    while server.http.get("/readyz").status_code != status:
        assert time.monotonic() < start + limit, f"/readyz was not {status} within {limit} s:\n{server.tail()}"
        time.sleep(0.05)
    return time.monotonic() - start


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ResNet50Runner", "VAERunner", "NearestNeighbourRunner", "MahalanobisRunner"])
def test_a_killed_runner_costs_at_most_what_was_on_its_way(faulty: Any, many: list[bytes], name: str) -> None:
    noticed: list[str] = []

    def kill() -> None:
        killed, start = process_of(faulty, name), time.monotonic()
        killed.kill()
        while not noticed:
            assert time.monotonic() < start + 5, f"nobody noticed that {name} was killed:\n{faulty.tail()}"
            # An answer counts for a second, so a later 200 is not that of the one that was killed.
            others = time.monotonic() > start + 1.5 and [one for one in processes_of(faulty, name) if one != killed]
            if faulty.http.get("/readyz").status_code == 503:
                noticed.append("not ready")
            elif others:  # started again within the time that a probe waits, and so it is who answered
                noticed.append("ready again")

    answers = during(faulty, many, 32, kill)
    assert {answer.status for answer in answers} <= {200, 503}, answers
    assert noticed
    assert max(answer.seconds for answer in answers) < DEADLINE_S + 2
    seconds_until(faulty, 200, 30)
    all_succeed(faulty, many)


@pytest.mark.slow
def test_a_frozen_runner_keeps_nobody_past_the_deadline(faulty: Any, many: list[bytes]) -> None:
    frozen = process_of(faulty, "MahalanobisRunner")
    frozen.send_signal(signal.SIGSTOP)
    try:
        answers = asyncio.run(load(faulty.url, many, 16, 16))
        seconds_until(faulty, 503, 2)
        assert faulty.http.get("/livez").status_code == 200  # it is too soon to give it up
    finally:
        frozen.send_signal(signal.SIGCONT)
    assert {answer.status for answer in answers} == {503}, answers
    assert max(answer.seconds for answer in answers) < DEADLINE_S + 2
    seconds_until(faulty, 200, 10)
    all_succeed(faulty, many)


@pytest.mark.slow
def test_a_crowd_at_a_slow_machine_is_refused_and_nobody_is_late(faulty: Any, many: list[bytes]) -> None:
    """A runner gets a tenth of a core: a picture takes many times what was measured when the service started."""
    runner, ended = process_of(faulty, "ResNet50Runner"), threading.Event()

    def slow_down() -> None:
        while not ended.is_set():
            runner.suspend()
            time.sleep(0.09)
            runner.resume()
            time.sleep(0.01)

    slowing = threading.Thread(target=slow_down)
    slowing.start()
    try:
        asyncio.run(load(faulty.url, many, 8, 2))
        answers = asyncio.run(load(faulty.url, many, 64, 64))
        later, _ = asyncio.run(persistent(faulty.url, many, 40, 64))
    finally:
        ended.set()
        slowing.join()
    for statuses in (Counter(answer.status for answer in part) for part in (answers, later)):
        print(statuses)
        # How many are refused depends on the machine; nobody waits in vain on any.
        assert statuses[200] and set(statuses) <= {200, 503}
    # It has learned to be slow, and learns from the first ones that it is not any more.
    faulty.wait_for(lambda: in_progress(faulty) == 0, 30)
    assert {answer.status for answer in asyncio.run(load(faulty.url, many, 40, 1))} == {200}
    all_succeed(faulty, many)


def test_a_killed_gateway_comes_back(faulty: Any, normal: bytes, many: list[bytes]) -> None:
    body = body_of(normal)
    with connected(faulty) as connection:
        connection.sendall(head_of(len(body)) + body[:100])
        faulty.wait_for(lambda: in_progress(faulty) == 1, UPLOAD_S)
        process_of(faulty, "OODService").kill()
    faulty.wait_for(faulty.is_ready, 30)
    assert in_progress(faulty) == 0  # what was on its way is lost, and not counted for ever
    all_succeed(faulty, many)


BOUNDARY = b"frontier"


def body_of(picture: bytes) -> bytes:
    """A form with a picture of the product "parts"."""
    parts = [b'name="product"\r\n\r\nparts', b'name="image"; filename="a.png"\r\n\r\n' + picture]
    lines = [b"--" + BOUNDARY + b"\r\nContent-Disposition: form-data; " + part + b"\r\n" for part in parts]
    return b"".join(lines) + b"--" + BOUNDARY + b"--\r\n"


def head_of(length: int) -> bytes:
    kind = b"multipart/form-data; boundary=" + BOUNDARY
    return b"POST /detect HTTP/1.1\r\nHost: a\r\nContent-Type: " + kind + b"\r\nContent-Length: %d\r\n\r\n" % length


@contextmanager
def connected(server: Any) -> Iterator[socket.socket]:
    address = server.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1])), timeout=20) as connection:
        yield connection


def reset(connection: socket.socket) -> None:
    """Close at once and without a farewell, as a machine does that goes away."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0], ids=["after the head", "midway", "before the answer"])
def test_clients_that_go_away_leave_nothing_behind(faulty: Any, normal: bytes, many: list[bytes], share: float) -> None:
    body, before = body_of(normal), faulty.log.read_text()
    for _ in range(30):
        with connected(faulty) as connection:
            connection.sendall(head_of(len(body)) + body[: int(share * len(body))])
            reset(connection)
    faulty.wait_for(lambda: in_progress(faulty) == 0, 10)
    all_succeed(faulty, many)
    assert "Traceback" not in faulty.log.read_text()[len(before) :]


def test_a_slow_upload_is_cut_and_holds_no_place(faulty: Any, normal: bytes) -> None:
    body = body_of(normal)
    # As many slow clients as there are places: 256.
    with ExitStack() as stack:
        slow = [stack.enter_context(connected(faulty)) for _ in range(256)]
        start = time.monotonic()
        for connection in slow:
            connection.sendall(head_of(len(body)) + body[:100])
        assert faulty.detect(normal, product="parts")["verdict"] == "normal"
        slow[0].settimeout(0.2)
        answer, sent = b"", 100
        while not answer:  # some bytes each second, so that it never stands still
            slow[0].sendall(body[sent : sent + 1])
            sent += 1
            assert time.monotonic() < start + UPLOAD_S + 5
            try:
                answer = slow[0].recv(65_536)
            except TimeoutError:
                continue
        for connection in slow:
            connection.settimeout(10)
            while more := connection.recv(65_536):  # until the server closes it
                answer += more
            assert answer.startswith(b"HTTP/1.1 408 "), answer
            assert b"connection: close" in answer.lower()
            assert b'"too_slow"' in answer
            answer = b""
        assert time.monotonic() < start + UPLOAD_S + 10
    assert faulty.detect(normal, product="parts")["verdict"] == "normal"


def test_a_store_that_becomes_read_only_goes_on_being_served(serve: Any, fitted: Any, normal: bytes) -> None:
    # Beside these, BentoML keeps the figures of its metrics.
    folders = [fitted.home / name for name in ("models", "ood-production")]
    with ExitStack() as stack:
        for folder in folders:
            stack.enter_context(mounted(folder, "--bind", str(folder)))
        with serve(fitted.home) as server:
            for folder in folders:
                subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
                with pytest.raises(OSError, match="Read-only"):
                    (folder / "probe").touch()
            assert server.detect(normal, product="parts")["version"] == fitted.first
            # Nor does a version that nobody has asked for yet need to write.
            assert server.detect(normal, product="parts", version=fitted.second)["version"] == fitted.second
            assert server.http.get("/readyz").status_code == 200
            assert len(server.http.get("/products").json()["products"]) == 2


@pytest.mark.slow
def test_a_crowd_is_refused_at_once_and_told_when_to_come_back(serve: Any, fitted: Any, many: list[bytes]) -> None:
    places = 12

    with serve(fitted.home, f"max_pending={places}") as server:
        asyncio.run(load(server.url, many, 60, places))
        calm, calm_rate = asyncio.run(persistent(server.url, many, 300, places))
        crowd, crowd_rate = asyncio.run(persistent(server.url, many, 300, 6 * places))
    assert {answer.status for answer in calm} == {200}
    refused = [answer.seconds for answer in crowd if answer.status == 503]
    taken = [answer.seconds for answer in crowd if answer.status == 200]
    waited, told = (sorted(seconds)[len(seconds) // 2] for seconds in (taken, refused))
    print(
        f"{calm_rate:.1f}/s, in a crowd {crowd_rate:.1f}/s; {len(refused)} refused after {told:.3f} s, not {waited:.3f}"
    )
    assert {answer.status for answer in crowd} == {200, 503}
    assert len(refused) > len(taken) / 8
    assert told < waited
    assert max(float(answer.retry_after) for answer in crowd if answer.retry_after) > 1
