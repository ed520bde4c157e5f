from __future__ import annotations

import cv2
import numpy as np
import pytest

from ood_runners.errors import BadParameter
from ood_runners.training.synthetic import KINDS, VISIBLE, synthetic_defects


def scene(n: int, size: tuple[int, int] = (96, 128)) -> np.ndarray:
    """Discs of some texture on a dark ground."""
    rng = np.random.default_rng(3)
    rows, columns = np.mgrid[: size[0], : size[1]]
    pictures = []
    for _ in range(n):
        disc = np.hypot(rows - 48, columns - 64) < 34
        grey = np.where(disc, 150 + 30 * np.sin(columns / 3 + rng.uniform(0, 6)), 30) + rng.normal(0, 3, size)
        pictures.append(np.repeat(grey[..., None], 3, axis=2))
    return np.clip(pictures, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_changes_a_part_of_every_picture_and_marks_it(kind):
    pictures = scene(12)
    before = pictures.copy()
    defective, masks = synthetic_defects(pictures, np.random.default_rng(0), [kind])
    assert np.array_equal(pictures, before)  # a copy
    assert defective.dtype == np.uint8 and defective.shape == pictures.shape
    assert masks.dtype == bool and masks.shape == pictures.shape[:3]
    change = np.abs(defective.astype(int) - pictures).max(axis=3)
    visible = change >= VISIBLE
    assert masks[visible].all() and masks.sum() < 1.6 * visible.sum()
    far = np.stack([cv2.dilate(one.astype(np.uint8), np.ones((9, 9), np.uint8)) == 0 for one in masks])
    assert change[far].max() < VISIBLE
    shares = masks.mean(axis=(1, 2))
    assert (masks.sum(axis=(1, 2)) >= 8).all() and shares.max() < 0.6
    assert shares.max() > 1.3 * shares.min()  # of many sizes


def test_one_seed_gives_one_result_and_another_a_different_one():
    pictures = scene(4)
    first, second, other = (synthetic_defects(pictures, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1])
    assert not np.array_equal(first[0], other[0])


def test_defects_lie_where_the_picture_shows_something():
    _, masks = synthetic_defects(scene(40), np.random.default_rng(0), ["colour"])
    rows, columns = np.mgrid[:96, :128]
    near = np.hypot(rows - 48, columns - 64) < 45
    assert masks[:, near].sum() > 2 * masks[:, ~near].sum()


def test_a_picture_of_one_colour_gets_a_defect_too():
    flat = np.full((7, 64, 64, 3), 90, np.uint8)
    for kind in KINDS:
        _, masks = synthetic_defects(flat, np.random.default_rng(0), [kind])
        assert masks.any(axis=(1, 2)).all()


def test_kinds_take_turns():
    # Of six pictures, three are scratched and three discoloured: a scratch covers far less of its surroundings.
    pictures = scene(6)
    _, masks = synthetic_defects(pictures, np.random.default_rng(5), ["scratch", "colour"])
    filled = []
    for mask in masks:
        rows, columns = np.nonzero(mask)
        filled.append(mask.sum() / ((np.ptp(rows) + 1) * (np.ptp(columns) + 1)))
    assert sum(share < 0.35 for share in filled) == 3


def test_wrong_kinds_and_shapes_are_refused():
    with pytest.raises(BadParameter, match="no synthetic defect dent; choose of cut_paste"):
        synthetic_defects(scene(1), np.random.default_rng(0), ["dent"])
    with pytest.raises(BadParameter, match="shape"):
        synthetic_defects(scene(1)[0], np.random.default_rng(0))
