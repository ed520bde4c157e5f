from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated

import httpx
import pytest
from fastapi import FastAPI, File, Form, UploadFile

from ood_runners.api import errors, limits
from ood_runners.api.limits import BodyLimits
from ood_runners.errors import ArtifactError, Overloaded

LIMIT = 10_000


def application(upload_s: float = 5.0) -> FastAPI:
    app = FastAPI()
    errors.install(app)
    app.add_middleware(BodyLimits, max_bytes=LIMIT, upload_s=upload_s)

    @app.post("/size")
    async def size(
        image: Annotated[UploadFile, File()], alpha: Annotated[float | None, Form(gt=0, lt=1)] = None
    ) -> int:
        return len(await image.read())

    @app.get("/fail/{kind}")
    async def fail(kind: str) -> None:
        raise {"overloaded": Overloaded("busy"), "refused": ArtifactError("damaged"), "bug": KeyError("x")}[kind]

    return app


def client(app: FastAPI) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://server")


def send(app: FastAPI, **request: object) -> httpx.Response:
    async def go() -> httpx.Response:
        async with client(app) as http:
            return await http.post("/size", **request)  # type: ignore[arg-type]

    return asyncio.run(go())


async def chunks(count: int, size: int, pause: float = 0.0) -> AsyncIterator[bytes]:
    head = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    yield head
    for _ in range(count):
        await asyncio.sleep(pause)
        yield b"x" * size
    yield b"\r\n--b--\r\n"


FORM = {"content-type": "multipart/form-data; boundary=b"}


def test_a_body_within_the_limit_passes() -> None:
    answer = send(application(), content=chunks(4, 2000), headers=FORM)
    assert (answer.status_code, answer.json()) == (200, 8000)


def test_a_declared_length_over_the_limit_is_refused() -> None:
    answer = send(application(), files={"image": ("a", b"x" * (LIMIT + 1))})
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "too_large"


def test_an_undeclared_length_over_the_limit_is_refused() -> None:
    answer = send(application(), content=chunks(20, 1000), headers=FORM)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "too_large"


def test_what_is_sent_past_the_limit_is_read_only_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "DRAIN_BYTES", 5000)
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        async for chunk in chunks(1000, 1000):
            sent += len(chunk)
            yield chunk

    assert send(application(), content=endless(), headers=FORM).status_code == 413
    assert sent < LIMIT + 5000 + 2000


def test_a_body_that_does_not_come_in_time_is_given_up() -> None:
    answer = send(application(upload_s=0.1), content=chunks(3, 10, pause=5), headers=FORM)
    assert answer.status_code == 408
    assert answer.json()["error"]["code"] == "too_slow"


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        ({"files": {"image": (None, "http://127.0.0.1:9/picture.png")}}, 400, "malformed"),
        ({"data": {"image": "http://127.0.0.1:9/picture.png"}}, 400, "malformed"),
        ({"json": {"image": "http://127.0.0.1:9/picture.png"}}, 400, "malformed"),
        ({"content": b"x"}, 400, "malformed"),
        ({"content": b"no form", "headers": FORM}, 400, "malformed"),
        ({"content": b"", "headers": {"content-type": "multipart/form-data"}}, 400, "malformed"),
        ({"files": {"other": ("a", b"x")}}, 400, "malformed"),
        ({"files": {"image": ("a", b"x")}, "data": {"alpha": "2"}}, 422, "bad_parameter"),
        ({"files": {"image": ("a", b"x")}, "data": {"alpha": "nan"}}, 422, "bad_parameter"),
        ({"files": {"image": ("a", b"x")}, "data": {"alpha": "much"}}, 422, "bad_parameter"),
    ],
)
def test_bad_forms(request_: dict[str, object], status: int, code: str) -> None:
    answer = send(application(), **request_)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "status", "code", "retry"),
    [
        ("/fail/overloaded", 503, "overloaded", "1"),
        ("/fail/refused", 503, "artifact_refused", "1"),
        ("/fail/bug", 500, "internal", None),
        ("/nowhere", 404, "not_found", None),
        ("/size", 405, "method_not_allowed", None),
    ],
)
def test_every_failure_has_one_shape(path: str, status: int, code: str, retry: str | None) -> None:
    async def go() -> httpx.Response:
        async with client(application()) as http:
            return await http.get(path)

    answer = asyncio.run(go())
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.headers.get("retry-after") == retry
    assert set(answer.json()) == {"error"}
    assert set(answer.json()["error"]) == {"code", "message"}
