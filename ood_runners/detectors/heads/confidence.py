"""Heads that read the logits alone: nothing is learned from the normal pictures.

References
----------
Hendrycks and Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural
Networks", ICLR 2017 (maximum softmax).
Hendrycks et al., "Scaling Out-of-Distribution Detection for Real-World Settings", ICML 2022 (maximum logit).
Liu et al., "Energy-based Out-of-distribution Detection", NeurIPS 2020.
Liu et al., "GEN: Pushing the Limits of Softmax-Based Out-of-Distribution Detection", CVPR 2023.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ood_runners.detectors.heads.base import Activations, Head, Linear

GEN_POWER = 0.1
GEN_CLASSES = 100


def energy(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """``-logsumexp`` of logits (n, k): float32 (n,)."""
    highest = logits.max(axis=1)
    return np.asarray(-(highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1))), np.float32)


def _others(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """``exp(logit - highest logit)``, with 0 in the place of the highest: (n, k)."""
    others = np.exp(logits - logits.max(axis=1, keepdims=True))
    others[np.arange(len(logits)), logits.argmax(axis=1)] = 0
    return others


@dataclass(frozen=True)
class _Confidence(Head):
    """A head without fitted arrays."""

    @classmethod
    def fit(cls, seen: Activations, linear: Linear | None, labels: NDArray[np.int64]) -> Self:
        """Nothing to learn."""
        return cls()


@dataclass(frozen=True)
class MaximumSoftmax(_Confidence):
    """One minus the highest softmax probability."""

    name = "msp"

    def score(self, seen: Activations) -> NDArray[np.float32]:
        """In 0..1; summed over the other classes, which keeps its digits where one class is almost certain."""
        rest = _others(seen.logits).sum(axis=1)
        return np.asarray(rest / (1 + rest), np.float32)


@dataclass(frozen=True)
class MaximumLogit(_Confidence):
    """Minus the highest logit."""

    name = "max_logit"

    def score(self, seen: Activations) -> NDArray[np.float32]:
        """Float32 (n,)."""
        return np.asarray(-seen.logits.max(axis=1), np.float32)


@dataclass(frozen=True)
class Energy(_Confidence):
    """Minus the logarithm of the summed exponentials of the logits."""

    name = "energy"

    def score(self, seen: Activations) -> NDArray[np.float32]:
        """Float32 (n,)."""
        return energy(seen.logits)


@dataclass(frozen=True)
class GeneralisedEntropy(_Confidence):
    """``sum p^0.1 (1 - p)^0.1`` over the 100 highest softmax probabilities p."""

    name = "gen"

    def score(self, seen: Activations) -> NDArray[np.float32]:
        """Float32 (n,)."""
        others = np.sort(_others(seen.logits.astype(np.float64)), axis=1)[:, ::-1][:, : GEN_CLASSES - 1]
        total = 1 + _others(seen.logits.astype(np.float64)).sum(axis=1, keepdims=True)
        p = others / total
        highest = 1 / total[:, 0]
        rest = (total[:, 0] - 1) / total[:, 0]  # 1 - highest, with its digits
        terms = (p * (1 - p)) ** GEN_POWER
        return np.asarray(terms[:, : seen.logits.shape[1] - 1].sum(axis=1) + (highest * rest) ** GEN_POWER, np.float32)
