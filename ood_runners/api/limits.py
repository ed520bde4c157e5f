"""Limits on a request's body, held before anything reads it."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ood_runners.api.errors import answer
from ood_runners.errors import TooLarge

# A client that is still sending does not read: what it sends past the limit is thrown away up to here, so that
# it comes to see the answer, and then the connection is closed.
DRAIN_BYTES = 256 * 2**20


class BodyLimits:
    """ASGI middleware: 413 for a body that is too large and 408 for one that comes too slowly.

    Parameters
    ----------
    app : the application behind it
    max_bytes : of a body; the form around a picture included
    upload_s : seconds from the first byte to the last
    """

    def __init__(self, app: ASGIApp, max_bytes: int, upload_s: float) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.upload_s = upload_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = Body(receive, self.max_bytes, time.monotonic() + self.upload_s)
        headers = Headers(scope=scope)
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self.max_bytes:
            if headers.get("expect", "").lower() != "100-continue":
                await body.drain()
            await answer(TooLarge(body.message))(scope, receive, send)
            return
        await self.app(scope, body.receive, send)


class Body:
    """Counts what comes and watches the clock while it comes.

    Parameters
    ----------
    receive : of the request
    max_bytes : that may come
    until : a time of ``time.monotonic()`` by which it must have come
    """

    def __init__(self, receive: Receive, max_bytes: int, until: float) -> None:
        self._receive = receive
        self._left = max_bytes
        self._until = until
        self._more = True
        self.message = f"The body is larger than {max_bytes // 2**20} MiB; send fewer or smaller pictures."

    @property
    def read(self) -> bool:
        """Whether all of it has come."""
        return not self._more

    async def receive(self) -> Message:
        """The next message; HTTPException 413 or 408 past a limit."""
        if not self._more:
            return await self._receive()  # after the body: waits for the client to go away
        message = await self._next()
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            await self.drain()
            raise HTTPException(TooLarge.status, self.message)
        return message

    async def _next(self) -> Message:
        try:
            async with asyncio.timeout(self._until - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            # Otherwise the server would go on reading what this client trickles.
            close = {"Connection": "close"}
            raise HTTPException(408, "The body did not arrive in time; send it faster.", close) from None
        self._more = message["type"] == "http.request" and bool(message.get("more_body"))
        return message

    async def drain(self) -> None:
        """Read and drop what is still coming, within bounds."""
        drained = 0
        while self._more and drained < DRAIN_BYTES:
            try:
                message: dict[str, Any] = dict(await self._next())
            except HTTPException:
                return
            drained += len(message.get("body", b""))
