from __future__ import annotations

import asyncio
import logging

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from ood_runners.telemetry import logs, requests
from ood_runners.telemetry.requests import RequestIds, working_for


def ask(headers: dict[str, str]) -> httpx.Response:
    async def view(_: Request) -> PlainTextResponse:
        return PlainTextResponse(requests.current())

    async def go() -> httpx.Response:
        app = RequestIds(Starlette(routes=[Route("/", view)]))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as http:
            return await http.get("/", headers=headers)

    return asyncio.run(go())


def test_a_sane_id_is_taken_and_answered() -> None:
    answer = ask({"X-Request-Id": "line-3.part_000817"})
    assert answer.headers["x-request-id"] == answer.text == "line-3.part_000817"


@pytest.mark.parametrize("sent", [None, "", "x" * 65, "a b", "a,b", "a\tb", 'a"} {"level":"ERROR', "é", "%0a"])
def test_another_is_replaced(sent: str | None) -> None:
    answer = ask({} if sent is None else {"X-Request-Id": sent.encode("latin-1")})  # type: ignore[dict-item]
    assert requests.SANE.fullmatch(answer.text)
    assert answer.text != sent
    assert answer.headers.get_list("x-request-id") == [answer.text]


def test_each_request_has_its_own() -> None:
    assert ask({}).text != ask({}).text
    assert requests.current() == ""


def test_a_batch_works_for_all_its_requests() -> None:
    with working_for([{"request_id": "a"}, {"request_id": "b"}, {"request_id": "a"}, {}]):
        assert requests.current() == "a,b"
        with working_for([{"request_id": "b"}]):
            assert requests.current() == "b"
    assert requests.current() == ""


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> logging.Logger:
    logger = logging.getLogger("bentoml")
    before, level, propagate = logger.handlers, logger.level, logger.propagate
    logger.handlers, logger.propagate = [], False
    logger.setLevel(logging.INFO)
    yield logger
    logger.handlers, logger.propagate = before, propagate
    logger.setLevel(level)


def handler() -> logging.Handler:
    import sys

    from bentoml._internal.log import TRACED_LOG_FORMAT, TraceRecordFilter

    made = logging.StreamHandler(sys.stdout)
    made.addFilter(TraceRecordFilter())
    made.setFormatter(logging.Formatter(TRACED_LOG_FORMAT))
    return made


def test_text_ends_with_the_request(lines: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    lines.addHandler(handler())
    logs.configure("text")
    logs.configure("text")
    with working_for([{"request_id": "abc"}]):
        logs.event(lines, "judged", product="parts", pictures=2)
    lines.info("no request")
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("judged product=parts pictures=2 (request=abc)")
    assert second.endswith("no request")


def test_json_is_one_object_a_line(lines: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    lines.addHandler(handler())
    logs.configure("json")
    with working_for([{"request_id": "abc"}]):
        logs.event(lines, "judged", product="parts", pictures=2)
        try:
            raise ValueError("two\nlines")
        except ValueError:
            lines.exception("failed")
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first.pop("time")
    assert first.pop("component")
    assert first == {
        "level": "INFO",
        "logger": "bentoml",
        "message": "judged product=parts pictures=2",
        "request_id": "abc",
        "product": "parts",
        "pictures": 2,
    }
    assert "two\nlines" in second["exc_info"]
