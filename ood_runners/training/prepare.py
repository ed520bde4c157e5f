"""Training pictures -> the network that a version will run and the features of every picture, kept for the next fit.

What comes out depends on the pictures, the weights and a few settings alone. It is kept under a hash of all of these,
so that a fit of the same folder with another bank, head or alpha begins where those matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ood_runners.artifacts.manifest import FeaturesEntry
from ood_runners.artifacts.names import kept_networks
from ood_runners.backbones import FeatureNetwork, Projection
from ood_runners.backbones.runtime import choose_device
from ood_runners.backbones.spec import GRAPH_FILE
from ood_runners.errors import OODError
from ood_runners.features import Features
from ood_runners.pipeline import INT8, PIXEL_DETECTORS
from ood_runners.training.extract import extract, fit_projection, wanted_features
from ood_runners.training.keeping import Kept, entry_of, find, keep
from ood_runners.training.pictures import TrainingPictures
from ood_runners.training.progress import Progress
from ood_runners.training.quantise import choose_graph
from ood_runners.training.storing import StoredBackbone

PROJECTED = "projection."  # in the names of its arrays


@dataclass(frozen=True)
class Prepared:
    """What the detectors are fitted on.

    Attributes
    ----------
    wanted : what the network computes
    graph : its graph in int8, where that was taken
    int8 : the comparison of int8 with float32, where there was one
    projection : of the patches
    network : None where no detector looks at features
    features : of all pictures, memory-mapped
    entry : where this is kept, which stands for all that it depends on
    """

    wanted: FeaturesEntry
    graph: Path | None
    int8: dict[str, Any]
    projection: Projection | None
    network: FeatureNetwork | None
    features: Features
    entry: Path | None = None


def prepare(
    training: TrainingPictures,
    backbone: StoredBackbone,
    detectors: Sequence[str],
    *,
    device: str,
    precision: str,
    seed: int,
    scratch: Path,
    progress: Progress,
) -> Prepared:
    """Choose the precision, fit the projection and compute the features, or take them from an earlier fit."""
    wanted = wanted_features(backbone.info, detectors)
    if not set(detectors) - PIXEL_DETECTORS:
        return Prepared(wanted, None, {}, None, None, Features(pictures=training.pictures))
    parameters = (training.fingerprint, training.pictures.shape, backbone.info.sha256, wanted.model_dump_json(), seed)
    entry = entry_of(*parameters, precision, choose_device(device))
    with suppress(OSError, ValueError, KeyError, OODError):  # other than it was written
        if (kept := find(entry)) is not None:
            found = replace(_opened(kept, training, backbone, device), entry=entry)
            with progress.stage("features", total=1) as stage:
                stage.advance(note="as in an earlier fit")
            return found
    prepared = _compute(training, backbone, wanted, device, precision, seed, scratch, progress)
    prepared = replace(prepared, entry=entry)
    _keep(prepared, entry)
    return prepared


def _compute(
    training: TrainingPictures,
    backbone: StoredBackbone,
    wanted: FeaturesEntry,
    device: str,
    precision: str,
    seed: int,
    scratch: Path,
    progress: Progress,
) -> Prepared:
    pictures = training.pictures
    graph, int8 = choose_graph(precision, backbone, wanted, pictures, scratch / INT8, seed, progress)
    projection = None
    if wanted.patch_layers:
        rng = np.random.default_rng(seed)
        projection = fit_projection(backbone, wanted, pictures, rng, device, progress, graph)
        wanted = wanted.model_copy(update={"projection_dim": projection.matrix.shape[1]})
    network = _network(training, backbone, wanted, projection, graph, device)
    return Prepared(wanted, graph, int8, projection, network, extract(network, pictures, scratch, progress))


def _network(
    training: TrainingPictures,
    backbone: StoredBackbone,
    wanted: FeaturesEntry,
    projection: Projection | None,
    graph: Path | None,
    device: str,
) -> FeatureNetwork:
    height, width = training.pictures.shape[1:3]
    return FeatureNetwork.load(
        backbone.path,
        size=(height, width),
        patch_layers=wanted.patch_layers,
        pooled_layers=wanted.pooled_layers,
        logits=wanted.logits,
        projection=projection,
        neighbourhood=wanted.neighbourhood,
        device=device,
        graph=graph,
        kept=kept_networks(),
    )


def _opened(kept: Kept, training: TrainingPictures, backbone: StoredBackbone, device: str) -> Prepared:
    record, arrays = kept.record, dict(kept.arrays)
    wanted = FeaturesEntry.model_validate(record["wanted"])
    graph = kept.folder / GRAPH_FILE if record["graph"] else None
    projection = None
    if wanted.projection_dim is not None:
        stored = [name for name in arrays if name.startswith(PROJECTED)]
        parts = {name.removeprefix(PROJECTED): np.array(arrays.pop(name)) for name in stored}
        projection = Projection.from_arrays(parts)
    network = _network(training, backbone, wanted, projection, graph, device)
    features = replace(Features.from_arrays(arrays), pictures=training.pictures)
    return Prepared(wanted, graph, record["int8"], projection, network, features)


def _keep(prepared: Prepared, entry: Path) -> None:
    arrays = {name: array for name, array in prepared.features.to_arrays().items() if name != "pictures"}
    if prepared.projection is not None:
        arrays |= {PROJECTED + name: array for name, array in prepared.projection.to_arrays().items()}
    graph = prepared.graph
    record = {"wanted": prepared.wanted.model_dump(), "graph": graph is not None, "int8": prepared.int8}
    keep(entry, arrays, record, () if graph is None else sorted(graph.parent.iterdir()))
