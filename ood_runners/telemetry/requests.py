"""Which request is being worked on: an id that goes with it through all processes and comes back in the answer."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "X-Request-Id"
KEY = "request_id"  # in the items that runners get
SANE = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_current: ContextVar[str] = ContextVar("request_id", default="")


def current() -> str:
    """The id of the request, or the ids of the requests with commas, that this code works for; may be empty."""
    return _current.get()


@contextmanager
def working_for(items: Iterable[Mapping[str, Any]]) -> Iterator[None]:
    """Within the block, `current` is the ids that `items` carry."""
    token = _current.set(",".join(dict.fromkeys(str(item[KEY]) for item in items if item.get(KEY))))
    try:
        yield
    finally:
        _current.reset(token)


class RequestIds:
    """ASGI middleware: takes the client's ``X-Request-Id`` if it is short and plain, or makes one, and answers it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        sent = Headers(scope=scope).get(HEADER, "")
        own = sent if SANE.fullmatch(sent) else uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = own
            await send(message)

        token = _current.set(own)
        try:
            await self.app(scope, receive, send_with_id)
        finally:
            _current.reset(token)
