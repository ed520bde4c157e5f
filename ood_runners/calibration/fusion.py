"""Several detectors' scores as one: the weighted sum of their surprises."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ood_runners.calibration.calibrator import Calibrator

MAX_GROUPS = 200


def fuse(
    calibrators: Mapping[str, Calibrator], weights: Mapping[str, float], scores: Mapping[str, NDArray[np.floating]]
) -> NDArray[np.float64]:
    """Sum over detectors of weight times surprise: scores (m,) each to float64 (m,).

    With equal weights and independent detectors this is Fisher's statistic. They are not independent, so
    nothing is read from its law: it is one more score, calibrated like any other.
    """
    return np.sum([weights[name] * calibrators[name].surprise(scores[name]) for name in calibrators], axis=0)


def fuse_held_out(scores: Mapping[str, NDArray[np.floating]], weights: Mapping[str, float]) -> NDArray[np.float64]:
    """The fused score of each calibration picture, by calibrators that have not seen it: float64 (n,).

    Calibrators fitted without the picture (without its group of 1 in 200 where there are more) treat it as
    they will treat a new one; a picture ranked among scores that include its own would look less strange.
    """
    n = len(next(iter(scores.values())))
    groups = np.arange(n) % MAX_GROUPS
    fused = np.empty(n)
    for group in range(min(n, MAX_GROUPS)):
        inside = groups == group
        rest = {name: Calibrator.fit(values[~inside]) for name, values in scores.items()}
        fused[inside] = fuse(rest, weights, {name: values[inside] for name, values in scores.items()})
    return fused
