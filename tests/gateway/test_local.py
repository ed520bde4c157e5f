"""Engines in the gateway's own process."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from ood_runners.errors import DeadlineExceeded, OODError, PictureError
from ood_runners.gateway import local
from ood_runners.gateway.local import LocalRunner

Item = dict[str, Any]


class Doubling:
    """Answers twice each number; remembers its batches, and waits while `held`."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.held = threading.Event()
        self.held.set()

    def infer(self, items: Sequence[Item]) -> list[Item]:
        self.held.wait()
        self.batches.append(len(items))
        return [
            {"error": PictureError("odd").to_dict()} if item["number"] % 2 else {"twice": 2 * item["number"]}
            for item in items
        ]


def later(seconds: float = 10) -> float:
    return time.monotonic() + seconds


def numbers(*values: int) -> list[Item]:
    return [{"number": value} for value in values]


def test_answers_in_order_with_an_error_in_its_place() -> None:
    runner = LocalRunner("doubling", Doubling(), 4)  # type: ignore[arg-type]
    answers = asyncio.run(runner.infer(numbers(2, 3, 4), later()))
    assert answers[0] == {"twice": 4} and answers[2] == {"twice": 8}
    assert isinstance(answers[1], OODError) and answers[1].message == "odd"


def test_what_gathers_while_it_computes_is_the_next_batch() -> None:
    engine = Doubling()
    runner = LocalRunner("doubling", engine, 4)  # type: ignore[arg-type]

    async def ask() -> list[Any]:
        engine.held.clear()
        calls = [asyncio.create_task(runner.infer(numbers(2 * i), later())) for i in range(7)]
        await asyncio.sleep(0.05)
        engine.held.set()
        return await asyncio.gather(*calls)

    assert asyncio.run(ask()) == [[{"twice": 4 * i}] for i in range(7)]
    assert sum(engine.batches) == 7 and max(engine.batches) == 4


def test_a_call_past_its_deadline_is_not_computed_and_holds_nobody_up() -> None:
    engine = Doubling()
    runner = LocalRunner("doubling", engine, 4)  # type: ignore[arg-type]

    async def ask() -> list[Any]:
        engine.held.clear()
        first = asyncio.create_task(runner.infer(numbers(2), later()))
        await asyncio.sleep(0.05)
        with pytest.raises(DeadlineExceeded, match="doubling did not answer"):
            await runner.infer(numbers(4), later(0.05))
        engine.held.set()
        return [await first, await runner.infer(numbers(6), later())]

    assert asyncio.run(ask()) == [[{"twice": 4}], [{"twice": 12}]]
    assert engine.batches == [1, 1]


def test_is_not_ready_once_it_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Doubling()
    runner = LocalRunner("doubling", engine, 4)  # type: ignore[arg-type]
    monkeypatch.setattr(local, "STUCK_S", 0.1)

    async def ask() -> tuple[bool, bool, bool]:
        idle = await runner.is_ready()
        engine.held.clear()
        call = asyncio.create_task(runner.infer(numbers(2), later()))
        await asyncio.sleep(0.2)
        stuck = await runner.is_ready()
        engine.held.set()
        await call
        return idle, stuck, await runner.is_ready()

    assert asyncio.run(ask()) == (True, False, True)
