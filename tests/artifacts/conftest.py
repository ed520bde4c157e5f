"""A store of the test's own, with a backbone in it and a way to fill it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bentoml import Tag

from ood_runners.artifacts import write_backbone, write_version
from tests.artifacts.samples import TinyBackbone, backbone_folder, describe, fill


@pytest.fixture
def backbone(bento_home: Path, tmp_path: Path) -> Tag:
    return write_backbone(TinyBackbone(), backbone_folder(tmp_path / "exported"))


@pytest.fixture
def fit(backbone: Tag) -> Callable[..., Tag]:
    """Write a version of a product: ``fit("bolts", seed=1)``."""

    def write(product: str = "bolts", *, seed: int = 0, **changes: Any) -> Tag:
        return write_version(describe(product, backbone, **changes), lambda folder: fill(folder, seed))

    return write
