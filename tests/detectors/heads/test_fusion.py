"""Standardised heads, averaged."""

from __future__ import annotations

import numpy as np
import pytest

from ood_runners.detectors.heads import HEADS, Standard, fused
from ood_runners.detectors.heads.fusion import FITTED, TRAINED


def test_the_default_heads_exist() -> None:
    assert set(TRAINED) | set(FITTED) <= set(HEADS)


def test_by_hand() -> None:
    normals = np.arange(101, dtype=np.float64)
    standard = Standard.fit(normals)
    assert standard.centre == 50 and standard.spread == pytest.approx(normals.std())
    np.testing.assert_allclose(standard(np.array([50.0, 50 + normals.std()])), [0, 1])
    # Below all but a twentieth of the normals a head says no more, and another's alarm stands.
    assert standard(np.array([-1000.0])) == standard(np.array([5.0]))
    both = fused([standard, standard], [np.array([-1e6]), np.array([50 + 4 * normals.std()])])
    assert both.dtype == np.float32 and both[0] > 1


def test_one_head_keeps_its_scores_and_equal_scores_have_a_scale() -> None:
    scores = np.array([-3.5, 2.0], np.float32)
    np.testing.assert_array_equal(fused([Standard.none()], [scores]), scores)
    equal = Standard.fit(np.full(5, 7.0))
    assert np.isfinite(equal(np.array([7.0, 8.0]))).all() and equal(np.array([8.0])) > equal(np.array([7.0]))
