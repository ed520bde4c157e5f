"""Training pictures -> the network that a version will run and the features of every picture, kept for the next fit.

What comes out depends on the pictures, the weights and a few settings alone. It is kept under a hash of all of these,
so that a fit of the same folder with another bank, head or alpha begins where those matter.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ood_runners import __version__
from ood_runners.artifacts.files import flush_tree
from ood_runners.artifacts.manifest import FeaturesEntry
from ood_runners.artifacts.names import home
from ood_runners.artifacts.staging import staging_folder
from ood_runners.artifacts.store import installed_packages
from ood_runners.backbones import FeatureNetwork, Projection
from ood_runners.backbones.runtime import choose_device
from ood_runners.backbones.spec import GRAPH_FILE
from ood_runners.errors import OODError
from ood_runners.features import Features
from ood_runners.pipeline import INT8, PIXEL_DETECTORS
from ood_runners.training.extract import CACHE, StoredBackbone, extract, fit_projection, wanted_features
from ood_runners.training.pictures import TrainingPictures
from ood_runners.training.progress import Progress
from ood_runners.training.quantise import choose_graph

FOLDER = f"{CACHE}/features"
ENTRY_BYTES, ALL_BYTES = 2 * 2**30, 4 * 2**30  # what is larger is not kept; what was used longest ago goes first
_RECORD = "prepared.json"


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
    """

    wanted: FeaturesEntry
    graph: Path | None
    int8: dict[str, Any]
    projection: Projection | None
    network: FeatureNetwork | None
    features: Features


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
    packages = {name: installed_packages().get(name) for name in ("numpy", "openvino", "torch")}
    key = json.dumps([__version__, *parameters, precision, choose_device(device), packages])
    entry = home() / FOLDER / hashlib.sha256(key.encode()).hexdigest()[:32]
    with suppress(OSError, ValueError, KeyError, OODError):  # absent, or cut short
        found = _read(entry, training, backbone, device)
        with progress.stage("features", total=1) as stage:
            stage.advance(note="as in an earlier fit")
        return found
    prepared = _compute(training, backbone, wanted, device, precision, seed, scratch, progress)
    _keep(prepared, scratch, entry)
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
    )


def _read(entry: Path, training: TrainingPictures, backbone: StoredBackbone, device: str) -> Prepared:
    record = json.loads((entry / _RECORD).read_text(encoding="utf-8"))
    arrays = {name: np.load(entry / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in record["arrays"]}
    wanted = FeaturesEntry.model_validate(record["wanted"])
    graph = entry / GRAPH_FILE if record["graph"] else None
    projection = None
    if wanted.projection_dim is not None:
        parts = {name: np.load(entry / f"projection.{name}.npy", allow_pickle=False) for name in ("mean", "matrix")}
        projection = Projection.from_arrays(parts)
    network = _network(training, backbone, wanted, projection, graph, device)
    os.utime(entry)
    features = replace(Features.from_arrays(arrays), pictures=training.pictures)
    return Prepared(wanted, graph, record["int8"], projection, network, features)


def _keep(prepared: Prepared, scratch: Path, entry: Path) -> None:
    """Copy what was computed to `entry`; a disk that has no room for it is no failure of the fit."""
    names = [name for name in prepared.features.to_arrays() if name != "pictures"]
    if sum((scratch / f"{name}.npy").stat().st_size for name in names) > ENTRY_BYTES:
        return
    record = {
        "arrays": names,
        "wanted": prepared.wanted.model_dump(),
        "graph": prepared.graph is not None,
        "int8": prepared.int8,
    }
    with suppress(OSError, OODError), staging_folder("features") as folder:
        kept = folder / "entry"
        kept.mkdir()
        for name in names:
            shutil.copyfile(scratch / f"{name}.npy", kept / f"{name}.npy")
        if prepared.graph is not None:
            for file in prepared.graph.parent.iterdir():
                shutil.copyfile(file, kept / file.name)
        if prepared.projection is not None:
            for name, array in prepared.projection.to_arrays().items():
                np.save(kept / f"projection.{name}.npy", array, allow_pickle=False)
        (kept / _RECORD).write_text(json.dumps(record), encoding="utf-8")
        flush_tree(kept)
        entry.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(entry, ignore_errors=True)  # one that could not be read
        os.rename(kept, entry)
        _make_room(entry.parent)


def _make_room(folder: Path) -> None:
    entries = sorted(folder.iterdir(), key=lambda one: one.stat().st_mtime, reverse=True)
    total = 0
    for entry in entries:
        total += sum(file.stat().st_size for file in entry.iterdir())
        if total > ALL_BYTES:
            shutil.rmtree(entry, ignore_errors=True)
