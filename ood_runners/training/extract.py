"""Training pictures -> a projection fitted on them, and their features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ood_runners.artifacts.manifest import FeaturesEntry
from ood_runners.backbones import BackboneInfo, FeatureNetwork, Projection, ProjectionFitter
from ood_runners.features import Features
from ood_runners.training.progress import Progress
from ood_runners.training.storing import StoredBackbone

BATCH = 8
PROJECTION_PICTURES = 64  # 50,000 patches of 224 px, enough for a 1,536 x 1,536 covariance
PROJECTION_DIM = 128
FINE = 2.0  # how much larger the finest layer's channels are for the map alone; see docs/accuracy.md
NEIGHBOURHOOD = 3


def wanted_features(info: BackboneInfo, detectors: Sequence[str]) -> FeaturesEntry:
    """What the backbone has to compute for these detectors, of what its weights reach."""
    spec = info.spec
    looked_at: tuple[str, ...] = ()
    if "mahalanobis" in detectors:
        looked_at = spec.pooled_layers
    elif "softmax" in detectors:
        looked_at = (spec.embedding,)
    return FeaturesEntry(
        patch_layers=[layer for layer in spec.patch_layers if layer in info.layers]
        if "memory_bank" in detectors
        else [],
        pooled_layers=[layer for layer in looked_at if layer in info.layers],
        logits="softmax" in detectors and info.has_logits,
        neighbourhood=NEIGHBOURHOOD,
    )


def fit_projection(
    backbone: StoredBackbone,
    wanted: FeaturesEntry,
    pictures: NDArray[np.uint8],
    rng: np.random.Generator,
    device: str,
    progress: Progress,
    graph: Path | None = None,
) -> Projection:
    """PCA of the joined patch features of at most 64 of the pictures."""
    height, width = pictures.shape[1:3]
    network = FeatureNetwork.load(
        backbone.path,
        size=(height, width),
        patch_layers=wanted.patch_layers,
        neighbourhood=wanted.neighbourhood,
        device=device,
        graph=graph,
        lone=False,
    )
    rows = np.sort(rng.permutation(len(pictures))[:PROJECTION_PICTURES])
    fitter = ProjectionFitter()
    with progress.stage("projection", total=len(rows)) as stage:
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            features = network(pictures[part])
            if features.patches is None:
                raise RuntimeError("a network asked for patches gave none")
            fitter.partial_fit(features.patches)
            stage.advance(len(part))
    layers = [backbone.info.spec.layers[layer] for layer in wanted.patch_layers]
    finest = min(layer.stride for layer in layers)
    factors = [np.full(layer.channels, FINE if layer.stride == finest else 1.0) for layer in layers]
    return fitter.finish(PROJECTION_DIM, enlarged=np.concatenate(factors) if len(layers) > 1 else None)


def extract(network: FeatureNetwork, pictures: NDArray[np.uint8], scratch: Path, progress: Progress) -> Features:
    """Features of all pictures; each array is memory-mapped in `scratch`, so memory does not grow with the folder."""
    arrays: dict[str, NDArray[Any]] = {}
    with progress.stage("features", total=len(pictures)) as stage:
        for start in range(0, len(pictures), BATCH):
            part = network(pictures[start : start + BATCH]).to_arrays()
            for name, array in part.items():
                if name not in arrays:
                    shape = (len(pictures), *array.shape[1:])
                    arrays[name] = np.lib.format.open_memmap(
                        scratch / f"{name}.npy", mode="w+", dtype=array.dtype, shape=shape
                    )
                arrays[name][start : start + len(array)] = array
            stage.advance(min(BATCH, len(pictures) - start))
    return replace(Features.from_arrays(arrays), pictures=pictures)
