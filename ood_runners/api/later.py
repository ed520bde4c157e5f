"""An application that is imported where it is used: runners import the service too, and need nothing of its HTTP."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send


class Later:
    """An ASGI application that stands for `app`, which is set before the first request."""

    app: ASGIApp

    @property
    def routes(self) -> Sequence[BaseRoute]:
        """Those of `app`, by whose paths metrics and spans are named."""
        return list(getattr(self.app, "routes", ()))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        await self.app(scope, receive, send)
