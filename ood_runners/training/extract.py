"""Training pictures -> a stored backbone, a projection fitted on them, and their features."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

import numpy as np
from bentoml import Tag
from numpy.typing import NDArray

from ood_runners.artifacts import exporting, find_backbone, write_backbone
from ood_runners.artifacts.files import sha256 as sha256_of
from ood_runners.artifacts.manifest import FeaturesEntry
from ood_runners.artifacts.names import CACHE, home
from ood_runners.backbones import BackboneInfo, FeatureNetwork, Projection, ProjectionFitter
from ood_runners.features import Features
from ood_runners.training.progress import Progress

BATCH = 8
PROJECTION_PICTURES = 128  # 100,000 patches of 224 px, enough for a 1,536 x 1,536 covariance
PROJECTION_DIM = 128
FINE = 2.0  # how much larger the finest layer's channels are for the map alone; see docs/accuracy.md
NEIGHBOURHOOD = 3


@dataclass(frozen=True)
class StoredBackbone:
    """A backbone in the store."""

    info: BackboneInfo
    tag: Tag
    path: Path


def known_backbone(name: str, weights: Path | None) -> StoredBackbone | None:
    """The backbone of a file whose weights an earlier fit put into the store.

    Which weights a file holds is remembered by the file's hash, which takes a moment, where torch takes seconds to be
    there and to read it.
    """
    with suppress(OSError):  # unreadable, or not met before
        memo = _memo(name, weights)
        if memo is not None and (found := find_backbone(name, memo.read_text(encoding="ascii"))):
            return StoredBackbone(BackboneInfo.load(found[1]), *found)
    return None


def _memo(name: str, weights: Path | None) -> Path | None:
    """Where the hash of the weights in a file is remembered."""
    return None if weights is None else home() / CACHE / "weights" / f"{name}-{sha256_of(weights)}"


def import_aside() -> None:
    """Import what exporting a backbone needs in a thread of its own: seconds, in which pictures can be read."""

    def load() -> None:
        with suppress(ImportError):  # which whoever needs it will meet again
            import_module("ood_runners.backbones.export")

    Thread(target=load, name="imports").start()


def store_backbone(name: str, weights: Path | None, scratch: Path) -> StoredBackbone:
    """Put the backbone into the store, unless the same weights are there already.

    Two exports of the same weights differ in their bytes, so of several first fits at once one exports and the others
    find what it wrote.
    """
    if (known := known_backbone(name, weights)) is not None:
        return known
    from ood_runners.backbones import export_backbone
    from ood_runners.backbones.weights import hash_state, load_weights

    state, _ = load_weights(name, weights)
    sha256 = hash_state(state)
    with exporting(name):
        found = find_backbone(name, sha256)
        if found is None:
            with TemporaryDirectory(dir=scratch) as folder:
                tag = write_backbone(export_backbone(name, weights, Path(folder)), Path(folder))
            found = find_backbone(name, sha256)
    if found is None:
        raise RuntimeError(f"{tag} was written and is not found")
    with suppress(OSError):
        if (memo := _memo(name, weights)) is not None:
            memo.parent.mkdir(parents=True, exist_ok=True)
            memo.write_text(sha256, encoding="ascii")
    return StoredBackbone(BackboneInfo.load(found[1]), *found)


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
    """PCA of the joined patch features of at most 128 of the pictures."""
    height, width = pictures.shape[1:3]
    network = FeatureNetwork.load(
        backbone.path,
        size=(height, width),
        patch_layers=wanted.patch_layers,
        neighbourhood=wanted.neighbourhood,
        device=device,
        graph=graph,
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
