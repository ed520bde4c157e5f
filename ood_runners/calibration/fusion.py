"""Several detectors' scores as one: the weighted geometric mean of their surprises."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from ood_runners.calibration.calibrator import Calibrator

MAX_GROUPS = 200
Weigh = Callable[[Mapping[str, NDArray[np.floating]]], Mapping[str, float]]
Rule = Callable[
    [Mapping[str, Calibrator], Mapping[str, float], Mapping[str, NDArray[np.floating]]], NDArray[np.float64]
]


def fuse(
    calibrators: Mapping[str, Calibrator], weights: Mapping[str, float], scores: Mapping[str, NDArray[np.floating]]
) -> NDArray[np.float64]:
    """Weighted geometric mean of ``1 + surprise``, less 1: scores (m,) each to float64 (m,).

    Beyond the largest calibration score a surprise is extrapolated, without bound. In a sum one detector's tail then
    outvotes all others: where normal pictures vary in a way that a pooled detector has not seen, it alone ranks them.
    In logarithms a detector that is surprised ten times as much has a larger say, and not ten times the say. Of one
    detector it is that detector's surprise. It is one more score, calibrated like any other.
    """
    total = sum(weights[name] for name in calibrators)
    logs = [weights[name] / total * np.log1p(calibrators[name].surprise(scores[name])) for name in calibrators]
    return np.expm1(np.sum(logs, axis=0))


def add(
    calibrators: Mapping[str, Calibrator], weights: Mapping[str, float], scores: Mapping[str, NDArray[np.floating]]
) -> NDArray[np.float64]:
    """Sum of weight times surprise, float64 (m,): large where any one detector is far beyond its calibration."""
    return np.sum([weights[name] * calibrators[name].surprise(scores[name]) for name in calibrators], axis=0)


def fuse_held_out(scores: Mapping[str, NDArray[np.floating]], weigh: Weigh, rule: Rule = fuse) -> NDArray[np.float64]:
    """The fused score of each calibration picture, by calibrators and weights that have not seen it: float64 (n,).

    Calibrators fitted without the picture (without its group of 1 in 200 where there are more) treat it as
    they will treat a new one; a picture ranked among scores that include its own would look less strange. The same
    goes for the weights: `weigh` gives them from the scores of normal pictures, and is given those of the others.
    `rule` is how surprises become one score.
    """
    n = len(next(iter(scores.values())))
    groups = np.arange(n) % MAX_GROUPS
    fused = np.empty(n)
    for group in range(min(n, MAX_GROUPS)):
        inside = groups == group
        others = {name: values[~inside] for name, values in scores.items()}
        rest = {name: Calibrator.fit(values) for name, values in others.items()}
        fused[inside] = rule(rest, weigh(others), {name: values[inside] for name, values in scores.items()})
    return fused
