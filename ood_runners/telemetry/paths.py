"""Keeps BentoML's own HTTP metrics bounded: it makes a label of whatever path a client asks for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from bentoml._internal.server.http import instruments
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


class BoundedTraffic(instruments.RunnerTrafficMetricsMiddleware):
    """BentoML's middleware, for which every path without a route of its own is ``other``."""

    def __init__(self, app: ASGIApp, *arguments: Any, **options: Any) -> None:
        super().__init__(_AsSent(app), *arguments, **options)
        self._paths: frozenset[str] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "lifespan":
            if self._paths is None:
                self._paths = frozenset(fixed(scope["app"].routes))
            if scope["path"] not in self._paths:
                scope = {**scope, "path": OTHER, _SENT: scope["path"]}
        await super().__call__(scope, receive, send)


def install() -> None:
    """Have the servers of this process use it; to be called before BentoML makes their application."""
    instruments.RunnerTrafficMetricsMiddleware = BoundedTraffic  # type: ignore[misc]
