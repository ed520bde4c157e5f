from __future__ import annotations

import asyncio
import re

import bentoml
import httpx
from opentelemetry import context, trace
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from ood_runners.api.later import Later
from ood_runners.telemetry import paths

TRACE = "0af7651916cd43dd8448eb211c80319c"


async def known(request: Request) -> PlainTextResponse:
    trace_id = trace.get_current_span().get_span_context().trace_id
    return PlainTextResponse(request.url.path, headers={"trace": format(trace_id, "032x")})


mounted = Later()  # as the public service mounts its own


@bentoml.service(name="PathsService")
@bentoml.asgi_app(mounted, path="/")
class PathsService:
    def __init__(self) -> None:
        mounted.become(Starlette(routes=[Route("/known", known)]))

    @bentoml.api
    def method(self, text: str) -> str:
        return text


def test_unknown_paths_are_one_path_and_requests_keep_their_own_trace() -> None:
    paths.install()
    app = PathsService.to_asgi()  # type: ignore[attr-defined]

    async def go() -> list[httpx.Response]:
        # As on a connection that is kept alive, which remembers the request before.
        earlier = trace.NonRecordingSpan(trace.SpanContext(1, 1, is_remote=False))
        context.attach(trace.set_span_in_context(earlier))
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://server") as http,
        ):
            answers = [await http.get(f"/no/such/path/{i}") for i in range(3)]
            answers.append(await http.get("/known", headers={"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}))
            answers.append(await http.post("/method", json={"text": "said"}))
        return answers

    answers = asyncio.run(go())
    assert [answer.status_code for answer in answers] == [404, 404, 404, 200, 200]
    assert answers[3].headers["trace"] == TRACE
    # The application sees the path that was asked for.
    assert [answer.text for answer in answers[-2:]] == ["/known", "said"]
    from prometheus_client import generate_latest

    lines = [
        line for line in generate_latest().decode().splitlines() if line.startswith("bentoml_service_request_total")
    ]
    counts = {re.search(r'endpoint="([^"]*)"', line)[1]: line for line in lines if " 0.0" not in line}  # type: ignore[index]
    assert set(counts) == {"other", "/known", "/method"}
    assert counts["other"].endswith(" 3.0")
