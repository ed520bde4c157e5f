"""A small but whole product in a store of the test's own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bentoml import Tag

from ood_runners.artifacts import Manifest, save_arrays, write_backbone, write_version


@dataclass(frozen=True)
class TinyBackbone:
    name: str = "resnet18"
    sha256: str = hashlib.sha256(b"weights").hexdigest()
    origin: str = "made for a test"


def backbone_folder(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "network.xml").write_text("<net/>")
    (folder / "network.bin").write_bytes(weights * 100)
    return folder


def describe(product: str, backbone: Tag, **changes: Any) -> Manifest:
    """A manifest as a fit would make it."""
    fields: dict[str, Any] = {
        "product": product,
        "backbone": {"name": "resnet18", "tag": str(backbone), "sha256": TinyBackbone.sha256, "origin": "test"},
        "input": {"height": 224, "width": 224},
        "features": {"patch_layers": ["layer2", "layer3"], "pooled_layers": ["layer4"], "projection_dim": 8},
        "detectors": {"memory_bank": {"params": {"size": 10, "k": 3}}},
        "calibration": {"method": "cross-fitted", "n": 99, "folds": 5, "alpha_requested": 0.01, "alpha": 0.01},
        "data": {"layout": "folder", "fingerprint": "f", "train_count": 99},
        "metrics": {"image_auroc": 0.99},
        "golden": {"scores": {"memory_bank": 1.25}, "p_value": 0.5, "tolerance": 0.001},
    }
    return Manifest.model_validate(fields | changes)


def fill(folder: Path, seed: int = 0) -> None:
    """The files of a version."""
    bank = np.random.default_rng(seed).normal(size=(10, 8)).astype(np.float32)
    save_arrays(folder, "memory_bank", {"bank": bank, "k": np.int64(3)})
    (folder / "thumbnails").mkdir()
    (folder / "thumbnails" / "0.png").write_bytes(b"not really a picture %d" % seed)


@pytest.fixture
def backbone(bento_home: Path, tmp_path: Path) -> Tag:
    return write_backbone(TinyBackbone(), backbone_folder(tmp_path / "exported"))


@pytest.fixture
def fit(backbone: Tag) -> Callable[..., Tag]:
    """Write a version of a product: ``fit("bolts", seed=1)``."""

    def write(product: str = "bolts", seed: int = 0, **changes: Any) -> Tag:
        return write_version(describe(product, backbone, **changes), lambda folder: fill(folder, seed))

    return write
