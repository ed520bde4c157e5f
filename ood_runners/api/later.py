"""An application that is imported where it is used: runners import the service too, and need nothing of its HTTP."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.types import Receive, Scope, Send


class Later(Starlette):
    """Stands for an application that is given before the first request.

    A Starlette, since BentoML asks only those which paths they know, and leaves the others to its own routes.
    """

    def become(self, app: Starlette) -> None:
        """Be `app` from now on."""
        self._app = app
        self.router = app.router

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        await self._app(scope, receive, send)
