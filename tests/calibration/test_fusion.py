from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from ood_runners.calibration.calibrator import Calibrator
from ood_runners.calibration.fusion import fuse


def test_of_one_detector_it_is_that_detectors_surprise():
    calibrator = Calibrator.fit(np.random.default_rng(0).normal(size=50))
    scores = np.linspace(-3, 12, 40)
    np.testing.assert_allclose(
        fuse({"a": calibrator}, {"a": 0.3}, {"a": scores}), calibrator.surprise(scores), rtol=1e-9
    )


def test_a_tail_that_means_nothing_does_not_outvote_a_detector_that_sees():
    rng = np.random.default_rng(0)
    calibrators = {name: Calibrator.fit(rng.normal(size=100)) for name in ("sees", "shifted")}
    strange = np.arange(200) >= 100
    scores = {"sees": rng.normal(size=200) + 4 * strange, "shifted": rng.normal(30, 8, 200)}
    fused = fuse(calibrators, {"sees": 1.0, "shifted": 0.25}, scores)
    alone = roc_auc_score(strange, scores["sees"])
    assert roc_auc_score(strange, fused) == pytest.approx(alone, abs=0.01)
