"""What a normal picture's anomaly map looks like at each place, and maps measured by it.

Where all pictures show the same at the same place (one part in one pose, a frame full of one surface), some places
are always harder to match than others: edges, gloss, the border that the network pads. A defect is then what is
strange *for its place*. Where objects lie about on an empty ground, the place says little more than "object here,
ground there", and measuring by it would hide the very places where defects are. The two kinds of pictures are told
apart by how much of the maps of held-out normals the place explains: maps of a small bank of a few pictures, since the
share depends on how many entries there are.

References
----------
Defard et al., "PaDiM: a Patch Distribution Modeling Framework for Anomaly Detection and Localization", ICPR 2020 (one
distribution a place; here of the distance, not of the features).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

SIGMA = 1.5  # cells that neighbouring places are averaged over
SHRINKAGE = 0.5  # share of the value of all places in that of each
# Share of the variance from which on the place stands for object and ground, of maps of a bank of so many entries of so
# many pictures in so many folds: 0.69 to 0.82 where objects lie about (efficientnet_lite0: from 0.60), mostly below
# 0.55 where the frame is full (docs/accuracy.md).
MOST_EXPLAINED = 0.58
TRIAL_PICTURES, TRIAL_ENTRIES, TRIAL_FOLDS = 32, 1_000, 5
LEAST_PICTURES = 20  # fewer say too little of each place

FloatMap = NDArray[np.float32]


def explained(maps: FloatMap) -> float:
    """The share, 0 to 1, of the variance inside maps (n, h, w) of normal pictures that the place explains."""
    inside = maps - maps.mean(axis=(1, 2), keepdims=True, dtype=np.float64)
    total = float(inside.var())
    return 1 - float((inside - inside.mean(axis=0)).var()) / total if total > 0 else 0.0


def trial(folds: NDArray[np.int64], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """At most `TRIAL_PICTURES` rows of the pictures that `folds` int64 (n,) are of, as many of each fold as can be, and
    their folds, `TRIAL_FOLDS` at most, each made of whole ones.
    """
    order, rank = np.random.default_rng(seed).permutation(len(folds)), np.empty(len(folds), np.int64)
    for fold in np.unique(folds):
        inside = order[folds[order] == fold]
        rank[inside] = np.arange(len(inside))
    rows = np.sort(np.lexsort((folds, rank))[:TRIAL_PICTURES])
    return rows, np.unique(folds[rows], return_inverse=True)[1] % TRIAL_FOLDS


@dataclass(frozen=True)
class Position:
    """Mean and deviation of normal maps at each place: float32 (h, w), smoothed and drawn towards the overall ones."""

    centre: FloatMap
    spread: FloatMap

    @classmethod
    def fit(cls, maps: FloatMap) -> Self:
        """From maps (n, h, w) of normal pictures that what made the maps had not seen."""
        centre, spread = maps.mean(axis=0, dtype=np.float64), maps.std(axis=0, dtype=np.float64)
        typical = max(float(np.sqrt(np.mean(spread**2))), 1e-6 * max(1.0, float(np.abs(centre).max())))
        return cls(_towards(centre, float(centre.mean())), _towards(spread, typical))

    def apply(self, maps: FloatMap) -> FloatMap:
        """Maps (n, h, w) in deviations from what is usual at each place."""
        return ((maps - self.centre) / self.spread).astype(np.float32)


def _towards(values: NDArray[np.float64], typical: float) -> FloatMap:
    import cv2  # fits need it, scoring does not

    smooth = cv2.GaussianBlur(values, (0, 0), SIGMA, borderType=cv2.BORDER_REFLECT)
    return np.asarray((1 - SHRINKAGE) * smooth + SHRINKAGE * typical, np.float32)


def held_out(
    maps: FloatMap, folds: NDArray[np.int64], normal: NDArray[np.bool_], share: float
) -> tuple[Position, FloatMap] | None:
    """Positions of all normal maps, and each map measured by the normal ones of the other folds; None where place
    should not count.

    `maps` (m, h, w) are of normal pictures and of pictures made from them, `folds` int64 (m,) theirs or their origin's,
    `normal` bool (m,) tells the normal ones, `share` is what the place explains.
    """
    if normal.sum() < LEAST_PICTURES or share > MOST_EXPLAINED:
        return None
    return by_place(maps, folds, normal)


def by_place(maps: FloatMap, folds: NDArray[np.int64], normal: NDArray[np.bool_]) -> tuple[Position, FloatMap]:
    """As `held_out`, where place counts in any case."""
    measured = np.empty_like(maps)
    for fold in np.unique(folds):
        inside = folds == fold
        measured[inside] = Position.fit(maps[normal & ~inside]).apply(maps[inside])
    return Position.fit(maps[normal]), measured
