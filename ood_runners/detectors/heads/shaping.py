"""Heads that reshape the features before they read the energy of the logits.

References
----------
Sun et al., "ReAct: Out-of-distribution Detection With Rectified Activations", NeurIPS 2021.
Xu et al., "Scaling for Training Time and Post-hoc Out-of-distribution Detection Enhancement", ICLR 2024 (SCALE).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ood_runners.detectors.heads.base import Activations, Head, Linear
from ood_runners.detectors.heads.confidence import energy
from ood_runners.errors import DataError

REACT_QUANTILE = 0.9
SCALE_PERCENTILE = 0.85


@dataclass(frozen=True)
class React(Head):
    """The energy once every feature is cut at the 90th percentile of the normal pictures' features.

    Attributes
    ----------
    weight : float16 (k, d)
    bias : float32 (k,)
    ceiling : float32 (1,)
    """

    name = "react"
    needs_features = True
    needs_linear = True

    weight: NDArray[np.float16]
    bias: NDArray[np.float32]
    ceiling: NDArray[np.float32]

    @classmethod
    def fit(cls, seen: Activations, linear: Linear | None, labels: NDArray[np.int64]) -> Self:
        """The ceiling, from the normal pictures."""
        layer = _needed(linear)
        ceiling = np.quantile(seen.features(), REACT_QUANTILE)
        return cls(layer.weight.astype(np.float16), layer.bias, np.array([ceiling], np.float32))

    def score(self, seen: Activations) -> NDArray[np.float32]:
        """Float32 (n,)."""
        return energy(self._layer(np.minimum(seen.features(), self.ceiling)))

    @cached_property
    def _layer(self) -> Linear:
        return Linear(self.weight.astype(np.float32), self.bias)


@dataclass(frozen=True)
class Scale(Head):
    """The energy once all features are multiplied by ``exp(r)``.

    r is the sum of a picture's features over the sum of its 15 % largest: the fewer features carry a picture, the
    smaller r. The final layer being linear, its new logits follow from the old ones and its bias.

    Attributes
    ----------
    bias : float32 (k,)
    """

    name = "scale"
    needs_features = True
    needs_linear = True

    bias: NDArray[np.float32]

    @classmethod
    def fit(cls, seen: Activations, linear: Linear | None, labels: NDArray[np.int64]) -> Self:
        """Keeps the bias."""
        return cls(_needed(linear).bias)

    def score(self, seen: Activations) -> NDArray[np.float32]:
        """Float32 (n,)."""
        features = seen.features()
        count = features.shape[1] - round(features.shape[1] * SCALE_PERCENTILE)
        largest = np.partition(features, -count, axis=1)[:, -count:].sum(axis=1)
        total = features.sum(axis=1)
        # Features that are all 0, or that are not rectified, have no such share.
        ratio = np.divide(total, largest, out=np.ones_like(total), where=(largest > 0) & (total > 0))
        return energy((seen.logits - self.bias) * np.exp(ratio)[:, None] + self.bias)


def _needed(linear: Linear | None) -> Linear:
    if linear is None:
        raise DataError("This out-of-distribution head needs the weights of the classifier's final layer.")
    return linear
