"""Pictures a second of the GPU's engine beside its pure forward pass; `throughput.py --device cuda` prints them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from common import median_seconds, show

from ood_runners.backbones.torch_engine import TorchEngine
from ood_runners.cores import available_cores

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


def streams(
    judge: Callable[[Sequence[bytes]], object], jpegs: Sequence[bytes], seconds: float
) -> list[tuple[int, int, float]]:
    """Whole verdicts of JPEGs in batches, several batches at once: at once, pictures in each, pictures a second."""
    found = []
    for at_once, batch in ((1, 1), (1, 8), (1, 32), (4, 8), (available_cores(), 8), (available_cores(), 32)):
        numbers = itertools.count()
        given = [jpegs[i % len(jpegs)] for i in range(batch)]
        judge(given)
        end = time.perf_counter() + seconds

        def work(given: Sequence[bytes] = given, end: float = end, numbers: itertools.count[int] = numbers) -> None:
            while time.perf_counter() < end:
                judge(given)
                next(numbers)

        start = time.perf_counter()
        with ThreadPoolExecutor(at_once) as pool:
            for one in [pool.submit(work) for _ in range(at_once)]:
                one.result()
        found.append((at_once, batch, next(numbers) * batch / (time.perf_counter() - start)))
    return found


def report(
    stored: Stored,
    judge: Callable[[Sequence[bytes]], object],
    jpegs: Sequence[bytes],
    seconds: float,
    device: str = "cuda",
) -> None:
    """Print the rates of a version's engine, and of `judge`, which gives the verdicts of JPEGs."""
    engine = engine_of(stored, device)
    size = (stored.manifest.input.height, stored.manifest.input.width)
    precision = str(engine.dtype).removeprefix("torch.")
    found = rates(engine, size, seconds)
    show(f"The network with projection, in {precision}, on {device}", COLUMNS, found)
    pure = max(float(row[1]) for row in found)
    rows = [
        [str(many), str(batch), f"{rate:.1f}", f"{rate / pure:.2f}"]
        for many, batch, rate in streams(judge, jpegs, seconds)
    ]
    columns = ["batches at once", "pictures in each", "pictures/s", "of the pure pass at its best"]
    show("Whole verdicts without the VAE, JPEG in, in one process", columns, rows)
