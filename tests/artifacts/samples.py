"""A small but whole product, and the troubles a store can be in: read-only, full, used by other processes."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bentoml import Tag

from ood_runners.artifacts import Manifest, save_arrays

ROOT = Path(__file__).resolve().parent.parent.parent


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


def describe(product: str, on: Tag, /, **changes: Any) -> Manifest:
    """A manifest as a fit would make it."""
    fields: dict[str, Any] = {
        "product": product,
        "backbone": {"name": "resnet18", "tag": str(on), "sha256": TinyBackbone.sha256, "origin": "test"},
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


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    """Something mounted on `folder` for the block; the test is skipped where that is not permitted."""
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"Mounting is not permitted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """`folder` mounted on itself and read-only; unlike permissions, that holds for root as well."""
    with mounted(folder, "--bind", str(folder)):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        yield


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Another process on the same store; `code` finds this module as ``samples``."""
    start = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    command = [sys.executable, "-c", start + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def snapshot(home: Path) -> dict[str, bytes]:
    """Every file of the store and of the production records, but for locks."""
    names = [path for part in ("models", "ood-production", "ood-staging") for path in (home / part).rglob("*")]
    return {
        str(path.relative_to(home)): path.read_bytes() for path in names if path.is_file() and path.suffix != ".lock"
    }
