"""Calls to a runner: a deadline on each, retries, and failures in this package's own words."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import aiohttp
from bentoml.exceptions import BentoMLException

from ood_runners.errors import DeadlineExceeded, OODError, Overloaded, error_from_dict

logger = logging.getLogger(f"bentoml.{__name__}")  # configured by BentoML when it serves
Item = dict[str, Any]
RETRY_PAUSES_S = (0.01, 0.1)
KEY_PAUSE_S = 1.2
LATE_PROBE_S = 0.5  # the gateway's reserve behind a runner's deadline has room for it, many at once
SHUT_OUT_S = 5.0
RESTART_S = 30.0  # a runner that was lost may take this long until it is up again and has caught up
BROKEN = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError)


class Runner:
    """One runner of the graph.

    Parameters
    ----------
    name : how messages and logs call it
    proxy : what ``wire.transport.depends`` gives
    elsewhere : whether it is served alone, so that a new gateway would not bring it back
    """

    # When it last broke a connection or missed a probe, and when it did not accept the key.
    _lost = _shut_out = float("-inf")

    learns = True  # its speed, from its first calls, before it batches them

    def __init__(self, name: str, proxy: Any, elsewhere: bool = False) -> None:
        self.name = name
        self.elsewhere = elsewhere
        self._proxy = proxy.to_async
        self._answered = time.monotonic()

    @property
    def silent_s(self) -> float:
        """Seconds since it answered anything (at first, since the start)."""
        return time.monotonic() - self._answered

    async def infer(self, items: Sequence[Item], deadline: float) -> list[Item | OODError]:
        """One answer an item, in order; an error in the place of an item that failed.

        `deadline` is a time of ``time.monotonic()``. Raises Overloaded when the runner is away or takes no more calls,
        and DeadlineExceeded when it lives and does not answer until then.
        """
        asked = time.monotonic()
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                answers = await self._persist(list(items))
        except TimeoutError:
            raise await self._late(asked) from None
        except BROKEN as error:
            raise self._away() from error
        except BentoMLException as error:
            raise self._translate(error) from error
        self._answered = time.monotonic()
        return [error_from_dict(answer["error"]) if "error" in answer else answer for answer in answers]

    async def _persist(self, items: list[Item]) -> list[Item]:
        """Call, and call again where the connection breaks: scoring is idempotent.

        A runner closes connections that are idle for 5 s, and one from the pool may be closed in the moment in which
        it is used. The pause lets the pool notice the others that were closed with it.
        """
        for pause in RETRY_PAUSES_S:
            try:
                return list(await self._proxy.infer(items))
            except BROKEN as error:
                self._lost = time.monotonic()
                logger.info("%s: %r; tried again", self.name, error)
                await asyncio.sleep(pause)
            except BentoMLException as error:
                if error.error_code != HTTPStatus.UNAUTHORIZED:
                    raise
                await asyncio.sleep(KEY_PAUSE_S)  # a new key of the file: the runner is about to read it as well
        return list(await self._proxy.infer(items))

    async def _late(self, asked: float) -> OODError:
        """Why a call that began at `asked` was not answered in time."""
        if self._lost > asked - RESTART_S or not await self.is_ready(LATE_PROBE_S):
            return self._away()
        return DeadlineExceeded(f"{self.name} did not answer within the request's deadline.")

    def _away(self) -> Overloaded:
        return Overloaded(f"{self.name} is away; it is started again by itself, so send this again later.")

    def _translate(self, error: BentoMLException) -> OODError:
        if error.error_code == HTTPStatus.SERVICE_UNAVAILABLE:
            return Overloaded(f"{self.name} has more to do than it can finish in time; send this again later.")
        if error.error_code == HTTPStatus.GATEWAY_TIMEOUT:
            return DeadlineExceeded(f"{self.name} did not answer within the request's deadline.")
        if error.error_code == HTTPStatus.UNAUTHORIZED:
            self._shut_out = time.monotonic()
            logger.error("%s does not accept this gateway's key: give both the same keys, the runner first.", self.name)
            return Overloaded(f"{self.name} cannot be reached; send this again later.")
        logger.error("%s failed: %s", self.name, error)
        return OODError(f"{self.name} failed; its log says why.")

    async def is_ready(self, timeout: float = 1.0) -> bool:
        """Whether it has answered within `timeout` seconds, or answers its readiness probe within as many.

        A runner under full load is late with its probe and is ready all the same; one that did not accept this
        gateway's key a moment ago is of no use, whatever its probe says.
        """
        if time.monotonic() - self._shut_out < SHUT_OUT_S:
            return False
        if self.silent_s < timeout:
            return True
        try:
            async with asyncio.timeout(timeout):
                ready = bool(await self._proxy.is_ready())
        except (TimeoutError, aiohttp.ClientError, OSError):
            ready = False
        if ready:
            self._answered = time.monotonic()
        else:
            self._lost = time.monotonic()
        return ready
