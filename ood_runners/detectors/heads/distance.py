"""Heads that measure distances to the normal pictures' features, each scaled to length 1.

References
----------
Sun et al., "Out-of-Distribution Detection with Deep Nearest Neighbors", ICML 2022.
Ren et al., "A Simple Fix to Mahalanobis Distance for Improving Near-OOD Detection", 2021 (relative Mahalanobis).
Müller and Hein, "Mahalanobis++: Improving OOD Detection via Feature Normalization", ICML 2025 (length 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ood_runners.detectors.heads.base import Activations, Head, Linear
from ood_runners.detectors.mahalanobis import Gaussian
from ood_runners.errors import ArtifactError, DataError


def unit(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each row scaled to length 1: (n, d)."""
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return np.asarray(features / np.maximum(length, np.finfo(np.float32).tiny), np.float32)


@dataclass(frozen=True)
class NearestNeighbour(Head):
    """One minus the cosine of the angle to the nearest normal picture.

    Attributes
    ----------
    bank : float16 (m, d), the normal pictures
    """

    name = "knn"
    needs_features = True

    bank: NDArray[np.float16]

    @classmethod
    def fit(cls, seen: Activations, linear: Linear | None, labels: NDArray[np.int64]) -> Self:
        """Keeps the pictures."""
        return cls(unit(seen.features()).astype(np.float16))

    def score(self, seen: Activations) -> NDArray[np.float32]:
        """In 0..2."""
        return np.asarray(1 - (unit(seen.features()) @ self._columns).max(axis=1), np.float32)

    @cached_property
    def _columns(self) -> NDArray[np.float32]:
        return np.ascontiguousarray(self.bank.T, np.float32)


@dataclass(frozen=True)
class RelativeMahalanobis(Head):
    """Squared Mahalanobis distance to the nearest class, less that to one Gaussian of all classes.

    Both covariances end in the same floor, so that what lies outside the span of the normal pictures counts alike
    in the two, and strange pictures do not come out as the least strange by the larger floor of the second.

    Attributes
    ----------
    within, overall : Gaussian of the deviations from each class's mean, and of all pictures
    means : float32 (classes, d)
    """

    name = "relative_mahalanobis"
    needs_features = True

    within: Gaussian
    overall: Gaussian
    means: NDArray[np.float32]

    @classmethod
    def fit(cls, seen: Activations, linear: Linear | None, labels: NDArray[np.int64]) -> Self:
        """One mean for each class, one covariance that they share."""
        x = unit(seen.features())
        classes, rows = np.unique(labels, return_inverse=True)
        if len(classes) >= len(x):
            raise DataError(
                "The relative_mahalanobis head needs at least two pictures of some class; "
                "give more pictures, or choose another head."
            )
        means = np.stack([x[rows == c].mean(axis=0, dtype=np.float64) for c in range(len(classes))])
        within = Gaussian.fit(x, means[rows])
        return cls(within, Gaussian.fit(x, rest=within.rest), means.astype(np.float32))

    def score(self, seen: Activations) -> NDArray[np.float32]:
        """Float32 (n,), divided by the number of features; may be negative."""
        x = unit(seen.features())
        points = self.within.whiten(x)
        nearest = np.array([_squares(self._classes - point).min() for point in points], np.float32)
        return (nearest - self.overall.squared_distance(x)) / np.float32(x.shape[1])

    @cached_property
    def _classes(self) -> NDArray[np.float32]:
        return self.within.whiten(self.means)

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """The means, and the two Gaussians' arrays."""
        arrays: dict[str, NDArray[Any]] = {"means": self.means}
        for kind, gaussian in (("within", self.within), ("overall", self.overall)):
            arrays |= {f"{kind}.{field}": array for field, array in vars(gaussian).items()}
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """The inverse of `to_arrays`."""
        try:
            within, overall = (
                Gaussian(*(arrays[f"{kind}.{field}"] for field in ("mean", "basis", "scale", "floor")))
                for kind in ("within", "overall")
            )
            return cls(within, overall, arrays["means"])
        except KeyError as error:
            raise ArtifactError(f"The stored head {cls.name} lacks the array {error}.") from error


def _squares(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(np.einsum("nd,nd->n", rows, rows))
