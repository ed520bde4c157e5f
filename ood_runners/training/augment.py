"""Training pictures under other light, so that a darker or brighter day is no anomaly.

The variants join the memory bank and the Gaussians, each in the fold of the picture that it was made from: no held-out
picture is scored by a detector that has seen a variant of it, and calibration stays with the pictures as they are. The
VAE is trained under other light in any case.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ood_runners.detectors import Detector, MemoryBank
from ood_runners.errors import BadParameter
from ood_runners.features import Features, Scores
from ood_runners.training.changes import brightness
from ood_runners.training.extract import BATCH
from ood_runners.training.prepare import Prepared
from ood_runners.training.progress import Progress

LIGHT = "light"
PERCENT = (-15, 15)  # of brightness
AUGMENTED = frozenset({"memory_bank", "mahalanobis"})


def check_augment(augment: str | None, detectors: Collection[str]) -> None:
    """BadParameter where there is no such augmentation, or none of the detectors takes it."""
    if augment not in (None, LIGHT):
        raise BadParameter(f"There is no augmentation {augment!r}; choose {LIGHT}, or leave it out.")
    if augment and not AUGMENTED.intersection(detectors):
        raise BadParameter(f"Augmentation is for {' and '.join(sorted(AUGMENTED))}; fit one of them, or leave it out.")


def under_light(prepared: Prepared, pictures: NDArray[np.uint8], scratch: Path, progress: Progress) -> Features:
    """Features of the n pictures and then of n at each brightness of `PERCENT`, memory-mapped in `scratch`."""
    n, network = len(pictures), prepared.network
    if network is None:
        raise RuntimeError("variants need a network")
    named = {name: array for name, array in prepared.features.to_arrays().items() if name != "pictures"}
    joined: dict[str, NDArray[Any]] = {}
    for name, array in named.items():
        shape = (n * (1 + len(PERCENT)), *array.shape[1:])
        joined[name] = np.lib.format.open_memmap(
            scratch / f"{LIGHT}.{name}.npy", mode="w+", dtype=array.dtype, shape=shape
        )
    with progress.stage(LIGHT, total=n) as stage:
        for start in range(0, n, BATCH):
            end = min(start + BATCH, n)
            for name, array in named.items():
                joined[name][start:end] = array[start:end]
            for copy, percent in enumerate(PERCENT, start=1):
                changed = np.stack([brightness(picture, percent) for picture in pictures[start:end]])
                for name, array in network(changed).to_arrays().items():
                    joined[name][copy * n + start : copy * n + end] = array
            stage.advance(end - start)
    return Features.from_arrays(joined)


def fit_held_out(
    detector: Detector,
    features: Features,
    light: Features | None,
    folds: NDArray[np.int64],
    labels: NDArray[np.int64] | None,
    **options: Any,
) -> Scores:
    """As the detector's own, with what `under_light` gave where the detector takes it; the scores are of `features`
    and, after them, of the probes.
    """
    if light is None or detector.name not in AUGMENTED:
        return detector.fit_held_out(features, folds, labels, **options)
    n = len(features)
    copies = len(light) // n
    repeated = None if labels is None else np.tile(labels, copies)
    scores = detector.fit_held_out(light, np.tile(folds, copies), repeated, **options)
    if isinstance(detector, MemoryBank):
        detector.source_[:, 0] %= n  # the picture that the variant was made from
    return Scores.concatenate([scores[:n], scores[len(light) :]])  # those of the probes, where there are any
