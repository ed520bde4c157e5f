"""One scale for the maps of all detectors: 0 is typical of normals, 1 is alarming."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ood_runners import maps
from ood_runners.calibration.calibrator import Calibrator
from ood_runners.features import Scores

SIGMA = 4.0  # pixels of a 224-pixel output, as in PatchCore
CHUNK = 32
FloatMap = NDArray[np.float32]


@dataclass(frozen=True)
class MapScale:
    """Brings one detector's map to ``(map - centre) / (level - centre)``.

    Of held-out normals' maps, up-sampled and smoothed, `centre` is the median pixel and `level` what the highest pixel
    of one exceeds with probability alpha.
    """

    centre: float
    level: float

    def apply(self, raw: FloatMap) -> FloatMap:
        """Calibrated maps of any size: float32 of the same shape."""
        return ((raw - self.centre) / (self.level - self.centre)).astype(np.float32)


def fit_scale(held_out: FloatMap, size: tuple[int, int], alpha: float) -> MapScale:
    """From raw held-out maps (n, h, w), looked at in the output's `size`, a few at a time."""
    highest, medians = [], []
    for large in _enlarged(held_out, size):
        flat = large.reshape(len(large), -1)
        highest.append(flat.max(axis=1))
        medians.append(np.median(flat, axis=1))
    calibrator = Calibrator.fit(np.concatenate(highest))
    centre = float(np.median(np.concatenate(medians)))
    level = calibrator.threshold(alpha)
    # A detector whose map never varies would divide by zero.
    return MapScale(centre, max(level, centre + 1e-6 * max(1.0, abs(centre))))


def combine(
    scores: Mapping[str, Scores], scales: Mapping[str, MapScale], weights: Mapping[str, float], size: tuple[int, int]
) -> FloatMap:
    """Weighted mean of the detectors' calibrated maps, smoothed: float32 (n, H, W).

    Enlarging and smoothing are linear, so the scale is applied before them, and the sum alone is smoothed.
    """
    total = sum(weights[name] for name in scales)
    parts: list[FloatMap] = []
    for name, scale in scales.items():
        raw = scores[name].map
        if raw is None:
            raise ValueError(f"{name} was calibrated with a map and now has none")
        parts.append(maps.upscale(scale.apply(raw) * np.float32(weights[name] / total), size))
    return maps.smooth(np.sum(parts, axis=0, dtype=np.float32), SIGMA)


def highest_of(
    scores: Mapping[str, Scores], scales: Mapping[str, MapScale], weights: Mapping[str, float], size: tuple[int, int]
) -> NDArray[np.float64]:
    """The highest pixel of each picture's combined map: float64 (n,)."""
    n = len(next(iter(scores.values())))
    highest = []
    for start in range(0, n, CHUNK):
        part = {name: one[start : start + CHUNK] for name, one in scores.items()}
        highest.append(combine(part, scales, weights, size).reshape(len(next(iter(part.values()))), -1).max(axis=1))
    return np.concatenate(highest).astype(np.float64)


def _enlarged(raw: FloatMap, size: tuple[int, int]) -> Iterator[FloatMap]:
    for start in range(0, len(raw), CHUNK):
        yield maps.smooth(maps.upscale(raw[start : start + CHUNK], size), SIGMA)
