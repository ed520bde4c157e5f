"""Out-of-distribution heads: strangeness, read from a classifier's features and logits; NumPy alone.

None of them wins everywhere, so the default is a few of different kinds together (see `fusion`).
"""

from __future__ import annotations

from ood_runners.detectors.heads.base import Activations, Head, Linear
from ood_runners.detectors.heads.confidence import Energy, GeneralisedEntropy, MaximumLogit, MaximumSoftmax
from ood_runners.detectors.heads.distance import NearestNeighbour, RelativeMahalanobis
from ood_runners.detectors.heads.fusion import Standard, fused
from ood_runners.detectors.heads.shaping import React, Scale
from ood_runners.detectors.heads.vim import VirtualLogit

HEADS: dict[str, type[Head]] = {
    head.name: head
    for head in (
        MaximumSoftmax,
        MaximumLogit,
        Energy,
        GeneralisedEntropy,
        VirtualLogit,
        RelativeMahalanobis,
        NearestNeighbour,
        React,
        Scale,
    )
}

__all__ = ["HEADS", "Activations", "Head", "Linear", "Standard", "fused"]
