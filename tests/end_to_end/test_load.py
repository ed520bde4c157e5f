"""Many clients at once: nothing is lost, what is too much is refused, an end is orderly."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from collections import Counter
from typing import Any

import pytest

from tests.end_to_end.traffic import Answer, in_progress, load


def test_no_request_is_lost_at_32_clients(server: Any, many: list[bytes]) -> None:
    alone = [server.detect(data, product="parts") for data in many]
    answers = asyncio.run(load(server.url, many, 200, 32))
    assert Counter(answer.status for answer in answers) == {200: 200}
    for answer in answers:
        expected = alone[answer.picture]
        assert answer.body["score"] == pytest.approx(expected["score"], rel=1e-3)
        assert answer.body["verdict"] == expected["verdict"]


def test_more_than_can_be_served_is_refused_at_once(serve: Any, fitted: Any, many: list[bytes]) -> None:
    with serve(fitted.home, "max_pending=2") as server:
        answers = asyncio.run(load(server.url, many, 100, 16))
        assert {answer.status for answer in answers} == {200, 503}
        refused = [answer for answer in answers if answer.status == 503]
        assert {answer.body["error"]["code"] for answer in refused} == {"overloaded"}
        assert all(int(answer.retry_after or 0) >= 1 for answer in refused)


def test_an_orderly_end_under_load(serve: Any, fitted: Any, many: list[bytes]) -> None:
    with serve(fitted.home) as server:

        async def end() -> list[Answer]:
            running = asyncio.create_task(load(server.url, many, 200, 24))
            while await asyncio.to_thread(in_progress, server) < 12:
                assert not running.done()
                await asyncio.sleep(0.01)
            server.process.send_signal(signal.SIGTERM)
            return await running

        answers = asyncio.run(end())
        statuses = Counter(answer.status for answer in answers)
        assert statuses[200] >= 12, answers
        # What had been taken on is answered; what came after finds the door closed.
        assert set(statuses) <= {200, 0}, answers
        try:
            assert server.process.wait(timeout=30) == 0
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running 30 s after SIGTERM:\n{server.tail()}")
