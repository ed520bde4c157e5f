from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from ood_runners.training import metrics
from ood_runners.training.metrics import PixelTally, Proportion


def brute_aupro(maps, masks, limit=0.3):
    """The definition, threshold by threshold and region by region."""
    regions = []
    for index, mask in enumerate(masks):
        labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
        regions += [(index, labels == label) for label in range(1, count + 1)]
    fprs, pros = [0.0], [0.0]
    for threshold in np.unique(maps)[::-1]:
        above = maps >= threshold
        fprs.append((above & ~masks).sum() / (~masks).sum())
        pros.append(np.mean([above[i][region].mean() for i, region in regions]))
    area = 0.0
    for x0, x1, y0, y1 in zip(fprs, fprs[1:], pros, pros[1:], strict=False):
        if x0 >= limit:
            break
        if x1 > limit:
            y1 = y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
            x1 = limit
        area += (x1 - x0) * (y0 + y1) / 2
    return area / limit


def synthetic(seed, pictures=4, size=26, signal=1.0, ties=False):
    rng = np.random.default_rng(seed)
    masks = np.zeros((pictures, size, size), bool)
    for mask in masks[: pictures // 2]:
        for _ in range(3):
            top, left = rng.integers(0, size - 12, 2)
            height, width = rng.integers(1, 9, 2)
            mask[top : top + height, left : left + width] = True
    maps = ndimage.gaussian_filter(rng.normal(0.2, 3, masks.shape), (0, 2, 2)) + signal * masks * rng.random()
    maps = maps.astype(np.float32)
    return (np.round(maps, 1) if ties else maps), masks


@pytest.mark.parametrize("signal", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("ties", [False, True])
def test_pixel_measures_equal_brute_force(signal, ties):
    maps, masks = synthetic(3, signal=signal, ties=ties)
    tally = PixelTally()
    tally.add(maps[:2], list(masks[:2]))
    tally.add(maps[2:], [mask if mask.any() else None for mask in masks[2:]])
    assert tally.auroc().value == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=5e-4)
    assert tally.aupro().value == pytest.approx(brute_aupro(maps, masks), abs=5e-4)
    assert tally.aupro(0.05).value == pytest.approx(brute_aupro(maps, masks, 0.05), abs=2e-3)


def test_tallies_of_parts_add_up_to_the_whole():
    maps, masks = synthetic(5)
    whole, first, second = PixelTally(), PixelTally(), PixelTally()
    whole.add(maps, list(masks))
    first.add(maps[:2], list(masks[:2]))
    second.add(maps[2:], list(masks[2:]))
    both = first + second
    assert both.regions == whole.regions > 0
    assert both.auroc().value == pytest.approx(whole.auroc().value, abs=1e-12)
    assert both.aupro().value == pytest.approx(whole.aupro().value, abs=1e-12)


def test_diagonal_neighbours_are_one_region_and_small_regions_weigh_as_much_as_large_ones():
    diagonal = np.eye(8, dtype=np.uint8)
    tally = PixelTally()
    tally.add(np.zeros((1, 8, 8), np.float32), [diagonal])
    assert tally.regions == 1

    mask = np.zeros((20, 20), bool)
    mask[:10, :10] = True
    mask[15, 15] = True
    found = np.zeros((1, 20, 20), np.float32)
    found[0, :10, :10] = 1  # the large region is found, the small one (1 pixel of 101) lies among the normals
    tally = PixelTally()
    tally.add(found, [mask])
    # PRO is 1/2 at FPR 0 and rises to 1 at FPR 1: over 0 to 0.3 its mean is 0.5 + 0.5 * 0.15.
    assert tally.aupro().value == pytest.approx(0.575)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2, max_size=50))
@settings(max_examples=100, deadline=None)
def test_bins_keep_the_order_of_values(values):
    array = np.sort(np.asarray(values, np.float32))
    bins = metrics._bins(array)
    assert (np.diff(bins) >= 0).all()
    assert bins.min() >= 0 and bins.max() < metrics._BINS
    assert metrics._bins(np.float32([-0.0])) == metrics._bins(np.float32([0.0]))


def test_bins_resolve_a_quarter_of_a_percent():
    for value in (1e-3, 0.5, 1.0, 37.0, -2.0):
        low, high = metrics._bins(np.float32([value, value * 1.0025]))
        assert low != high


