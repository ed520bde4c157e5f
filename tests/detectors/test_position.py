"""Maps measured by what is usual at each place."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from ood_runners.detectors import position
from ood_runners.detectors.base import Probes
from ood_runners.detectors.memory_bank import MemoryBank
from ood_runners.detectors.position import LEAST_PICTURES, MOST_EXPLAINED, Position, explained, held_out
from ood_runners.features import Features


def maps(n: int, place: float, seed: int = 0, side: int = 12) -> np.ndarray:
    """Normal maps whose variance is 1 at each place and `place` from place to place."""
    rng = np.random.default_rng(seed)
    ground = 10 + np.sqrt(place) * np.tile(np.linspace(-1.7, 1.7, side), (side, 1))
    return (ground + rng.normal(size=(n, side, side))).astype(np.float32)


@pytest.mark.parametrize("place", [0.0, 0.5, 4.0])
def test_explained_is_the_share_of_the_places_variance(place: float) -> None:
    values = maps(200, place) + np.random.default_rng(1).normal(0, 3, (200, 1, 1)).astype(np.float32)
    assert explained(values) == pytest.approx(place / (1 + place), abs=0.05)  # what lifts a whole picture is left out
    assert explained(np.ones((5, 3, 3), np.float32)) == 0


def test_a_noisy_place_counts_for_less_and_a_calm_one_for_more() -> None:
    values = maps(100, 0.0)
    values[:, :, 6:] = 10 + 3 * (values[:, :, 6:] - 10)
    measured = Position.fit(values).apply(values)
    assert values[:, :, 6:].std() / values[:, :, :6].std() == pytest.approx(3, abs=0.3)
    assert measured[:, :, 6:].std() / measured[:, :, :6].std() < 2.3  # half of the way is drawn back


def test_a_fold_is_measured_by_the_normals_of_the_others() -> None:
    values, folds = maps(48, 0.3), np.append(np.arange(40) % 4, [1] * 8)
    found = held_out(values, folds, np.arange(48) < 40, 0.3)
    assert found is not None
    others = Position.fit(values[:40][folds[:40] != 1])
    np.testing.assert_allclose(found[1][folds == 1], others.apply(values[folds == 1]), rtol=1e-5)
    np.testing.assert_allclose(found[0].centre, Position.fit(values[:40]).centre)


def test_few_pictures_or_a_place_that_explains_all_leave_distances() -> None:
    n = LEAST_PICTURES
    folds, all_normal = np.arange(n) % 4, np.ones(n, bool)
    assert held_out(maps(n, 0.3), folds, all_normal, MOST_EXPLAINED) is not None
    assert held_out(maps(n - 1, 0.3), folds[1:], all_normal[1:], 0.3) is None
    assert held_out(maps(n, 0.3), folds, all_normal, MOST_EXPLAINED + 0.01) is None


def test_a_trial_keeps_folds_whole_and_takes_of_each() -> None:
    folds = np.append(np.zeros(900, np.int64), np.repeat(np.arange(1, 8), 3))
    rows, parts = position.trial(folds, 0)
    assert len(rows) == position.TRIAL_PICTURES and set(folds[rows]) == set(range(8))
    assert len(np.unique(parts)) == position.TRIAL_FOLDS
    assert all(len(np.unique(parts[folds[rows] == fold])) == 1 for fold in range(8))
    assert len(position.trial(np.arange(7), 0)[0]) == 7


def features(n: int, seed: int) -> Features:
    """Patches that vary much in the right half of the frame and little in the left."""
    patches = np.random.default_rng(seed).normal(size=(n, 8, 8, 6))
    patches[:, :, :4] *= 0.4
    return Features(patches=patches.astype(np.float16))


def test_a_bank_finds_what_is_strange_for_its_place_and_comes_back_from_the_store() -> None:
    normal, strange, folds = features(40, 1), features(40, 2), np.arange(40) % 5
    strange.patches[:, 2, 2] *= 5  # as the right half is, in the left
    detector = MemoryBank(size=400)
    scores = detector.fit_held_out(features(40, 0), folds, probes=Probes(strange, np.arange(40)))
    assert len(scores) == 80 and detector.info()["by_position"]
    judged = detector.score(normal), detector.score(strange)
    plain = MemoryBank(size=400).fit(features(40, 0))
    labels = np.arange(80) >= 40
    by_place = roc_auc_score(labels, np.concatenate([one.image for one in judged]))
    by_distance = roc_auc_score(labels, np.concatenate([plain.score(one).image for one in (normal, strange)]))
    assert by_place > by_distance + 0.02
    # Held-out scores are those of new normal pictures, and the probes' those of new defects.
    assert scores.image[:40].mean() == pytest.approx(judged[0].image.mean(), abs=1.0)
    opened = MemoryBank.from_arrays(detector.to_arrays(), detector.params())
    np.testing.assert_allclose(opened.score(normal).map, judged[0].map, rtol=1e-5)
    assert opened.info() == detector.info()
    one = detector.score(normal[3:4])
    np.testing.assert_allclose(one.map[0], judged[0].map[3], rtol=1e-4, atol=1e-4)


def test_what_the_place_explains_does_not_depend_on_the_size_of_the_bank() -> None:
    shares = []
    for size in (100, 1_500):
        detector = MemoryBank(size=size)
        detector.fit_held_out(features(40, 0), np.arange(40) % 10)
        shares.append(detector.info()["explained_by_position"])
    assert shares[0] == shares[1] and 0 < shares[0] < MOST_EXPLAINED
