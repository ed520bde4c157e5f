"""Each change does what its label says, more of it at each strength, and nothing at none."""

from __future__ import annotations

import numpy as np
import pytest

from ood_runners.training.changes import CHANGES, Change, blur, brightness, contrast, noise, shift
from tests.training.brightness import picture

NONE = {"noise": 0.0, "shift": 0.0, "darker": 0.0, "brighter": 0.0, "less contrast": 0.0, "more contrast": 0.0}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.name)
def test_stronger_is_further_from_the_picture(change: Change) -> None:
    original = noise(picture(0, size=224), 8)
    before = original.copy()
    results = [change.apply(original, strength) for strength in change.strengths]
    assert all(one.shape == original.shape and one.dtype == np.uint8 for one in results)
    distances = [np.abs(one.astype(int) - original).mean() for one in results]
    assert 0 < distances[0] < distances[1] < distances[2]
    np.testing.assert_array_equal(original, before)
    np.testing.assert_array_equal(results[1], change.apply(original, change.strengths[1]))
    assert f"{change.strengths[0]:g}" in change.label(change.strengths[0])


@pytest.mark.parametrize("change", [one for one in CHANGES if one.name in NONE], ids=lambda change: change.name)
def test_none_of_it_changes_nothing(change: Change) -> None:
    np.testing.assert_array_equal(change.apply(picture(1), NONE[change.name]), picture(1))


def test_light_and_contrast_are_in_percent() -> None:
    original = picture(2)
    assert brightness(original, 10).mean() == pytest.approx(1.1 * original.mean(), rel=0.01)
    stretched = contrast(original, -20)
    assert stretched.mean() == pytest.approx(original.mean(), abs=0.5)
    assert stretched.std() == pytest.approx(0.8 * original.std(), rel=0.02)
    assert brightness(np.full((40, 40, 3), 250, np.uint8), 20).min() == 255  # clipped, not wrapped


def test_noise_has_the_deviation_and_a_blur_takes_detail_away() -> None:
    grey = np.full((64, 64, 3), 128, np.uint8)
    assert noise(grey, 5).std() == pytest.approx(5, rel=0.05)
    assert blur(noise(grey, 5), 4).std() < 2


def test_a_shift_moves_right_and_down_by_a_share_of_the_sides() -> None:
    original = np.random.default_rng(0).integers(0, 255, (50, 100, 3), dtype=np.uint8)
    moved = shift(original, 10)
    np.testing.assert_array_equal(moved[5:, 10:], original[:-5, :-10])
    np.testing.assert_array_equal(moved[4, 10:], original[1, :-10])
