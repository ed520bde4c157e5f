"""Detectors: features of pictures in, raw scores out. Importing this imports neither torch nor scikit-learn."""

from __future__ import annotations

from ood_runners.detectors.base import Detector
from ood_runners.detectors.memory_bank import MemoryBank

DETECTORS: dict[str, type[Detector]] = {detector.name: detector for detector in (MemoryBank,)}

__all__ = ["DETECTORS", "Detector", "MemoryBank"]
