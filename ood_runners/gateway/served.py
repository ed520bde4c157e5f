"""What the gateway holds of a version: how to judge by it, and what the runners are not asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ood_runners.artifacts import Stored, read_version
from ood_runners.calibration import Calibration
from ood_runners.calibration.calibrator import Calibrator
from ood_runners.detectors import Detector
from ood_runners.features import Scores, scorer
from ood_runners.pipeline import check_golden, class_names, load_calibration, load_detector, load_golden

FUSED = "fused"  # beside the names of the detectors
LOCAL = frozenset({"softmax"})  # costs less than a hop to a runner


@dataclass(frozen=True)
class ServedPart:
    """What the runners know by one tag: the version's own network with its detectors, or a member's.

    Attributes
    ----------
    tag : what the runners are asked for
    size : height and width of the pictures that it sees
    scorers : detector to what its score is called
    local : the detectors that are scored in this process
    """

    tag: str
    size: tuple[int, int]
    scorers: Mapping[str, str]
    local: Mapping[str, Detector]


@dataclass(frozen=True)
class Served:
    """One version, opened.

    Attributes
    ----------
    product, version, tag : its names
    size : height and width that pictures are resized to
    detectors : what its scores are called
    parts : what the runners are asked for
    calibration : raw scores to p-values and verdicts
    classes : names by class index, where the version knows classes
    golden : uint8 (h, w, 3), the picture that proves a loaded version
    golden_scores : raw score by detector that it had at fit time
    tolerance : how far, relatively, a score may be from that
    picture_s : seconds that it takes here to score one picture, alone
    """

    product: str
    version: str
    tag: str
    size: tuple[int, int]
    detectors: tuple[str, ...]
    parts: Sequence[ServedPart]
    calibration: Calibration
    classes: Sequence[str] | None
    golden: NDArray[np.uint8]
    golden_scores: Mapping[str, float]
    tolerance: float
    picture_s: float = 0.0

    @cached_property
    def scales(self) -> Mapping[str, tuple[float, float]]:
        """The median score of normals and its distance from the score at alpha, by detector and for ``fused``."""
        calibrators = {FUSED: self.calibration.fused, **self.calibration.calibrators}
        return {name: _scale(one, self.calibration.alpha) for name, one in calibrators.items()}

    def class_name(self, index: int | None) -> str | None:
        """The name of a predicted class."""
        return None if index is None or self.classes is None else self.classes[index]

    def check_golden(self, scores: Mapping[str, Scores]) -> None:
        """Raise ArtifactError unless the golden picture scores as it did at fit time."""
        check_golden(self.tag, self.golden_scores, self.tolerance, scores)


def _scale(calibrator: Calibrator, alpha: float) -> tuple[float, float]:
    centre = float(np.median(calibrator.scores))
    return centre, (calibrator.threshold(alpha) - centre) or 1.0  # equal scores have no distance


def load(product: str, version: str) -> Served:
    """Open a version after checking every file of it; raises NotFound and ArtifactError."""
    stored = read_version(product, version)
    manifest = stored.manifest
    return Served(
        product=product,
        version=version,
        tag=str(stored.tag),
        size=(manifest.input.height, manifest.input.width),
        detectors=manifest.scorers,
        parts=[_part(stored), *(_part(stored.member(name), name) for name in manifest.members)],
        calibration=load_calibration(stored),
        classes=class_names(stored),
        golden=load_golden(stored),
        golden_scores=manifest.golden.scores,
        tolerance=manifest.golden.tolerance,
    )


def _part(stored: Stored, member: str = "") -> ServedPart:
    detectors, size = stored.manifest.detectors, stored.manifest.input
    return ServedPart(
        tag=stored.part,
        size=(size.height, size.width),
        scorers={name: scorer(name, member) for name in detectors},
        local={name: load_detector(stored, name) for name in detectors if name in LOCAL},
    )
