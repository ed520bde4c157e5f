"""Several detectors' scores as one: the weighted sum of their surprises."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from ood_runners.calibration.calibrator import Calibrator

MAX_GROUPS = 200
Weigh = Callable[[Mapping[str, NDArray[np.floating]]], Mapping[str, float]]


def fuse(
    calibrators: Mapping[str, Calibrator], weights: Mapping[str, float], scores: Mapping[str, NDArray[np.floating]]
) -> NDArray[np.float64]:
    """Sum over detectors of weight times surprise: scores (m,) each to float64 (m,).

    With equal weights and independent detectors this is Fisher's statistic. They are not independent, so
    nothing is read from its law: it is one more score, calibrated like any other.
    """
    return np.sum([weights[name] * calibrators[name].surprise(scores[name]) for name in calibrators], axis=0)


def fuse_held_out(scores: Mapping[str, NDArray[np.floating]], weigh: Weigh) -> NDArray[np.float64]:
    """The fused score of each calibration picture, by calibrators and weights that have not seen it: float64 (n,).

    Calibrators fitted without the picture (without its group of 1 in 200 where there are more) treat it as
    they will treat a new one; a picture ranked among scores that include its own would look less strange. The same
    goes for the weights: `weigh` gives them from the scores of normal pictures, and is given those of the others.
    """
    n = len(next(iter(scores.values())))
    groups = np.arange(n) % MAX_GROUPS
    fused = np.empty(n)
    for group in range(min(n, MAX_GROUPS)):
        inside = groups == group
        others = {name: values[~inside] for name, values in scores.items()}
        rest = {name: Calibrator.fit(values) for name, values in others.items()}
        fused[inside] = fuse(rest, weigh(others), {name: values[inside] for name, values in scores.items()})
    return fused
