"""A request that cannot be served is refused before its body is read."""

from __future__ import annotations

import time
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ood_runners.api.errors import answer
from ood_runners.api.limits import DRAIN_BYTES, Body
from ood_runners.errors import OODError

# A body of this size is on its way already, most of the time: it is thrown away, and the connection stays.
SMALL = 2**20


class Door:
    """ASGI middleware: asks, before a posted form is read, whether any could be taken on.

    Whoever is refused gets the answer whole, and no reset: a small body is read and thrown away first, unparsed. A
    large one, or one of unknown size, is answered at once; what is still coming is thrown away within limits, and then
    the connection is closed.

    Parameters
    ----------
    app : the application behind it
    refusal : why no request can be taken on now, or None
    upload_s : seconds that a refused body may still take to come
    """

    def __init__(self, app: ASGIApp, refusal: Callable[[], OODError | None], upload_s: float) -> None:
        self.app = app
        self.refusal = refusal
        self.upload_s = upload_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        error = self.refusal() if scope["type"] == "http" and scope["method"] == "POST" else None
        if error is None:
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        body = Body(receive, DRAIN_BYTES, time.monotonic() + self.upload_s)
        held = headers.get("expect", "").lower() == "100-continue"  # it will not be sent unless it is asked for
        length = headers.get("content-length", "")
        if not held and length.isdigit() and int(length) <= SMALL:
            await body.drain()
        refused = answer(error)
        if body.read:
            await refused(scope, receive, send)
            return
        refused.headers["Connection"] = "close"

        async def send_but_the_end(message: Message) -> None:
            await send({**message, "more_body": True} if message["type"] == "http.response.body" else message)

        await refused(scope, receive, send_but_the_end)
        if not held:
            await body.drain()
        await send({"type": "http.response.body", "body": b"", "more_body": False})
