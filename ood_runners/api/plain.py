"""The errors of BentoML's own routes in the shape of ours."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ood_runners.api.errors import answer
from ood_runners.errors import MethodNotAllowed, NotFound, OODError

ERRORS: dict[int, OODError] = {
    404: NotFound("There is nothing at this path; the page at / shows what there is."),
    405: MethodNotAllowed("This path is not asked in this way; the page at / shows how."),
}


class PlainErrors:
    """ASGI middleware: ``{"error": {"code", "message"}}`` in the place of "Not Found" and "Method Not Allowed"."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        replaced = False

        async def send_ours(message: Message) -> None:
            nonlocal replaced
            start = message["type"] == "http.response.start" and message["status"] in ERRORS
            if start and Headers(raw=message["headers"]).get("content-type", "").startswith("text/plain"):
                replaced = True
                await answer(ERRORS[message["status"]])(scope, receive, send)
            if not replaced:
                await send(message)

        await self.app(scope, receive, send_ours)
