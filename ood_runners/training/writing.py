"""A fitted version's files and its manifest."""

from __future__ import annotations

import io
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ood_runners import images
from ood_runners.artifacts import Manifest, Stored, save_arrays
from ood_runners.artifacts.manifest import LeftOutFile
from ood_runners.artifacts.store import VersionWriter
from ood_runners.backbones.runtime import choose_device
from ood_runners.calibration import Calibration, certificate
from ood_runners.detectors import Detector, MemoryBank
from ood_runners.features import Scores
from ood_runners.pipeline import CALIBRATION, GOLDEN, INT8, PROJECTION, Product
from ood_runners.training import contamination as contaminated
from ood_runners.training.attention import Attention
from ood_runners.training.augment import AUGMENTED, LIGHT, PERCENT
from ood_runners.training.datasets import Dataset
from ood_runners.training.extract import StoredBackbone
from ood_runners.training.pictures import TrainingPictures
from ood_runners.training.prepare import Prepared
from ood_runners.training.profiles import MB, Budget, Profile, best_batch, milliseconds_by_batch
from ood_runners.training.progress import Progress

FOLDS = 10
GOLDEN_TOLERANCE = 0.01  # relative; another processor's rounding stays below 0.001, another resize does not
THUMBNAIL = 96  # pixels


@dataclass(frozen=True)
class Task:
    """What is to be fitted, on what and how; see `fit.fit`."""

    dataset: Dataset
    training: TrainingPictures
    backbone: StoredBackbone
    names: Sequence[str]
    head: str
    profile: Profile
    search: str
    budget: Budget
    alpha: float
    seed: int
    device: str
    precision: str
    progress: Progress
    augment: str | None = None
    contamination: str = contaminated.AUTO
    defects: Path | None = None

    def augmentation(self, name: str) -> dict[str, Any]:
        """What the manifest says of a detector that was fitted under other light."""
        augmented = self.augment == LIGHT and name in AUGMENTED
        return {"augment": {"brightness_percent": list(PERCENT)}} if augmented else {}


@dataclass(frozen=True)
class Fitted:
    """What came of it.

    `training` are the pictures that were fitted on; `held_out` scores are those of the pictures that are calibrated on,
    whose places among all training pictures are `rows`.
    """

    training: TrainingPictures
    left_out: Sequence[LeftOutFile]
    rows: NDArray[np.int64]
    detectors: Mapping[str, Detector]
    held_out: Mapping[str, Scores]
    calibration: Calibration
    prepared: Prepared
    seconds: Mapping[str, float]
    attention: Attention | None = None

    def facts(self, name: str) -> dict[str, Any]:
        """What the manifest says of what a detector learned from labelled defects."""
        return {} if self.attention is None or name != MemoryBank.name else self.attention.facts()


