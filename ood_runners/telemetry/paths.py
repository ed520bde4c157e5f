"""Two faults of BentoML's HTTP metrics and tracing, mended where both begin.

It makes a label of whatever path a client asks for, which grows without bound. And on a connection that is kept
alive, a request may start in the context of the one before it: its spans would become part of the wrong trace.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from bentoml._internal.server.http import instruments
from opentelemetry import context
from starlette.types import ASGIApp, Receive, Scope, Send

OTHER = "other"
_SENT = "ood_runners.path"


def fixed(routes: Iterable[Any], prefix: str = "") -> Iterator[str]:
    """The paths of routes, mounted applications included."""
    for route in routes:
        path = prefix + getattr(route, "path", "")
        children = getattr(route, "routes", None)
        if children:
            yield from fixed(children, path)
        else:
            yield path


class _AsSent:
    """Gives the application the path that the client asked for."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if _SENT in scope:
            scope = {**scope, "path": scope[_SENT]}
        await self.app(scope, receive, send)


class Traffic(instruments.RunnerTrafficMetricsMiddleware):
    """BentoML's outermost middleware, for which a path without a route is ``other`` and a request begins a context."""

    def __init__(self, app: ASGIApp, *arguments: Any, **options: Any) -> None:
        super().__init__(_AsSent(app), *arguments, **options)
        self._paths: frozenset[str] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "lifespan":
            await super().__call__(scope, receive, send)
            return
        if self._paths is None:
            self._paths = frozenset(fixed(scope["app"].routes))
        if scope["path"] not in self._paths:
            scope = {**scope, "path": OTHER, _SENT: scope["path"]}
        token = context.attach(context.Context())
        try:
            await super().__call__(scope, receive, send)
        finally:
            context.detach(token)


def install() -> None:
    """Have the servers of this process use it; to be called before BentoML makes their application."""
    instruments.RunnerTrafficMetricsMiddleware = Traffic  # type: ignore[misc]
