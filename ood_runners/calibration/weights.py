"""How much each detector counts in the fused score: rules that need no anomalous picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ood_runners.features import detector_of

# Patches see small defects that the pooled detectors cannot. With a quarter for Mahalanobis the fused score was within
# 0.1 points of the better of the two on eight sets, with a half 0.9 behind on one (docs/accuracy.md).
INSPECTION = {"memory_bank": 1.0, "mahalanobis": 0.25, "vae": 0.3, "softmax": 0.02}
# Pictures of many kinds: no patch of a new one is expected to have been seen, and what it shows is what counts.
CATEGORIES = {"memory_bank": 0.02, "mahalanobis": 0.1, "vae": 0.02, "softmax": 1.0}
# With class folders Mahalanobis has a mean for each, and sees more than one Gaussian of everything.
FOLDERS = CATEGORIES | {"mahalanobis": 0.5}
MIN_CONFIDENCE = 0.5
MIN_CATEGORIES = 10
_SIDES: tuple[Literal["left"], Literal["right"]] = ("left", "right")


def knows_pictures(logits: NDArray[np.floating] | None) -> bool:
    """Whether a head's own categories describe the normal pictures: logits (n, k).

    It does where it is sure of most pictures (median of the highest softmax probability at least 0.5) and
    they fall into many categories (10 or more, as counted by the inverse Simpson index).
    """
    if logits is None or not len(logits):
        return False
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True), dtype=np.float64)
    confidence = 1.0 / shifted.sum(axis=1)
    shares = np.bincount(logits.argmax(axis=1)) / len(logits)
    return bool(np.median(confidence) >= MIN_CONFIDENCE and 1.0 / np.sum(shares**2) >= MIN_CATEGORIES)


def fusion_weights(names: Iterable[str], *, folders: bool, categories: bool) -> dict[str, float]:
    """The weight of each score in `names`, in their order: a detector's, shared by the members that have it.

    `folders` says that the pictures came in class folders, `categories` that a head `knows_pictures`.
    """
    table = FOLDERS if folders else CATEGORIES if categories else INSPECTION
    detectors = {name: detector_of(name) for name in names}
    sharers = Counter(detectors.values())
    return {name: table[detector] / sharers[detector] for name, detector in detectors.items()}


def weights_from_probes(
    prior: Mapping[str, float], probes: Mapping[str, NDArray[np.floating]], normals: Mapping[str, NDArray[np.floating]]
) -> dict[str, float]:
    """The prior weights, less for each detector that tells synthetic defects from normals worse than the best does.

    A detector keeps of its prior weight what its skill is of the best one's. Skill is how many standard deviations
    lie between two normal distributions that are told apart as well, which are the best weights of independent scores
    that are added up. So a detector that sees nothing counts for nothing, and among those that see nearly all the
    rare mistakes still tell. Synthetic defects are no real ones: small, where real ones may be gross, so they lower a
    weight and never raise it above the prior. Both mappings hold scores, float (m,) and (n,), by detector.
    """
    skill = {name: _skill(normals[name], probes[name]) for name in prior}
    best = max(skill.values())
    if best <= 0:
        return dict(prior)
    return {name: weight * skill[name] / best for name, weight in prior.items()}


def _skill(normals: NDArray[np.floating], probes: NDArray[np.floating]) -> float:
    """Standard deviations between normals and probes, but for a factor; 0 or more.

    Half a mistake is added, so that n normals without one do not speak of perfection.
    """
    n = len(normals)
    return max(0.0, NormalDist().inv_cdf((_auroc(normals, probes) * n + 0.5) / (n + 1)))


def _auroc(normals: NDArray[np.floating], probes: NDArray[np.floating]) -> float:
    """The chance that a probe outscores a normal picture, ties as one half."""
    ordered = np.sort(normals)
    below, upto = (np.searchsorted(ordered, probes, side=side) for side in _SIDES)
    return float((below + upto).mean() / (2 * len(ordered)))
