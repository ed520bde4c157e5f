"""The contract of a detector."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from ood_runners.features import Features, Scores

TOP_FRACTION = 0.01


@dataclass(frozen=True)
class Probes:
    """Pictures made from training pictures, such as synthetic defects.

    Attributes
    ----------
    features : of m pictures
    origin : int64 (m,), the training picture that each was made from; no detector that has seen it scores the probe
    """

    features: Features
    origin: NDArray[np.int64]

    def of(self, folds: NDArray[np.int64], fold: int) -> NDArray[np.int64]:
        """Indices of the probes made from the pictures of this fold."""
        return np.flatnonzero(np.asarray(folds)[self.origin] == fold)


class Detector(ABC):
    """Features in, raw scores out; knows nothing of BentoML, HTTP or thresholds.

    As in scikit-learn: the constructor only stores its parameters under their own names, ``fit`` learns
    attributes that end in ``_`` and returns self. A batch of n scores as n batches of one.
    ``to_arrays`` and ``from_arrays`` carry the fitted state; it is numbers only, never pickled objects.
    """

    name: ClassVar[str]
    localises: ClassVar[bool] = False

    @abstractmethod
    def params(self) -> dict[str, Any]:
        """The constructor's parameters, as JSON values."""

    @abstractmethod
    def fit(self, features: Features, labels: NDArray[np.int64] | None = None) -> Self:
        """Learn from normal pictures. Arrays may be memory-mapped and large: read them in chunks.

        `labels` int64 (n,) are class indices where the user has class folders.
        """

    def fit_held_out(
        self,
        features: Features,
        folds: NDArray[np.int64],
        labels: NDArray[np.int64] | None = None,
        *,
        probes: Probes | None = None,
    ) -> Scores:
        """Fit on all pictures and return each one's score under a detector fitted without its fold.

        `folds` int64 (n,) is the fold of each picture. These scores calibrate the detector: no picture
        is judged by a detector that has seen it. The scores of the m `probes`, by the detectors that have not seen
        their origin, follow those of the n pictures.
        """
        parts: list[Scores] = []
        order: list[NDArray[np.int64]] = []
        for fold in np.unique(folds):
            inside, outside = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
            rest = type(self)(**self.params())
            rest.fit(features[outside], None if labels is None else labels[outside])
            parts.append(rest.score(features[inside]))
            order.append(inside)
            if probes is not None and len(made := probes.of(folds, fold)):
                parts.append(rest.score(probes.features[made]))
                order.append(len(features) + made)
        self.fit(features, labels)
        return Scores.concatenate(parts)[np.argsort(np.concatenate(order))]

    @abstractmethod
    def score(self, features: Features) -> Scores:
        """Raw scores of n pictures; larger is stranger."""

    def open(self) -> None:  # noqa: B027 (most have nothing to do)
        """Compile, say, what the first ``score`` would otherwise wait for."""

    def info(self) -> dict[str, Any]:
        """What else is worth recording of the fitted detector, as JSON values."""
        return {}

    @abstractmethod
    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """The fitted state."""

    @classmethod
    @abstractmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], params: Mapping[str, Any]) -> Self:
        """A fitted detector from what `to_arrays` and `params` gave."""


def top_mean(maps: NDArray[np.float32], fraction: float = TOP_FRACTION) -> NDArray[np.float32]:
    """Mean of the highest `fraction` of each map, at least one cell: (n, h, w) to float32 (n,).

    Less at the mercy of a single noisy patch than the maximum.
    """
    flat = maps.reshape(len(maps), -1)
    count = top_count(flat.shape[1], fraction)
    top = np.partition(flat, flat.shape[1] - count, axis=1)[:, -count:]
    return top.mean(axis=1, dtype=np.float32)


def top_count(cells: int, fraction: float = TOP_FRACTION) -> int:
    """How many cells of a map `top_mean` looks at."""
    return max(1, round(fraction * cells))
