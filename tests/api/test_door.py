"""What is refused unread, over real connections: whoever is refused gets the whole answer and no reset."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import uvicorn
from fastapi import FastAPI, Request

from ood_runners.api import door
from ood_runners.api.door import Door
from ood_runners.errors import Overloaded


class Opening:
    """A server whose door is open or shut, and how many bodies were read behind it."""

    def __init__(self) -> None:
        self.shut = True
        self.read = 0
        app = FastAPI()

        @app.post("/size")
        async def size(request: Request) -> int:
            self.read += 1
            return len(await request.body())

        @app.get("/size")
        async def nothing() -> int:
            return 0

        app.add_middleware(
            Door, refusal=lambda: Overloaded("busy.", retry_after=7) if self.shut else None, upload_s=0.5
        )
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))

    def run(self) -> None:
        asyncio.run(self.server.serve([self.socket]))


@pytest.fixture(scope="module")
def running() -> Iterator[Opening]:
    opening = Opening()
    thread = threading.Thread(target=opening.run)
    thread.start()
    yield opening
    opening.server.should_exit = True
    thread.join(10)


@pytest.fixture
def shut(running: Opening) -> Opening:
    running.shut, running.read = True, 0
    return running


@contextmanager
def connected(opening: Opening) -> Iterator[socket.socket]:
    with socket.create_connection(opening.socket.getsockname(), timeout=5) as connection:
        yield connection


def head(length: int | None, *more: bytes, method: bytes = b"POST") -> bytes:
    size = b"Transfer-Encoding: chunked" if length is None else b"Content-Length: %d" % length
    return b"\r\n".join((method + b" /size HTTP/1.1", b"Host: a", size, *more)) + b"\r\n\r\n"


def answer(connection: socket.socket) -> bytes:
    """One whole answer with its body."""
    got = b""
    while b"}" not in got:
        part = connection.recv(65_536)
        assert part, got
        got += part
    return got


def test_a_small_body_is_refused_and_the_connection_stays(shut: Opening) -> None:
    with connected(shut) as connection:
        for _ in range(3):
            connection.sendall(head(5) + b"12345")
            got = answer(connection)
            assert got.startswith(b"HTTP/1.1 503 ")
            assert b"retry-after: 7" in got.lower()
            assert b'{"error":{"code":"overloaded","message":"busy."}}' in got
        assert shut.read == 0
        shut.shut = False
        connection.sendall(head(5) + b"12345")
        assert connection.recv(65_536).startswith(b"HTTP/1.1 200 ")
    assert shut.read == 1


def test_what_has_no_body_to_be_judged_is_let_in(shut: Opening) -> None:
    with connected(shut) as connection:
        connection.sendall(head(0, method=b"GET"))
        assert connection.recv(65_536).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "chunked"])
def test_a_large_body_is_answered_before_it_is_sent(shut: Opening, declared: bool) -> None:
    size = 3 * door.SMALL
    with connected(shut) as connection:
        connection.sendall(head(size if declared else None))
        got = answer(connection)  # nothing of the body is there yet
        assert got.startswith(b"HTTP/1.1 503 ")
        assert b"connection: close" in got.lower()
        # Sent all the same, as most clients do, it meets no reset.
        if declared:
            connection.sendall(b"x" * size)
        else:
            connection.sendall(b"%x\r\n" % size + b"x" * size + b"\r\n0\r\n\r\n")
        while connection.recv(65_536):
            pass  # what ends a chunked answer; then the server closes it
    assert shut.read == 0


def test_a_body_that_is_held_back_is_not_asked_for(shut: Opening) -> None:
    with connected(shut) as connection:
        connection.sendall(head(5, b"Expect: 100-continue"))
        got = answer(connection)
        assert got.startswith(b"HTTP/1.1 503 ")
        assert connection.recv(65_536) == b""


@pytest.mark.parametrize("size", [100, 3 * door.SMALL])
def test_a_body_that_never_comes_is_given_up(shut: Opening, size: int) -> None:
    with connected(shut) as connection:
        connection.sendall(head(size) + b"x")
        assert answer(connection).startswith(b"HTTP/1.1 503 ")
        assert connection.recv(65_536) == b""
