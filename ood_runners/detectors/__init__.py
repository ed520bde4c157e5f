"""Detectors: features of pictures in, raw scores out. Importing this imports neither torch nor scikit-learn."""

from __future__ import annotations

from ood_runners.detectors.base import Detector
from ood_runners.detectors.mahalanobis import Mahalanobis
from ood_runners.detectors.memory_bank import MemoryBank
from ood_runners.detectors.softmax import Softmax
from ood_runners.detectors.vae import Vae

DETECTORS: dict[str, type[Detector]] = {kind.name: kind for kind in (MemoryBank, Mahalanobis, Vae, Softmax)}

__all__ = ["DETECTORS", "Detector", "Mahalanobis", "MemoryBank", "Softmax", "Vae"]
