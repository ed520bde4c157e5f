"""Mahalanobis distance of pooled features to Gaussians of normal pictures: wrong part, wrong camera, global change.

References
----------
Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial
Attacks", NeurIPS 2018.
Ren et al., "A Simple Fix to Mahalanobis Distance for Improving Near-OOD Detection", 2021 (the relative form).
Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", 2004.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ood_runners.detectors.base import Detector
from ood_runners.detectors.checks import pooled_features
from ood_runners.errors import ArtifactError, DataError
from ood_runners.features import Features, Scores

ROWS = 1_024  # pictures at once, in float64
RELATIVE_RANK = 1e-10  # eigenvalues below this share of the largest are rounding
RELATIVE_FLOOR = 1e-8  # smallest variance, as a share of the mean square: keeps features that never vary finite


@dataclass(frozen=True)
class Gaussian:
    """A Gaussian with the covariance ``(1 - s) S + s m I``, kept by the r directions in which the sample S varies.

    The shrunk matrix has the eigenvectors of S, and the one eigenvalue ``s m`` in all other directions. So
    whitening needs r <= n - 1 vectors of d numbers rather than a d x d factor: exact, small when there are
    fewer pictures than features, and nothing is inverted.

    Attributes
    ----------
    mean : float32 (d,)
    basis : float32 (d, r), orthonormal columns
    scale : float32 (r,), one over the standard deviation along each of them
    floor : float32 (1,), one over the standard deviation along all other directions
    """

    mean: NDArray[np.float32]
    basis: NDArray[np.float32]
    scale: NDArray[np.float32]
    floor: NDArray[np.float32]

    @classmethod
    def fit(
        cls, features: NDArray[np.float32], means: NDArray[np.float64] | None = None, *, rest: float | None = None
    ) -> Gaussian:
        """Ledoit-Wolf estimate from (n, d); with `means` (n, d), of the deviations from each row's own mean.

        `rest` is the variance in the directions that the sample says nothing of, instead of the estimate's own.
        """
        n, d = features.shape
        mean = features.mean(axis=0, dtype=np.float64)
        sides = min(n, d)
        products = np.zeros((sides, sides))
        lengths, mean_square = np.empty(n), 0.0  # squared lengths of the deviations; mean square of the features
        for start in range(0, n, n if n <= d else ROWS):
            rows = slice(start, start + (n if n <= d else ROWS))
            part = features[rows].astype(np.float64)
            mean_square += float(np.vdot(part, part)) / (n * d)
            part -= mean if means is None else means[rows]
            lengths[rows] = np.einsum("ij,ij->i", part, part)
            # The smaller of the two products has the same variances, and is far quicker than singular values.
            products += part @ part.T if n <= d else part.T @ part
        shrinkage = _shrinkage(products, lengths, d)
        variances, vectors = np.linalg.eigh(products / n)
        kept = variances > max(RELATIVE_RANK * float(variances.max()), np.finfo(np.float32).tiny)
        variances, vectors = variances[kept], vectors[:, kept]
        basis = part.T @ (vectors / np.sqrt(n * variances)) if n <= d else vectors
        if rest is None:
            least = max(RELATIVE_FLOOR * mean_square, 1e-12)
            rest = max(shrinkage * float(lengths.mean()) / d, least)
        scale = 1 / np.sqrt((1 - shrinkage) * variances + rest)
        return cls(
            mean.astype(np.float32),
            np.ascontiguousarray(basis, dtype=np.float32),
            scale.astype(np.float32),
            np.array([1 / np.sqrt(rest)], np.float32),
        )

    @property
    def rest(self) -> float:
        """The variance in all directions outside the basis."""
        return float(1 / self.floor[0] ** 2)

    def whiten(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Coordinates whose squared length is the squared Mahalanobis distance to the mean.

        (n, d) to float32 (n, r + d), or (n, d) when r = d and nothing lies outside the basis.
        """
        centred = features - self.mean
        inside = centred @ self.basis
        if self.basis.shape[0] == self.basis.shape[1]:
            return (inside * self.scale).astype(np.float32, copy=False)
        # What is left is taken from the vector, not from its length: a difference of squares would cancel.
        outside = centred - inside @ self.basis.T
        return np.concatenate([inside * self.scale, outside * self.floor], axis=1)

    def squared_distance(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Squared Mahalanobis distance to the mean, (n, d) to float32 (n,)."""
        return _square(self.whiten(features))


class Mahalanobis(Detector):
    """Squared Mahalanobis distance on pooled features, per channel, averaged over layers.

    Each layer has its own Gaussian, and its squared distance is divided by its number of channels, so that a
    typical picture is near 1 in each and a wide layer does not drown the others (one Gaussian of the joined
    layers was far less accurate where one of the layers says nothing).

    With labels there is one mean a class and a covariance that the classes share; the score is the distance to
    the nearest class. Its relative form takes away the distance to one Gaussian of all pictures, which
    removes what all classes have in common; it can be negative. Outside the span of the fitted pictures both count
    alike. Without labels the relative form has no
    meaning, and the score is the plain distance.

    Parameters
    ----------
    layers : names of pooled layers; None takes all that are there at fit
    relative : the relative form, where there are labels

    Attributes
    ----------
    gaussians_ : Gaussian of each layer (within classes, where there are labels)
    backgrounds_ : Gaussian of all pictures for each layer; empty unless relative and labelled
    class_means_ : float32 (classes, channels) of each layer; empty without labels
    classes_ : int64 (classes,), the labels; None without
    """

    name = "mahalanobis"

    def __init__(self, *, layers: Sequence[str] | None = None, relative: bool = True) -> None:
        self.layers = layers
        self.relative = relative

    def params(self) -> dict[str, Any]:
        return {"layers": None if self.layers is None else list(self.layers), "relative": self.relative}

    def fit(self, features: Features, labels: NDArray[np.int64] | None = None) -> Self:
        """Fit on ``features.pooled[layer]`` float32 (n, channels); `labels` int64 (n,) are class indices."""
        layers = list(features.pooled) if self.layers is None else list(self.layers)
        if not layers:
            raise DataError("The Mahalanobis detector needs pooled features of at least one layer.")
        n = len(features)
        if n < 2:
            raise DataError(f"The Mahalanobis detector needs at least 2 pictures to fit, not {n}.")
        self.gaussians_: dict[str, Gaussian] = {}
        self.backgrounds_: dict[str, Gaussian] = {}
        self.class_means_: dict[str, NDArray[np.float32]] = {}
        self.classes_: NDArray[np.int64] | None = None
        rows = np.empty(0, np.int64)
        if labels is not None:
            self.classes_, rows = np.unique(np.asarray(labels, np.int64), return_inverse=True)
            if n - len(self.classes_) < 1:
                raise DataError(
                    "Each class has a single picture, which leaves no variation within classes; "
                    "give at least two pictures a class."
                )
        for layer in layers:
            x = pooled_features(features, layer)
            if self.classes_ is None:
                self.gaussians_[layer] = Gaussian.fit(x)
                continue
            means = np.stack([x[rows == c].mean(axis=0, dtype=np.float64) for c in range(len(self.classes_))])
            self.class_means_[layer] = means.astype(np.float32)
            self.gaussians_[layer] = Gaussian.fit(x, means[rows])
            if self.relative:
                # With a larger floor, what is far from all classes would come out as the most normal.
                self.backgrounds_[layer] = Gaussian.fit(x, rest=self.gaussians_[layer].rest)
        return self

    def score(self, features: Features) -> Scores:
        """``image`` float32 (n,); with labels also ``predicted`` int64 (n,), the label of the nearest class."""
        if self.classes_ is None:
            plain = np.zeros(len(features), np.float32)
            for layer, gaussian in self.gaussians_.items():
                x = pooled_features(features, layer, len(gaussian.mean))
                plain += gaussian.squared_distance(x) / x.shape[1]
            return Scores(image=plain / np.float32(len(self.gaussians_)))
        to_classes = np.zeros((len(features), len(self.classes_)), np.float32)
        background = np.zeros(len(features), np.float32)
        for layer, gaussian in self.gaussians_.items():
            x = pooled_features(features, layer, len(gaussian.mean))
            means = gaussian.whiten(self.class_means_[layer])
            for i, row in enumerate(gaussian.whiten(x)):
                to_classes[i] += _square(means - row) / x.shape[1]
            if layer in self.backgrounds_:
                background += self.backgrounds_[layer].squared_distance(x) / x.shape[1]
        nearest = to_classes.argmin(axis=1)
        distance = to_classes[np.arange(len(features)), nearest] - background
        return Scores(image=distance / np.float32(len(self.gaussians_)), predicted=self.classes_[nearest])

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        arrays: dict[str, NDArray[Any]] = {}
        for kind, gaussians in (("gaussian", self.gaussians_), ("background", self.backgrounds_)):
            for layer, gaussian in gaussians.items():
                arrays |= {f"{kind}.{field}.{layer}": array for field, array in vars(gaussian).items()}
        arrays |= {f"class_means.{layer}": means for layer, means in self.class_means_.items()}
        return arrays if self.classes_ is None else arrays | {"classes": self.classes_}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], params: Mapping[str, Any]) -> Self:
        detector = cls(**params)
        try:
            detector.gaussians_ = _gaussians(arrays, "gaussian")
            detector.backgrounds_ = _gaussians(arrays, "background")
            detector.classes_ = arrays.get("classes")
            labelled = [] if detector.classes_ is None else detector.gaussians_
            detector.class_means_ = {layer: arrays[f"class_means.{layer}"] for layer in labelled}
        except KeyError as error:
            raise ArtifactError(f"The stored Mahalanobis detector lacks the array {error}.") from error
        if not detector.gaussians_:
            raise ArtifactError("The stored Mahalanobis detector has no Gaussian.")
        return detector


def _gaussians(arrays: Mapping[str, NDArray[Any]], kind: str) -> dict[str, Gaussian]:
    prefix = f"{kind}.mean."
    layers = [name.removeprefix(prefix) for name in arrays if name.startswith(prefix)]
    fields = ("mean", "basis", "scale", "floor")
    return {layer: Gaussian(*(arrays[f"{kind}.{field}.{layer}"] for field in fields)) for layer in layers}


def _shrinkage(products: NDArray[np.float64], lengths: NDArray[np.float64], d: int) -> float:
    """Ledoit and Wolf's shrinkage (their lemmas 3.2 to 3.4) of n deviations of d features, 0 to 1.

    From the products of the deviations X, X X^T or X^T X, whose squares have one sum, and from their squared lengths
    (n,): no more memory than that, whatever n.
    """
    n = len(lengths)
    if d == 1:
        return 0.0
    mean_variance = float(lengths.mean()) / d
    squares = float(np.vdot(products, products)) / n**2
    spread = squares / d - mean_variance**2
    noise = (float(np.vdot(lengths, lengths)) / n - squares) / (n * d)
    return 0.0 if noise <= 0 or spread <= 0 else min(noise / spread, 1.0)


def _square(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.einsum("ij,ij->i", rows, rows)
