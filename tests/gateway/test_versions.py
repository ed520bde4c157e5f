"""What a service that is pinned says of itself; whole servers are tried in tests/end_to_end."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import cast

from ood_runners.gateway.graph import Graph
from ood_runners.gateway.versions import Versions

NO_GRAPH = cast(Graph, None)  # nothing is loaded that it would score


def test_a_pinned_version_that_is_refused_leaves_the_service_incomplete(bento_home: Path) -> None:
    versions = Versions(NO_GRAPH, {"parts": "20260101-000000-abcdef012"})
    asyncio.run(versions._follow())
    assert not versions.complete


def test_a_service_without_pins_is_complete_with_an_empty_store(bento_home: Path) -> None:
    versions = Versions(NO_GRAPH, {})
    asyncio.run(versions._follow())
    assert versions.complete
