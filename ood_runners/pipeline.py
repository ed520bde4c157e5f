"""A stored version, opened for scoring: whole in one process, or part by part for the runners."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ood_runners import images
from ood_runners.artifacts import Manifest, Stored
from ood_runners.artifacts.names import kept_networks
from ood_runners.backbones import BackboneInfo, FeatureNetwork, Projection
from ood_runners.backbones.spec import GRAPH_FILE
from ood_runners.calibration import Calibration, Judgement
from ood_runners.detectors import DETECTORS, Detector
from ood_runners.errors import ArtifactError
from ood_runners.features import Features, Scores, scorer

CALIBRATION, PROJECTION, GOLDEN = "calibration", "projection", "golden.png"
INT8 = "int8"  # a precision of the backbone; its graph is in the version
PIXEL_DETECTORS = frozenset({"vae"})  # look at pictures, not at the backbone's features


def load_network(stored: Stored, device: str = "auto", threads: int | None = None) -> FeatureNetwork:
    """The version's feature network: its backbone with what its detectors need, and no more."""
    manifest = stored.manifest
    projection = Projection.from_arrays(stored.arrays(PROJECTION)) if manifest.features.projection_dim else None
    return FeatureNetwork.load(
        stored.backbone_path,
        size=(manifest.input.height, manifest.input.width),
        patch_layers=manifest.features.patch_layers,
        pooled_layers=manifest.features.pooled_layers,
        logits=manifest.features.logits,
        projection=projection,
        neighbourhood=manifest.features.neighbourhood,
        device=device,
        threads=threads,
        graph=stored.path / GRAPH_FILE if manifest.backbone.precision == INT8 else None,
        kept=kept_networks(),
    )


def load_detector(stored: Stored, name: str, device: str = "auto", threads: int | None = None) -> Detector:
    """One of the version's detectors, fitted.

    Raises
    ------
    ArtifactError
        The version has no such detector, or one that this release does not know.
    """
    entry = stored.manifest.detectors.get(name)
    if entry is None or name not in DETECTORS:
        raise ArtifactError(f"{stored.tag} has no detector {name!r} that this release can load.")
    detector = DETECTORS[name].from_arrays(stored.arrays(name), entry.params)
    place(detector, device, threads)
    return detector


def place(detector: Detector, device: str, threads: int | None) -> None:
    """Tell a detector that runs a network of its own where to run it; others compute with NumPy."""
    for attribute, value in (("device", device), ("threads", threads)):
        if hasattr(detector, attribute):
            setattr(detector, attribute, value)


def load_calibration(stored: Stored) -> Calibration:
    """The version's calibration."""
    return Calibration.from_arrays(stored.arrays(CALIBRATION), stored.manifest.scorers)


def load_golden(stored: Stored) -> NDArray[np.uint8]:
    """The golden picture, uint8 (h, w, 3) at the version's input size."""
    return images.read(stored.path / GOLDEN)


def check_golden(tag: str, expected: Mapping[str, float], tolerance: float, scores: Mapping[str, Scores]) -> None:
    """Raise ArtifactError unless the golden picture's `scores` are, relatively, those it had at fit time."""
    for name, score in expected.items():
        found = float(scores[name].image[0])
        if not abs(found - score) <= tolerance * max(1.0, abs(score)):
            raise ArtifactError(
                f"{tag} does not reproduce its golden picture: {name} gives {found:.6g} and gave {score:.6g} when it "
                "was fitted; fit it again on this machine."
            )


def class_names(stored: Stored) -> Sequence[str] | None:
    """Names of the classes that ``predicted`` counts: the user's folders, or the network's own; None without."""
    if stored.manifest.data.classes:
        return stored.manifest.data.classes
    return BackboneInfo.load(stored.backbone_path).classes if stored.manifest.features.logits else None


def score_all(
    network: FeatureNetwork | None, detectors: Mapping[str, Detector], pictures: NDArray[np.uint8]
) -> dict[str, Scores]:
    """Raw scores of pictures, uint8 (n, h, w, 3), by each detector; one pass of the backbone serves them all."""
    features = replace(Features() if network is None else network(pictures), pictures=pictures)
    return {name: detector.score(features) for name, detector in detectors.items()}


@dataclass(frozen=True)
class Part:
    """A network, the size (h, w) of the pictures it sees, and the detectors that look at what it makes of them.

    `network` is None where no detector looks at features.
    """

    size: tuple[int, int]
    network: FeatureNetwork | None
    detectors: Mapping[str, Detector]

    @classmethod
    def open(cls, stored: Stored, device: str = "auto", threads: int | None = None) -> Self:
        """Of a version, or of a member of it (`Stored.member`); raises ArtifactError where something does not load."""
        names, size = tuple(stored.manifest.detectors), stored.manifest.input
        return cls(
            size=(size.height, size.width),
            network=load_network(stored, device, threads) if set(names) - PIXEL_DETECTORS else None,
            detectors={name: load_detector(stored, name, device, threads) for name in names},
        )

    def raw_scores(self, pictures: NDArray[np.uint8]) -> dict[str, Scores]:
        """Each detector's raw scores of pictures, uint8 (n, h, w, 3), of this size or larger."""
        return score_all(self.network, self.detectors, images.resize_all(pictures, self.size))


@dataclass(frozen=True)
class Product:
    """A version with everything it needs to judge pictures in this process.

    `own` is its own network with its detectors, `members` are those beside it; `classes` are the names that a
    judgement's ``predicted`` counts.
    """

    manifest: Manifest
    path: Path
    own: Part
    members: Mapping[str, Part]
    calibration: Calibration
    classes: Sequence[str] | None

    @classmethod
    def open(cls, stored: Stored, device: str = "auto", threads: int | None = None) -> Self:
        """Load every part; raises ArtifactError where one does not load."""
        return cls(
            manifest=stored.manifest,
            path=stored.path,
            own=Part.open(stored, device, threads),
            members={name: Part.open(stored.member(name), device, threads) for name in stored.manifest.members},
            calibration=load_calibration(stored),
            classes=class_names(stored),
        )

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width, in pixels, that pictures must have; members see them no larger."""
        return self.own.size

    def raw_scores(self, pictures: NDArray[np.uint8]) -> dict[str, Scores]:
        """Raw scores of pictures, uint8 (n, h, w, 3) at the input size, by the names of `Manifest.scorers`."""
        scores = self.own.raw_scores(pictures)
        for name, member in self.members.items():
            scores |= {scorer(detector, name): one for detector, one in member.raw_scores(pictures).items()}
        return scores

    def judge(self, pictures: NDArray[np.uint8], alpha: float | None = None) -> list[Judgement]:
        """A judgement a picture; see `Calibration.judge`."""
        return self.calibration.judge(self.raw_scores(pictures), alpha)

    def anomaly_maps(self, scores: Mapping[str, Scores], size: tuple[int, int]) -> NDArray[Any]:
        """Calibrated maps float32 (n, H, W); see `Calibration.anomaly_map`."""
        return self.calibration.anomaly_map(scores, size)
