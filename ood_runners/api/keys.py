"""Who may ask: an API key, where one is set.

``OOD_API_KEY`` holds a key, ``OOD_API_KEY_FILE`` names a file of keys, one a line. Any of several keys will do, so that
a new one can be given out before the old one is taken away; the file is read again when it changes. Neither is a Bento
argument: those are written into a Bento and shown in lists of processes.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import psutil
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ood_runners.api.errors import answer
from ood_runners.errors import OODError, Unauthorised

logger = logging.getLogger(f"bentoml.{__name__}")  # configured by BentoML when it serves
VARIABLE, FILE_VARIABLE = "OOD_API_KEY", "OOD_API_KEY_FILE"
MIN_LENGTH = 16
LOOK_S = 1.0
# Probes carry no key; the page and what it is made of say nothing about products.
OPEN = frozenset({"/livez", "/readyz", "/healthz", "/", "/openapi.json"})
OPEN_FOLDER = "/static_content/"
HEADERS = (b"authorization", b"x-api-key")
Stamp = tuple[int, int, int]


class Keys:
    """The keys that are accepted; only their digests are held.

    Parameters
    ----------
    fixed : keys that do not change
    file : a file of keys, one a line; empty lines and lines that begin with # are skipped

    Raises
    ------
    OODError
        A key is shorter than 16 characters, the file cannot be read, or there is no key at all.
    """

    def __init__(self, fixed: str = "", file: Path | None = None) -> None:
        self._fixed = _digests(parse_keys(fixed, VARIABLE))
        self._file = file
        self._stamp: Stamp | None = None
        self._listed: frozenset[bytes] = frozenset()
        self._looked = 0.0
        if file is not None:
            self._listed, self._stamp = _read(file)
        if not self._fixed | self._listed:
            raise OODError(f"There is no key in {file or VARIABLE}; write one, or set neither variable.")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Keys | None:
        """The keys that the environment names; None where it names none, so that everybody may ask."""
        fixed, file = environment.get(VARIABLE), environment.get(FILE_VARIABLE)
        if fixed is None and file is None:
            return None
        return cls(fixed or "", Path(file) if file else None)

    def accept(self, key: bytes) -> bool:
        """Whether `key` is one of them; takes as long for a wrong one as for a right one."""
        self._look()
        digest = hashlib.sha256(key).digest()
        matches = [hmac.compare_digest(digest, one) for one in self._fixed | self._listed]
        return any(matches)

    def _look(self) -> None:
        """Read the file again if it has changed; a file that cannot be read leaves what was read before."""
        now = time.monotonic()
        if self._file is None or now - self._looked < LOOK_S:
            return
        self._looked = now
        try:
            if file_stamp(self._file) != self._stamp:
                self._listed, self._stamp = _read(self._file)
                logger.info("%d keys read from %s", len(self._listed), self._file)
        except (OSError, OODError) as error:
            logger.error("The keys read before stay in force: %s", error)


def read_keys(file: Path) -> tuple[list[str], Stamp]:
    """The keys in a file, in order, and its stamp; OODError where it cannot be read or holds what is no key."""
    try:
        stamp = file_stamp(file)
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise OODError(f"The keys in {file} cannot be read: {type(error).__name__}.") from None
    return parse_keys(text, str(file)), stamp


def file_stamp(file: Path) -> Stamp:
    """Something that changes whenever the file does."""
    status = file.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino


def parse_keys(text: str, origin: str) -> list[str]:
    """The keys in `text`, one a line; `origin` is named in the OODError for what is no key."""
    keys = [line.strip() for line in text.splitlines()]
    keys = [key for key in keys if key and not key.startswith("#")]
    if any(len(key) < MIN_LENGTH or not key.isascii() or not key.isprintable() or " " in key for key in keys):
        raise OODError(
            f"A key in {origin} is not {MIN_LENGTH} or more plain characters without spaces; "
            "`openssl rand -hex 32` makes one."
        )
    return keys


def _read(file: Path) -> tuple[frozenset[bytes], Stamp]:
    keys, stamp = read_keys(file)
    return _digests(keys), stamp


def _digests(keys: Iterable[str]) -> frozenset[bytes]:
    return frozenset(hashlib.sha256(key.encode()).digest() for key in keys)


class KeyGuard:
    """ASGI middleware: 401 for what needs a key and comes without one; nothing behind it sees the key.

    Parameters
    ----------
    app : the application behind it
    keys : those that are accepted
    """

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if is_open(scope["path"]) or is_preflight(scope) or self.keys.accept(sent_key(Headers(scope=scope))):
            headers = [pair for pair in scope["headers"] if pair[0].lower() not in HEADERS]
            await self.app({**scope, "headers": headers}, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            error = Unauthorised("Send a valid API key in the header X-API-Key, or as Authorization: Bearer KEY.")
            await answer(error)(scope, receive, send)


def is_open(path: str) -> bool:
    """Whether a path needs no key."""
    return path in OPEN or path.startswith(OPEN_FOLDER)


def is_preflight(scope: Scope) -> bool:
    """Whether a browser asks what it may send, which it does without a key; no route answers that with data."""
    return scope.get("method") == "OPTIONS" and "access-control-request-method" in Headers(scope=scope)


def sent_key(headers: Headers) -> bytes:
    """The key that a request carries, or nothing."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    bearer = token.strip() if scheme.lower() == "bearer" else ""
    return (bearer or headers.get("x-api-key", "").strip()).encode("latin-1", "replace")


def warn_if_open(keys: Keys | None) -> None:
    """Say loudly that this process listens beyond this machine and that everybody may ask."""
    if keys is None and (beyond := listening_beyond_loopback()):
        logger.warning(
            "EVERYBODY MAY ASK: this service listens on %s without an API key. Set %s or %s, or listen on 127.0.0.1 "
            "(bentoml serve --host 127.0.0.1).",
            ", ".join(beyond),
            VARIABLE,
            FILE_VARIABLE,
        )


def listening_beyond_loopback() -> list[str]:
    """The addresses on which this process listens and that are not of this machine alone."""
    listening = [one.laddr for one in psutil.Process().net_connections(kind="inet") if one.status == psutil.CONN_LISTEN]
    beyond = [address for address in listening if not ipaddress.ip_address(address.ip).is_loopback]
    return sorted({f"{address.ip}:{address.port}" for address in beyond})
