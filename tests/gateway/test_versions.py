"""What a service that is pinned says of itself; whole servers are tried in tests/end_to_end."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import cast
from unittest.mock import Mock

import pytest

from ood_runners.gateway.calls import Runner
from ood_runners.gateway.graph import Graph
from ood_runners.gateway.local import LocalRunner
from ood_runners.gateway.served import Served
from ood_runners.gateway.versions import TRAINING_CALLS, Versions

NO_GRAPH = cast(Graph, None)  # nothing is loaded that it would score


def test_a_pinned_version_that_is_refused_leaves_the_service_incomplete(bento_home: Path) -> None:
    versions = Versions(NO_GRAPH, {"parts": "20260101-000000-abcdef012"})
    asyncio.run(versions._follow())
    assert not versions.complete


def test_a_service_without_pins_is_complete_with_an_empty_store(bento_home: Path) -> None:
    versions = Versions(NO_GRAPH, {})
    asyncio.run(versions._follow())
    assert versions.complete


@pytest.mark.parametrize(
    ("runner", "calls"), [(Runner("one", Mock()), TRAINING_CALLS), (LocalRunner("one", Mock(), 8), 0)]
)
def test_the_golden_picture_is_scored_again_and_again_only_where_a_runner_learns_from_it(
    runner: Runner, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    proven: list[Served] = []

    async def prove(served: Served) -> float:
        proven.append(served)
        return 0.01

    versions = Versions(Graph(runner, runner, runner, runner), {})
    versions._opened["parts", "1"] = cast(Served, object())
    monkeypatch.setattr(versions, "_prove", prove)
    asyncio.run(versions._train())
    assert len(proven) == calls
