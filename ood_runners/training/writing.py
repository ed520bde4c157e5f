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
from ood_runners.artifacts.files import list_files
from ood_runners.artifacts.manifest import MEMBERS, LeftOutFile
from ood_runners.artifacts.store import VersionWriter
from ood_runners.backbones.runtime import choose_device
from ood_runners.calibration import Calibration, certificate
from ood_runners.detectors import Detector, MemoryBank
from ood_runners.features import Scores, scorer
from ood_runners.pipeline import CALIBRATION, GOLDEN, INT8, PROJECTION, Product
from ood_runners.training import contamination as contaminated
from ood_runners.training.attention import Attention
from ood_runners.training.augment import AUGMENTED, LIGHT, PERCENT
from ood_runners.training.datasets import Dataset
from ood_runners.training.pictures import TrainingPictures
from ood_runners.training.prepare import Prepared
from ood_runners.training.profiles import MB, Budget, Profile, best_batch, milliseconds_by_batch
from ood_runners.training.progress import Progress
from ood_runners.training.storing import StoredBackbone

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
class FittedPart:
    """What came of one network: its detectors, and their scores of the pictures calibrated on and of the probes.

    `training` are the pictures that were fitted on.
    """

    task: Task
    training: TrainingPictures
    prepared: Prepared
    detectors: Mapping[str, Detector]
    held_out: Mapping[str, Scores]
    probed: Mapping[str, Scores]
    attention: Attention | None

    def save(self, folder: Path) -> None:
        """Write the files of the network and its detectors."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, detector in self.detectors.items():
            save_arrays(folder, name, detector.to_arrays())
        if self.prepared.projection is not None:
            save_arrays(folder, PROJECTION, self.prepared.projection.to_arrays())
        if self.prepared.graph is not None:
            for file in self.prepared.graph.parent.iterdir():
                shutil.copyfile(file, folder / file.name)

    def entries(self, weights: Mapping[str, float], member: str = "") -> dict[str, Any]:
        """What the manifest says of the network and its detectors; `weights` are those of all scores."""
        info, (height, width) = self.task.backbone.info, self.task.profile.size
        return {
            "backbone": {
                "name": info.name,
                "tag": str(self.task.backbone.tag),
                "sha256": info.sha256,
                "origin": info.origin,
                "precision": "float32" if self.prepared.graph is None else INT8,
            },
            "input": {"height": height, "width": width},
            "features": self.prepared.wanted,
            "detectors": {
                name: {
                    "params": detector.params(),
                    "info": {"weight": weights[scorer(name, member)]}
                    | detector.info()
                    | self.task.augmentation(name)
                    | self._learned(name),
                }
                for name, detector in self.detectors.items()
            },
        }

    def _learned(self, name: str) -> dict[str, Any]:
        """What the manifest says of what a detector learned from labelled defects."""
        return {} if self.attention is None or name != MemoryBank.name else self.attention.facts()


@dataclass(frozen=True)
class Fitted:
    """What came of it all: the version's `own` network and its `members`, by name.

    `held_out` are all scores of the pictures that are calibrated on, whose places among all training pictures
    are `rows`.
    """

    own: FittedPart
    members: Mapping[str, FittedPart]
    left_out: Sequence[LeftOutFile]
    rows: NDArray[np.int64]
    held_out: Mapping[str, Scores]
    calibration: Calibration
    seconds: Mapping[str, float]

    @property
    def parts(self) -> list[FittedPart]:
        """Its own and the members'."""
        return [self.own, *self.members.values()]


def write(
    writer: VersionWriter, product: str, task: Task, fitted: Fitted, notes: Sequence[str], started: float
) -> Manifest:
    """Write the files, open them again and score the golden picture with what was written; the manifest.

    `started` is when the fit began, a time of ``time.monotonic()``.
    """
    fitted.own.save(writer.path)
    for name, member in fitted.members.items():
        member.save(writer.path / MEMBERS / name)
    save_arrays(writer.path, CALIBRATION, fitted.calibration.to_arrays())
    save_arrays(writer.path, "thumbnails", thumbnails(fitted.own.training.pictures))
    golden = task.training.pictures[fitted.rows[_typical(fitted)]]
    (writer.path / GOLDEN).write_bytes(images.encode_png(golden))
    calibration, data = fitted.calibration, fitted.own.training
    int8 = {scorer("int8", name): part.prepared.int8 for name, part in [("", fitted.own), *fitted.members.items()]}
    listed = {one.path for one in fitted.left_out}
    # The store hashes the files when it seals them; until then their names are enough to open them.
    unsealed = dict.fromkeys(list_files(writer.path), "0" * 64)
    manifest = Manifest.model_validate(
        {
            "product": product,
            **fitted.own.entries(calibration.weights),
            "members": {name: one.entries(calibration.weights, name) for name, one in fitted.members.items()},
            "metrics": {name: facts for name, facts in int8.items() if facts},
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
    backbones = [part.task.backbone for part in fitted.parts]
    paths = {str(backbone.tag): backbone.path for backbone in backbones}
    opened = Product.open(Stored(writer.path, writer.tag, manifest, paths), task.device)
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
        "mb": round(sum((writer.path / name).stat().st_size for name in list_files(writer.path)) / MB, 2),
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
