"""Pictures a second of the GPU's engine beside its pure forward pass; `throughput.py --device cuda` prints them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from common import median_seconds, show

from ood_runners.backbones.torch_engine import TorchEngine

if TYPE_CHECKING:
    from ood_runners.artifacts import Stored

BATCHES = (1, 8, 32)
COLUMNS = [
    "pictures at once",
    "pure forward pass, pictures/s",
    "with copies in and out",
    "of the pure pass",
    "replayed",
]


def engine_of(stored: Stored, device: str = "cuda") -> TorchEngine:
    """The engine that a version runs on a GPU."""
    from ood_runners.backbones import BackboneInfo, Projection
    from ood_runners.backbones.runtime import Tapping
    from ood_runners.pipeline import PROJECTION

    manifest = stored.manifest
    wanted = manifest.features
    tapping = Tapping(
        (manifest.input.height, manifest.input.width),
        tuple(wanted.patch_layers),
        tuple(wanted.pooled_layers),
        wanted.logits,
        Projection.from_arrays(stored.arrays(PROJECTION)) if wanted.projection_dim else None,
        wanted.neighbourhood,
    )
    folder = Path(stored.backbone_path)
    return TorchEngine(folder, BackboneInfo.load(folder), tapping, device)


def rates(
    engine: TorchEngine, size: tuple[int, int], seconds: float, batches: tuple[int, ...] = BATCHES
) -> list[list[str]]:
    """For each batch, pictures of `size` a second: the pass alone, on a batch that is on the device, and all of it."""
    rows = []
    for batch in batches:
        pictures = np.random.default_rng(0).integers(0, 256, (batch, *size, 3), np.uint8)
        whole = batch / median_seconds(lambda pictures=pictures: engine(pictures), seconds)  # type: ignore[misc]
        pure = batch / median_seconds(engine.buckets.passes(batch), seconds)
        replayed = "yes" if engine.buckets.recorded()[batch] else "no"
        rows.append([str(batch), f"{pure:.1f}", f"{whole:.1f}", f"{whole / pure:.2f}", replayed])
    return rows


def report(stored: Stored, seconds: float, device: str = "cuda") -> None:
    """Print the rates of a version's engine."""
    engine = engine_of(stored, device)
    size = (stored.manifest.input.height, stored.manifest.input.width)
    precision = str(engine.dtype).removeprefix("torch.")
    show(f"The network with projection, in {precision}, on {device}", COLUMNS, rates(engine, size, seconds))
