"""Every failure in one shape: ``{"error": {"code", "message"}}`` with the status that fits."""

from __future__ import annotations

import asyncio
import logging
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from ood_runners.errors import BadParameter, DeadlineExceeded, MalformedRequest, OODError
from ood_runners.telemetry import metrics

if TYPE_CHECKING:
    from fastapi import FastAPI

logger = logging.getLogger(f"bentoml.{__name__}")  # configured by BentoML when it serves
HEADERS = {401: {"WWW-Authenticate": 'Bearer realm="ood-runners"'}}
CODES = {404: "not_found", 405: "method_not_allowed", 408: "too_slow", 413: "too_large"}
# Kinds of validation error that say that a field cannot be read at all, rather than that its value is out of range.
UNREADABLE = frozenset({"missing", "value_error", "json_invalid"})


def answer(error: OODError) -> JSONResponse:
    """The HTTP answer of an error."""
    metrics.rejected_requests.labels(error.code).inc()
    headers = HEADERS.get(error.status)
    if error.status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers = {"Retry-After": str(getattr(error, "retry_after", 1))}
    return JSONResponse({"error": error.to_dict()}, error.status, headers)


def install(app: FastAPI) -> None:
    """Give `app` the handlers."""
    from fastapi.exceptions import RequestValidationError  # a runner, whose guards answer errors too, has no use for it

    app.add_exception_handler(OODError, _ours)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _bug)


async def _ours(_: Request, error: Any) -> JSONResponse:
    return answer(error)


async def _invalid(_: Request, error: Any) -> JSONResponse:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"][1:])
    if first["type"] == "missing":
        return answer(MalformedRequest(f"The field {field!r} is missing; send a multipart/form-data form with it."))
    if first["type"] in UNREADABLE:
        return answer(MalformedRequest(f"The field {field!r} must hold a file, not text; nothing is fetched by URL."))
    return answer(BadParameter(f"The field {field!r} is out of range: {first['msg'].lower()}."))


async def _http(_: Request, error: Any) -> JSONResponse:
    code = CODES.get(error.status_code, MalformedRequest.code)
    metrics.rejected_requests.labels(code).inc()
    body = {"error": {"code": code, "message": str(error.detail)}}
    return JSONResponse(body, error.status_code, getattr(error, "headers", None))


async def _bug(request: Request, error: Any) -> JSONResponse:
    if isinstance(error, asyncio.TimeoutError):
        return answer(DeadlineExceeded("The request did not finish within its deadline."))
    logger.error("%s failed", request.url.path, exc_info=error)
    return answer(OODError("Something failed that should not have; the server's log says what."))
