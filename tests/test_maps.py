from __future__ import annotations

import numpy as np
import pytest

from ood_runners.maps import MAX_REGIONS, FloatMap, find_regions, overlay, smooth, upscale


def smoothed(maps: np.ndarray, size: tuple[int, int], sigma: float) -> FloatMap:
    return smooth(upscale(maps, size), sigma)


def test_upscale_keeps_places_and_constants() -> None:
    flat = np.full((2, 7, 9), 3.5, np.float16)
    large = smoothed(flat, (140, 180), sigma=4)
    assert large.shape == (2, 140, 180)
    assert large.dtype == np.float32
    np.testing.assert_allclose(large, 3.5, atol=1e-5)
    spot = np.zeros((1, 7, 9), np.float32)
    spot[0, 2, 6] = 1
    row, column = np.unravel_index(smoothed(spot, (140, 180), sigma=4)[0].argmax(), (140, 180))
    assert abs(row - 49.5) <= 1
    assert abs(column - 129.5) <= 1


def test_smoothing_grows_with_the_size() -> None:
    spot = np.zeros((1, 28, 28), np.float32)
    spot[0, 14, 14] = 1
    widths = []
    for side in (224, 448):
        one = smoothed(spot, (side, side), sigma=6)[0]
        widths.append((one > one.max() / 2).sum() / side**2)
    assert widths[0] == pytest.approx(widths[1], rel=0.05)
    assert (smoothed(spot, (224, 224), sigma=6)[0] > 0.1).sum() != (smoothed(spot, (224, 224), sigma=2)[0] > 0.1).sum()


def test_no_smoothing_is_plain_interpolation() -> None:
    ramp = np.arange(4, dtype=np.float32)[None, None, :].repeat(4, 1)
    out = upscale(ramp, (8, 8))
    np.testing.assert_allclose(out[0, 0], [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3], atol=1e-6)


def test_a_batch_equals_batches_of_one() -> None:
    maps = np.random.default_rng(0).normal(size=(5, 14, 14)).astype(np.float32)
    together = smoothed(maps, (100, 120), sigma=4)
    for i in range(5):
        np.testing.assert_array_equal(together[i], smoothed(maps[i : i + 1], (100, 120), sigma=4)[0])
    assert smoothed(maps[:0], (100, 120), sigma=4).shape == (0, 100, 120)


def test_regions_are_boxes_with_exclusive_ends() -> None:
    calibrated = np.zeros((100, 120), np.float32)
    calibrated[10:20, 30:50] = 1.5
    calibrated[15, 40] = 2.75
    calibrated[95:100, 110:120] = 3.5
    strong, weak = find_regions(calibrated)
    assert strong.box == (110, 95, 120, 100)
    assert (strong.peak, strong.area) == (3.5, 50)
    assert weak.box == (30, 10, 50, 20)
    assert (weak.peak, weak.area) == (2.75, 200)


def test_regions_need_more_than_the_threshold_and_some_area() -> None:
    calibrated = np.ones((224, 224), np.float32)
    assert find_regions(calibrated) == []
    calibrated[5:8, 5:8] = 4  # nine pixels, a speck
    assert find_regions(calibrated) == []
    assert find_regions(calibrated, min_area=9)[0].area == 9
    assert find_regions(calibrated, threshold=0.5)[0].area == 224 * 224
    assert find_regions(np.zeros((224, 224), np.float32), threshold=5) == []


def test_regions_touching_at_a_corner_are_one() -> None:
    calibrated = np.zeros((50, 50), np.float32)
    calibrated[10:20, 10:20] = calibrated[20:30, 20:30] = 2
    assert [region.box for region in find_regions(calibrated)] == [(10, 10, 30, 30)]


def test_at_most_twenty_regions_strongest_first() -> None:
    calibrated = np.zeros((200, 200), np.float32)
    for i in range(36):
        row, column = divmod(i, 6)
        calibrated[row * 30 : row * 30 + 10, column * 30 : column * 30 + 10] = 2 + (i * 7 % 36) / 10
    regions = find_regions(calibrated)
    assert len(regions) == MAX_REGIONS
    peaks = [region.peak for region in regions]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] == pytest.approx(5.5)


def hue_of(value: float, **options: float) -> np.ndarray:
    grey = np.full((8, 8, 3), 128, np.uint8)
    return overlay(grey, np.full((8, 8), value, np.float32), **options)[4, 4].astype(int)


def test_the_scale_is_fixed() -> None:
    for value in (-50.0, 0.0, 0.3, 0.5):
        red, green, blue = hue_of(value)
        assert blue > green > red
    red, green, blue = hue_of(1.0)
    assert red > 150 and green > 150 and blue < 110
    red, green, blue = hue_of(2.0)
    assert red > 150 and green < 90 and blue < 90
    np.testing.assert_array_equal(hue_of(2.0), hue_of(700.0))
    np.testing.assert_array_equal(hue_of(0.0), hue_of(-3.0))


def test_a_normal_picture_stays_blue_whatever_its_own_highest_value() -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)
    out = overlay(picture, rng.uniform(0, 0.6, (60, 80)).astype(np.float32)).astype(int)
    assert (out[..., 2] > out[..., 0]).all()


def test_overlay_resizes_the_map_and_leaves_its_inputs() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    calibrated = np.zeros((30, 40), np.float32)
    calibrated[20:, 30:] = 3
    before = picture.copy(), calibrated.copy()
    out = overlay(picture, calibrated).astype(int)
    assert out.shape == picture.shape
    assert out[85, 115, 0] > out[85, 115, 2]
    assert out[5, 5, 2] > out[5, 5, 0]
    np.testing.assert_array_equal(picture, before[0])
    np.testing.assert_array_equal(calibrated, before[1])


def test_overlay_strength_and_values_that_are_no_numbers() -> None:
    picture = np.full((4, 4, 3), 90, np.uint8)
    calibrated = np.array([[np.nan, np.inf, -np.inf, 0]] * 4, np.float32)
    np.testing.assert_array_equal(overlay(picture, calibrated, strength=0), picture)
    out = overlay(picture, calibrated, strength=1)
    np.testing.assert_array_equal(out[0, 0], out[0, 3])
    np.testing.assert_array_equal(out[0, 2], out[0, 3])
    np.testing.assert_array_equal(out[0, 1], hue_of(2.0, strength=1))
