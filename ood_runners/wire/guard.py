"""What is refused at the door of a port, before anything reads the body."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ood_runners.errors import MalformedRequest, OODError, TooLarge, UnsupportedMediaType
from ood_runners.telemetry import metrics
from ood_runners.wire.frames import MEDIA_TYPE

PICKLE = "application/vnd.bentoml+pickle"
# Eight pictures of 1,024 px with their patches are some 60 MB.
MAX_FRAME = 256 * 2**20
BODILESS = frozenset({"GET", "HEAD", "OPTIONS"})


class NoPickle:
    """ASGI middleware: 415 for BentoML's pickle, which runs code in whoever reads it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    def refusal(self, scope: Scope) -> OODError | None:
        """Why a request is not let in."""
        if any(PICKLE in kind.lower() for kind in Headers(scope=scope).getlist("content-type")):
            return UnsupportedMediaType("Pickle is not read here.")
        return None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        error = self.refusal(scope) if scope["type"] == "http" else None
        if error is None:
            await self.app(scope, receive, send)
            return
        metrics.rejected_requests.labels(error.code).inc()
        # The body is not read: the connection ends with the answer.
        headers = {"Connection": "close"}
        await JSONResponse({"error": error.to_dict()}, error.status, headers)(scope, receive, send)


class OnlyFrames(NoPickle):
    """ASGI middleware of a runner: a body must be a frame, of a size that is known and not too large."""

    def refusal(self, scope: Scope) -> OODError | None:
        """Why a request is not let in."""
        if scope["method"] in BODILESS:
            return super().refusal(scope)
        headers = Headers(scope=scope)
        if headers.getlist("content-type") != [MEDIA_TYPE]:
            return UnsupportedMediaType(f"A runner reads {MEDIA_TYPE} and nothing else; ask the gateway.")
        length = headers.get("content-length", "")
        if not length.isdigit():
            return MalformedRequest("The header Content-Length is missing.")
        if int(length) > MAX_FRAME:
            return TooLarge(f"The body is larger than {MAX_FRAME // 2**20} MiB.")
        return None