def test_mask_of_another_size_is_resized_to_the_nearest():
    mask = np.zeros((100, 200), np.uint8)
    mask[50:, 100:] = 1  # any value but 0 marks a defect
    resized = metrics.resize_mask(mask, (10, 40))
    expected = np.zeros((10, 40), bool)
    expected[5:, 20:] = True
    np.testing.assert_array_equal(resized, expected)
    speckled = np.random.default_rng(0).random((31, 47)) < 0.3
    rows, columns = (np.arange(20) + 0.5) * 31 // 20, (np.arange(30) + 0.5) * 47 // 30
    np.testing.assert_array_equal(
        metrics.resize_mask(speckled, (20, 30)), speckled[np.ix_(rows.astype(int), columns.astype(int))]
    )
    tally = PixelTally()
    tally.add(expected[None].astype(np.float32), [mask])
    assert tally.auroc().value == 1.0


def test_pixel_measures_say_why_there_are_none():
    maps = np.random.default_rng(0).random((2, 8, 8), dtype=np.float32)
    tally = PixelTally()
    tally.add(maps, [None, np.zeros((8, 8))])  # an empty mask is a picture without a marked defect
    assert tally.auroc() == tally.aupro() == metrics.Metric(None, metrics.NO_MASKS)

    tally = PixelTally()
    tally.add(maps, [np.ones((8, 8)), np.ones((8, 8))])
    assert tally.aupro() == metrics.Metric(None, metrics.NO_NORMAL_PIXELS)

    maps[0, 0, 0] = np.nan
    tally.add(maps, [None, None])
    assert tally.auroc() == metrics.Metric(None, metrics.NOT_FINITE)
    assert (PixelTally() + tally).auroc().reason == metrics.NOT_FINITE


def test_image_measures_by_hand():
    anomalous = np.array([False, False, False, False, True, True])
    scores = np.array([1.0, 2.0, 3.0, 5.0, 4.0, 6.0])
    assert metrics.image_auroc(scores, anomalous).value == pytest.approx(7 / 8)
    assert metrics.average_precision(scores, anomalous).value == pytest.approx((1 + 2 / 3) / 2)
    assert metrics.fpr_at_tpr(scores, anomalous).value == pytest.approx(1 / 4)
    assert metrics.fpr_at_tpr(scores, anomalous, 0.5).value == 0.0
    assert metrics.f1(scores >= 4, anomalous).value == pytest.approx(2 * 2 / (2 * 2 + 1))
    assert metrics.f1(scores > 9, anomalous).value == 0.0


def test_fpr_allows_exactly_one_miss_in_twenty():
    anomalous = np.repeat([False, True], 20)
    scores = np.concatenate([np.linspace(0, 1, 20), np.full(19, 2.0), [0.5]])
    assert metrics.fpr_at_tpr(scores, anomalous).value == 0.0


@pytest.mark.parametrize(
    ("anomalous", "reason"),
    [([False] * 3, metrics.NO_DEFECTS), ([True] * 3, metrics.NO_NORMALS), ([], metrics.NO_PICTURES)],
)
def test_image_measures_say_why_there_are_none(anomalous, reason):
    labels, scores = np.array(anomalous, bool), np.arange(len(anomalous), dtype=np.float32)
    expected = metrics.Metric(None, reason)
    assert metrics.image_auroc(scores, labels) == expected
    assert metrics.average_precision(scores, labels) == expected
    assert metrics.fpr_at_tpr(scores, labels) == expected
    assert metrics.f1(labels, labels) == expected


def test_scores_that_are_not_finite_are_named():
    scores, labels = np.array([0.0, np.nan]), np.array([False, True])
    assert metrics.image_auroc(scores, labels) == metrics.Metric(None, metrics.NOT_FINITE)


def test_false_alarm_rate_counts_normals_only_and_has_the_exact_interval():
    flagged = np.array([True] + [False] * 9 + [True] * 5)
    anomalous = np.array([False] * 10 + [True] * 5)
    rate = metrics.false_alarm_rate(flagged, anomalous)
    assert (rate.count, rate.total, rate.rate) == (1, 10, 0.1)
    # Clopper and Pearson's limits for 1 of 10, from published tables.
    assert rate.low == pytest.approx(0.0025, abs=5e-5)
    assert rate.high == pytest.approx(0.4450, abs=5e-5)


def test_no_false_alarm_has_the_rule_of_three_as_its_limit():
    rate = Proportion.of(0, 100)
    assert rate.low == 0.0
    assert rate.high == pytest.approx(1 - 0.025 ** (1 / 100))
    assert Proportion.of(0, 0) == Proportion(0, 0, None, 0.0, 1.0)
