"""One detector's scores on held-out normals, and what they say of a new score."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

TAIL_FRACTION = 0.2
MIN_TAIL = 5


@dataclass(frozen=True)
class Calibrator:
    """Held-out scores of n normal pictures, sorted: float64 (n,).

    `p_value` is the conformal p-value (Vovk et al. 2005; Bates et al. 2023): if a picture is exchangeable
    with the calibration pictures, P(p <= alpha) <= alpha for every alpha. It needs no model of the scores.
    `surprise` is a continuous, strictly increasing ``-log p`` that goes on beyond the largest calibration
    score with an exponential tail. It is a model, used to rank and to combine, never to decide.
    """

    scores: NDArray[np.float64]

    @classmethod
    def fit(cls, scores: ArrayLike) -> Calibrator:
        """From held-out scores (n,), in any order; raises ValueError for none or for NaN."""
        ordered = np.sort(np.asarray(scores, np.float64))
        if ordered.ndim != 1 or not len(ordered) or not np.isfinite(ordered).all():
            raise ValueError("calibration needs at least one score, and every score finite")
        return cls(ordered)

    @property
    def n(self) -> int:
        return len(self.scores)

    @property
    def smallest_p(self) -> float:
        """The smallest p-value that n calibration pictures can give: 1 / (n + 1)."""
        return 1.0 / (self.n + 1)

    def p_value(self, scores: ArrayLike) -> NDArray[np.float64]:
        """``(1 + #{calibration >= score}) / (n + 1)`` of each score: (m,) to float64 (m,)."""
        below = np.searchsorted(self.scores, np.asarray(scores, np.float64), side="left")
        return np.asarray((1.0 + self.n - below) / (self.n + 1.0), np.float64)

    def threshold(self, alpha: float) -> float:
        """The score above which ``p_value <= alpha``: infinite where alpha cannot be attained."""
        allowed = int(np.floor(alpha * (self.n + 1) + 1e-9)) - 1  # calibration scores that may lie at or above
        return float("inf") if allowed < 0 else float(self.scores[max(self.n - 1 - allowed, 0)])

    def surprise(self, scores: ArrayLike) -> NDArray[np.float64]:
        """Model-based ``-log p`` of each score, strictly increasing: (m,) to float64 (m,).

        Linear interpolation of the empirical log survival up to the start of the upper tail, and from
        there the peaks-over-threshold model with an exponential tail (Pickands 1975, shape 0), whose
        scale is the mean excess of the calibration scores.
        """
        start, scale, level = self._tail
        knots, survival = self._body
        values = np.asarray(scores, np.float64)
        inside = np.interp(values, knots, survival)
        above = level + (values - start) / scale
        # A score below all calibration scores is no surprise, but keeps its rank among such scores.
        under = survival[0] * np.exp(np.minimum((values - knots[0]) / scale, 0.0))
        return np.where(values >= start, above, np.where(values < knots[0], under, inside))

    def _tail_count(self) -> int:
        return min(max(MIN_TAIL, round(TAIL_FRACTION * self.n)), self.n)

    @cached_property
    def _body(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Scores below the tail and at its start, each once, and their surprises."""
        start, _, level = self._tail
        body = self.scores[: self.n - self._tail_count()]
        knots, first = np.unique(np.append(body, start), return_index=True)
        return knots, np.append(-np.log1p(-(np.arange(len(body)) + 0.5) / (self.n + 1.0)), level)[first]

    @cached_property
    def _tail(self) -> tuple[float, float, float]:
        """Start of the tail, its scale, and the surprise at its start."""
        count = self._tail_count()
        start = float(self.scores[self.n - count])
        excess = float((self.scores[self.n - count :] - start).mean())
        # Equal scores have no excess: fall back to the spread of all, then to the scores' own size.
        scale = excess or float(self.scores.std()) or max(abs(start), 1.0) * 1e-6
        return start, scale, float(-np.log(min((count + 0.5) / (self.n + 1.0), 1.0)))
