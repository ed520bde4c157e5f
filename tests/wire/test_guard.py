from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anyio
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from ood_runners.wire import guard
from ood_runners.wire.frames import MEDIA_TYPE
from ood_runners.wire.guard import PICKLE, NoPickle, OnlyFrames


async def read(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(len(await request.body())))


def client(kind: type[NoPickle]) -> TestClient:
    app = Starlette(routes=[Route("/infer", read, methods=["GET", "POST", "PUT"])])
    return TestClient(kind(app), raise_server_exceptions=False)


def code(answer: Any) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


@pytest.mark.parametrize("kind", [PICKLE, PICKLE.upper(), f" {PICKLE} ; charset=x", f"text/plain, {PICKLE}"])
@pytest.mark.parametrize("door", [NoPickle, OnlyFrames])
@pytest.mark.parametrize("method", ["GET", "POST", "PUT"])
def test_pickle_is_refused_however_it_is_called(door: type[NoPickle], kind: str, method: str) -> None:
    answer = client(door).request(method, "/infer", content=b"x", headers={"content-type": kind})
    assert code(answer) == (415, "unsupported_media_type")


@pytest.mark.parametrize("door", [NoPickle, OnlyFrames])
def test_a_second_content_type_does_not_hide_the_first(door: type[NoPickle]) -> None:
    headers = [("content-type", MEDIA_TYPE), ("content-type", PICKLE)]
    assert client(door).post("/infer", content=b"x", headers=headers).status_code == 415


def test_a_gateway_reads_everything_else() -> None:
    assert client(NoPickle).post("/infer", content=b"x", headers={"content-type": "text/plain"}).text == "1"


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=a", "", MEDIA_TYPE + "; a=b"])
def test_a_runner_reads_frames_only(kind: str) -> None:
    door = client(OnlyFrames)
    assert code(door.post("/infer", content=b"x", headers={"content-type": kind})) == (415, "unsupported_media_type")
    assert door.post("/infer", content=b"x", headers={"content-type": MEDIA_TYPE}).text == "1"
    assert door.get("/infer").text == "0"  # probes and metrics


def test_the_size_of_a_frame_is_known_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_FRAME", 2**20)
    door, headers = client(OnlyFrames), {"content-type": MEDIA_TYPE}
    assert door.post("/infer", content=bytes(2**20), headers=headers).text == str(2**20)
    assert code(door.post("/infer", content=bytes(2**20 + 1), headers=headers)) == (413, "too_large")

    def chunked() -> Iterator[bytes]:
        yield b"x"

    assert code(door.post("/infer", content=chunked(), headers=headers)) == (400, "malformed")


def test_a_refused_body_is_not_read() -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("the body was read")

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/infer", "headers": [(b"content-type", PICKLE.encode())]}
    anyio.run(NoPickle(Starlette()), scope, receive, send)
    assert sent[0]["status"] == 415
    assert (b"connection", b"close") in sent[0]["headers"]
