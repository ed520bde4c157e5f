"""Runners compute as many pictures at once as the served versions gain from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ood_runners import batches
from ood_runners.artifacts import promote, write_backbone, write_version
from ood_runners.batches import CALL, UNMEASURED, largest_batch
from ood_runners.settings import Settings
from tests.artifacts.samples import TinyBackbone, backbone_folder, describe, fill

Serve = Callable[[str, dict[str, Any]], str]


@pytest.fixture
def serve(bento_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Put a version with such costs into production: ``serve("bolts", {…})``."""
    backbone = write_backbone(TinyBackbone(), backbone_folder(tmp_path / "exported"))
    monkeypatch.setattr(batches, "has_gpu", lambda: False)

    def write(product: str, cost: dict[str, Any]) -> str:
        tag = write_version(describe(product, backbone, cost=cost), lambda folder: fill(folder, 0))
        promote(tag)
        return str(tag.version)

    return write


def test_the_largest_that_a_version_in_production_gains_from(serve: Serve) -> None:
    assert largest_batch(Settings()) == UNMEASURED
    serve("bolts", {"device": "cpu", "batch": 1})
    assert largest_batch(Settings()) == CALL == 8
    serve("nuts", {"device": "cpu", "batch": 32})
    assert largest_batch(Settings()) == 32
    assert largest_batch(Settings(max_batch=3)) == 3


def test_what_another_device_gains_says_nothing(serve: Serve) -> None:
    serve("bolts", {"device": "cpu", "batch": 32})
    assert largest_batch(Settings(device="cuda")) == UNMEASURED
    serve("nuts", {"device": "cuda", "batch": 64})
    assert largest_batch(Settings(device="cuda")) == 64
    assert largest_batch(Settings(device="cpu")) == 32


def test_pinned_versions_only(serve: Serve) -> None:
    first = serve("bolts", {"device": "cpu", "batch": 32})
    serve("bolts", {"device": "cpu", "batch": 64})
    assert largest_batch(Settings()) == 64
    assert largest_batch(Settings(products=f"bolts:{first}")) == 32
    assert largest_batch(Settings(products="bolts:gone")) == UNMEASURED
