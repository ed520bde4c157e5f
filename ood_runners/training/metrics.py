"""How well scores and maps separate defects from normals, and how often normals are flagged.

Scores grow with strangeness; a defect is the positive class. A measure that the pictures at hand do not
determine (no defects, no masks, …) is a `Metric` whose value is None and whose reason says why, never an
exception: a user who has only normals still gets a report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score, roc_curve

CONFIDENCE = 0.95
FPR_LIMIT = 0.3
# A map value is tallied by the leading bits of its float32: sign, exponent and 9 bits of mantissa, which is a
# step of 0.2 % at every magnitude. One histogram is then 2 MB whatever the number of pictures, no range has to
# be known beforehand, and pixels that share a bin count as ties (the trapezium between two points).
_BITS = 18
_BINS = 1 << _BITS

NO_DEFECTS = "there are no defective pictures"
NO_NORMALS = "there are no normal pictures"
NO_PICTURES = "there are no pictures"
NOT_FINITE = "some scores are not finite numbers"
NO_MASKS = "no defective picture has a mask"
NO_NORMAL_PIXELS = "the masks leave no normal pixel"


@dataclass(frozen=True)
class Metric:
    """A figure, or None and the reason why there is none."""

    value: float | None
    reason: str | None = None


@dataclass(frozen=True)
class Proportion:
    """`count` of `total` and its exact (Clopper-Pearson) 95 % interval; where total is 0, None and 0 to 1.

    Clopper and Pearson, The use of confidence or fiducial limits illustrated in the case of the binomial,
    Biometrika 26 (1934). Exact here means that it covers at least 95 % of the time, for any count.
    """

    count: int
    total: int
    rate: float | None
    low: float
    high: float

    @classmethod
    def of(cls, count: int, total: int) -> Self:
        """The proportion of `count` in `total` independent trials."""
        if total == 0:
            return cls(0, 0, None, 0.0, 1.0)
        interval = binomtest(count, total).proportion_ci(CONFIDENCE, method="exact")
        return cls(count, total, count / total, float(interval.low), float(interval.high))


def false_alarm_rate(flagged: NDArray[np.bool_], anomalous: NDArray[np.bool_]) -> Proportion:
    """The share of normal pictures that were flagged: both bool (n,)."""
    return Proportion.of(int((flagged & ~anomalous).sum()), int((~anomalous).sum()))


def _undetermined(anomalous: NDArray[np.bool_], scores: NDArray[np.floating[Any]] | None = None) -> str | None:
    """Why two-class measures cannot be had from these pictures, or None where they can."""
    if anomalous.size == 0:
        return NO_PICTURES
    if not anomalous.any():
        return NO_DEFECTS
    if anomalous.all():
        return NO_NORMALS
    if scores is not None and not np.isfinite(scores).all():
        return NOT_FINITE
    return None


def image_auroc(scores: NDArray[np.floating[Any]], anomalous: NDArray[np.bool_]) -> Metric:
    """Area under the ROC curve: the chance that a defect outscores a normal. Scores (n,), anomalous bool (n,)."""
    if reason := _undetermined(anomalous, scores):
        return Metric(None, reason)
    return Metric(float(roc_auc_score(anomalous, scores)))


def average_precision(scores: NDArray[np.floating[Any]], anomalous: NDArray[np.bool_]) -> Metric:
    """Mean precision over the recall steps, without interpolation. Scores (n,), anomalous bool (n,)."""
    if reason := _undetermined(anomalous, scores):
        return Metric(None, reason)
    return Metric(float(average_precision_score(anomalous, scores)))


def fpr_at_tpr(scores: NDArray[np.floating[Any]], anomalous: NDArray[np.bool_], tpr: float = 0.95) -> Metric:
    """The smallest false-positive rate of any threshold that finds at least `tpr` of the defects."""
    if reason := _undetermined(anomalous, scores):
        return Metric(None, reason)
    false_positives, true_positives, _ = roc_curve(anomalous, scores, drop_intermediate=False)
    return Metric(float(false_positives[true_positives >= tpr].min()))


def f1(flagged: NDArray[np.bool_], anomalous: NDArray[np.bool_]) -> Metric:
    """Harmonic mean of precision and recall of the verdicts: both bool (n,). 0 where nothing was flagged."""
    if reason := _undetermined(anomalous):
        return Metric(None, reason)
    return Metric(float(f1_score(anomalous, flagged, zero_division=0.0)))


def resize_mask(mask: NDArray[Any], size: tuple[int, int]) -> NDArray[np.bool_]:
    """A mask (h, w), defect where not 0, as bool at `size` (height, width) by nearest neighbour."""
    marked = (mask != 0).astype(np.uint8)
    if marked.shape != size:
        marked = cv2.resize(marked, (size[1], size[0]), interpolation=cv2.INTER_NEAREST_EXACT)
    return marked.astype(bool)


class PixelTally:
    """Pixel measures of any number of anomaly maps, in bounded memory: add pictures, then ask.

    *Pixel AUROC* is the area under the ROC curve of all pixels of all pictures taken together.

    *AUPRO* is the area under the per-region-overlap curve (Bergmann et al., The MVTec Anomaly Detection Dataset,
    IJCV 129, 2021). A region is a connected component of a mask (8-neighbourhood). At each threshold, PRO is the
    share of a region's pixels whose value is at or above it, averaged over all regions of all pictures, so
    that a small defect counts as much as a large one; FPR is the share of all normal pixels (those that no
    mask marks, the pictures without a defect included) at or above it. PRO is integrated over FPR from 0
    to 0.3 by the trapezium rule, interpolated at the limit, and divided by 0.3: 1 is perfect, and a map of
    chance gives 0.15.

    Values are tallied at a resolution of 0.2 %, which moves either measure by less than 0.0005.
    """

    def __init__(self) -> None:
        self.regions = 0
        self._finite = True
        self._normal = np.zeros(_BINS, np.int64)
        self._defect = np.zeros(_BINS, np.int64)
        self._overlap = np.zeros(_BINS, np.float64)

    def add(self, maps: NDArray[np.float32], masks: Sequence[NDArray[Any] | None]) -> None:
        """Tally maps float32 (n, h, w) with a mask (defect where not 0) for each, or None for a normal picture.

        A mask of another size is brought to the map's by nearest neighbour.
        """
        if not np.isfinite(maps).all():
            self._finite = False
            return
        normal, defect, shares = [], [], []
        for values, mask in zip(_bins(maps), masks, strict=True):
            if mask is None:
                normal.append(values.ravel())
                continue
            marked = resize_mask(mask, (values.shape[0], values.shape[1]))
            count, components = cv2.connectedComponents(marked.astype(np.uint8), connectivity=8)
            inside = components[marked]
            normal.append(values[~marked])
            defect.append(values[marked])
            shares.append(1.0 / np.bincount(inside, minlength=count)[inside])
            self.regions += count - 1
        if normal:
            self._normal += np.bincount(np.concatenate(normal), minlength=_BINS)
        if defect:
            self._defect += np.bincount(np.concatenate(defect), minlength=_BINS)
            self._overlap += np.bincount(np.concatenate(defect), weights=np.concatenate(shares), minlength=_BINS)

    def __add__(self, other: PixelTally) -> PixelTally:
        """The tally of both sets of pictures."""
        both = PixelTally()
        both.regions = self.regions + other.regions
        both._finite = self._finite and other._finite
        both._normal = self._normal + other._normal
        both._defect = self._defect + other._defect
        both._overlap = self._overlap + other._overlap
        return both

    def auroc(self) -> Metric:
        """Pixel AUROC."""
        if reason := self._undetermined():
            return Metric(None, reason)
        fpr, recall = self._curve(self._defect)
        return Metric(float(np.trapezoid(recall, fpr)))

    def aupro(self, limit: float = FPR_LIMIT) -> Metric:
        """AUPRO up to a false-positive rate of `limit`, divided by `limit`."""
        if reason := self._undetermined():
            return Metric(None, reason)
        fpr, overlap = self._curve(self._overlap)
        below = fpr < limit
        x = np.append(fpr[below], limit)
        y = np.append(overlap[below], np.interp(limit, fpr, overlap))
        return Metric(float(np.trapezoid(y, x) / limit))

    def _undetermined(self) -> str | None:
        if not self._finite:
            return NOT_FINITE
        if self.regions == 0:
            return NO_MASKS
        if not self._normal.any():
            return NO_NORMAL_PIXELS
        return None

    def _curve(self, hits: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Shares of normal pixels and of `hits` at or above each threshold, from the highest down; starts at (0, 0)."""
        used = np.flatnonzero(self._normal + self._defect)[::-1]
        fpr = np.concatenate([[0.0], np.cumsum(self._normal[used])])
        recall = np.concatenate([[0.0], np.cumsum(hits[used])])
        return fpr / fpr[-1], recall / recall[-1]


def _bins(maps: NDArray[np.float32]) -> NDArray[np.int64]:
    """The bin of each value, in the values' order: float32 of any shape to int64 of the same."""
    # Adding 0 turns -0.0 into 0.0. A positive float's bits order as an integer; a negative one's in reverse.
    bits = (maps.astype(np.float32, copy=False) + np.float32(0)).view(np.int32)
    ordered = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))
    return (ordered.astype(np.int64) >> (32 - _BITS)) + _BINS // 2
