"""Raw scores -> p-values, fusion, verdicts and the scale of the anomaly map."""

from __future__ import annotations

from ood_runners.calibration.calibration import Calibration, DetectorJudgement, Judgement
from ood_runners.calibration.calibrator import Calibrator
from ood_runners.calibration.guarantee import attainable_alpha, certificate, needed_for

__all__ = [
    "Calibration",
    "Calibrator",
    "DetectorJudgement",
    "Judgement",
    "attainable_alpha",
    "certificate",
    "needed_for",
]
