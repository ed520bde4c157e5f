"""Several heads as one score: the mean of their standardised scores.

Each head is put on the scale of its own scores of held-out normal pictures, and cut off below: that a classifier is
surer than of nearly all normal pictures is no evidence that a picture is normal, since far from all that it was
shown a linear layer can be as sure as it likes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

LOWEST = 0.05  # share of the normal pictures below which a head says no more
# Which heads make the default follows from where the final layer comes from. A network's own was trained on far more
# pictures than are here, so its logits carry: outside the space of the normal features, how the probability is
# spread, how few features carry it.
TRAINED = ("vim", "gen", "scale")
# One fitted on the user's own pictures knows nothing of other directions: distances to those pictures carry.
FITTED = ("knn", "relative_mahalanobis", "vim", "gen")


@dataclass(frozen=True)
class Standard:
    """A head's usual scores: ``max((score - centre) / spread, lowest)``."""

    centre: float
    spread: float
    lowest: float

    @classmethod
    def fit(cls, scores: NDArray[np.floating]) -> Self:
        """From the scores (n,) of held-out normal pictures."""
        centre = float(np.median(scores))
        spread = float(np.std(scores)) or max(abs(centre), 1.0) * 1e-6
        return cls(centre, spread, (float(np.quantile(scores, LOWEST)) - centre) / spread)

    @classmethod
    def none(cls) -> Self:
        """Leaves scores as they are."""
        return cls(0.0, 1.0, -np.inf)

    def __call__(self, scores: NDArray[np.floating]) -> NDArray[np.float64]:
        """Standardised scores (n,)."""
        return np.maximum((np.asarray(scores, np.float64) - self.centre) / self.spread, self.lowest)


def fused(standards: Sequence[Standard], scores: Sequence[NDArray[np.floating]]) -> NDArray[np.float32]:
    """The mean over heads of each one's standardised scores (n,): float32 (n,)."""
    parts = [standard(values) for standard, values in zip(standards, scores, strict=True)]
    return np.mean(parts, axis=0).astype(np.float32)
