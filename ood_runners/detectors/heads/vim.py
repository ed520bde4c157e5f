"""Virtual-logit matching: the length outside the principal space of normal features, against the energy.

References
----------
Wang et al., "ViM: Out-Of-Distribution with Virtual-logit Matching", CVPR 2022.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ood_runners.detectors.heads.base import Activations, Head, Linear
from ood_runners.detectors.heads.confidence import energy
from ood_runners.errors import DataError


@dataclass(frozen=True)
class VirtualLogit(Head):
    """The virtual logit of the residual, less the logarithm of the summed exponentials of the real ones.

    The paper's principal space has 1,000 dimensions, from 200,000 pictures. Here it has a third as many as there are
    pictures (and at most half as many as features), and the virtual logit's factor, the mean highest logit over the
    mean residual, takes the residuals of pictures that their own principal space has not seen: those of fitted
    pictures are too short by far where there are fewer pictures than features.

    Attributes
    ----------
    origin : float32 (d,), where the logits are nearest to 0
    principal : float32 (d, r), orthonormal columns
    factor : float32 (1,)
    """

    name = "vim"
    needs_features = True
    needs_linear = True

    origin: NDArray[np.float32]
    principal: NDArray[np.float32]
    factor: NDArray[np.float32]

    @classmethod
    def fit(cls, seen: Activations, linear: Linear | None, labels: NDArray[np.int64]) -> Self:
        """The principal space of all pictures; the factor from halves, each in the space of the other."""
        if linear is None:
            raise DataError("The vim head needs the weights of the classifier's final layer.")
        origin = linear.origin.astype(np.float32)
        centred = seen.features() - origin
        halves = np.arange(len(centred)) % 2
        unseen = [
            _residual(centred[halves == half], _principal(centred[halves != half])).mean()
            for half in (0, 1)
            if (halves == half).any() and (halves != half).any()
        ]
        typical = float(np.mean(unseen)) if unseen else 1.0
        factor = abs(float(seen.logits.max(axis=1).mean())) / max(typical, 1e-12)
        return cls(origin, _principal(centred), np.array([factor], np.float32))

    def score(self, seen: Activations) -> NDArray[np.float32]:
        """Float32 (n,)."""
        return self.factor * _residual(seen.features() - self.origin, self.principal) + energy(seen.logits)


def _principal(centred: NDArray[np.float32]) -> NDArray[np.float32]:
    """Orthonormal columns float32 (d, r): where the second moments of (n, d) are largest."""
    n, d = centred.shape
    rank = min(max(1, n // 3), max(1, d // 2))
    x = centred.astype(np.float64)
    if n < d:  # the same directions, from the smaller of the two products
        values, left = np.linalg.eigh(x @ x.T)
        basis = x.T @ left[:, -rank:] / np.sqrt(np.maximum(values[-rank:], np.finfo(np.float64).tiny))
    else:
        basis = np.linalg.eigh(x.T @ x)[1][:, -rank:]
    return np.ascontiguousarray(basis, np.float32)


def _residual(centred: NDArray[np.float32], principal: NDArray[np.float32]) -> NDArray[np.float32]:
    """Length float32 (n,) of what lies outside the principal space."""
    return np.asarray(np.linalg.norm(centred - (centred @ principal) @ principal.T, axis=1), np.float32)