def write(
    writer: VersionWriter, product: str, task: Task, fitted: Fitted, notes: Sequence[str], started: float
) -> Manifest:
    """Write the files, open them again and score the golden picture with what was written; the manifest.

    `started` is when the fit began, a time of ``time.monotonic()``.
    """
    for name, detector in fitted.detectors.items():
        save_arrays(writer.path, name, detector.to_arrays())
    save_arrays(writer.path, CALIBRATION, fitted.calibration.to_arrays())
    if fitted.prepared.projection is not None:
        save_arrays(writer.path, PROJECTION, fitted.prepared.projection.to_arrays())
    if fitted.prepared.graph is not None:
        for file in fitted.prepared.graph.parent.iterdir():
            shutil.copyfile(file, writer.path / file.name)
    save_arrays(writer.path, "thumbnails", thumbnails(fitted.training.pictures))
    golden = task.training.pictures[fitted.rows[_typical(fitted)]]
    (writer.path / GOLDEN).write_bytes(images.encode_png(golden))
    info, calibration, data = task.backbone.info, fitted.calibration, fitted.training
    listed = {one.path for one in fitted.left_out}
    # The store hashes the files when it seals them; until then their names are enough to open them.
    unsealed = {path.name: "0" * 64 for path in writer.path.iterdir()}
    manifest = Manifest.model_validate(
        {
            "product": product,
            "backbone": {
                "name": info.name,
                "tag": str(task.backbone.tag),
                "sha256": info.sha256,
                "origin": info.origin,
                "precision": "float32" if fitted.prepared.graph is None else INT8,
            },
            "metrics": {"int8": fitted.prepared.int8} if fitted.prepared.int8 else {},
            "input": {"height": task.profile.size[0], "width": task.profile.size[1]},
            "features": fitted.prepared.wanted,
            "detectors": {
                name: {
                    "params": detector.params(),
                    "info": {"weight": calibration.weights[name]}
                    | detector.info()
                    | task.augmentation(name)
                    | fitted.facts(name),
                }
                for name, detector in fitted.detectors.items()
            },
            "calibration": {
                "method": "cross-fitted",
                "n": calibration.n,
                "folds": min(FOLDS, calibration.n),
                "alpha_requested": calibration.alpha_requested,
                "alpha": calibration.alpha,
                "certificate": certificate(calibration.alpha, calibration.n),
            },
            "data": {
                "layout": task.dataset.layout,
                "fingerprint": data.fingerprint,
                "train_count": len(data.pictures),
                "left_out": list(fitted.left_out),
                "suspects": [path for path in _outliers(task, fitted) if path not in listed],
                "skipped": [{"path": path, "reason": reason} for path, reason in data.skipped],
                "classes": task.dataset.classes or None,
            },
            "golden": {"scores": {}, "p_value": 1.0, "tolerance": GOLDEN_TOLERANCE},
            "notes": [*notes, *contaminated.notes(fitted.left_out, calibration.n, calibration.alpha)],
            "files": unsealed,
        }
    )
    opened = Product.open(Stored(writer.path, writer.tag, manifest, task.backbone.path), task.device)
    judged = opened.judge(golden[np.newaxis])[0]
    raw = {name: one.score for name, one in judged.detectors.items()}
    seconds = {stage: round(value, 2) for stage, value in fitted.seconds.items()}
    taken = milliseconds_by_batch(lambda size: opened.judge(np.repeat(golden[np.newaxis], size, axis=0)))
    cost = {
        "seconds": seconds | {"all": round(time.monotonic() - started, 2)},
        "ms": round(taken[1], 2),
        "ms_by_batch": {str(size): round(ms, 2) for size, ms in taken.items()},
        "batch": best_batch(taken),
        "device": choose_device(task.device),
        "mb": round(sum(file.stat().st_size for file in writer.path.iterdir()) / MB, 2),
    }
    if task.budget:
        cost["budget"] = {"ms": task.budget.ms, "mb": task.budget.mb}
    return manifest.model_copy(
        update={
            "golden": manifest.golden.model_copy(update={"scores": raw, "p_value": judged.p_value}),
            "cost": cost,
            "files": {},
        }
    )


def _outliers(task: Task, fitted: Fitted) -> list[str]:
    """The pictures among those calibrated on that look unlike all others."""
    rows = fitted.rows[fitted.calibration.outliers(fitted.held_out)]
    return [task.training.files[i].path.relative_to(task.dataset.root).as_posix() for i in rows]


def _typical(fitted: Fitted) -> int:
    """The picture whose held-out p-values lie nearest the middle."""
    calibration = fitted.calibration
    p = [calibration.calibrators[name].p_value(scores.image) for name, scores in fitted.held_out.items()]
    return int(np.abs(np.array(p) - 0.5).max(axis=0).argmin())


def thumbnails(pictures: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """JPEG bytes of all pictures, joined, and where each begins: what a bank entry's source looked like."""
    joined = io.BytesIO()
    offsets = [0]
    height, width = pictures.shape[1:3]
    scale = THUMBNAIL / max(height, width)
    for picture in pictures:
        small = images.resize(picture, (max(1, round(height * scale)), max(1, round(width * scale))))
        joined.write(images.encode_jpeg(small, 80))
        offsets.append(joined.tell())
    return {"jpeg": np.frombuffer(joined.getvalue(), np.uint8), "offsets": np.array(offsets, np.int64)}
