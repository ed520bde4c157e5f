from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ood_runners.artifacts.manifest import FeaturesEntry, LeftOutFile
from ood_runners.detectors import Mahalanobis
from ood_runners.features import Features
from ood_runners.training import contamination
from ood_runners.training.contamination import (
    limit_of,
    notes,
    only,
    patch_distances,
    pooled_distances,
    score_held_back,
    screen,
    strangeness_of,
)
from ood_runners.training.datasets import PictureFile
from ood_runners.training.pictures import TrainingPictures
from ood_runners.training.prepare import Prepared

N, SIDE, D = 40, 10, 8


def patches(seed: int = 0, n: int = N) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, SIDE, SIDE, D)).astype(np.float16)


def with_defects(count: int) -> np.ndarray:
    """The same foreign patches in the same place of the first pictures."""
    made = patches()
    made[:count, 2:4, 3:5] += 8
    return made


def test_a_folder_of_normals_loses_nothing() -> None:
    found = screen(Features(patches()))
    assert not found.dropped.any() and not found.aside.any()
    assert np.array_equal(found.fitted, np.arange(N)) and np.array_equal(found.calibrated, np.arange(N))


@pytest.mark.parametrize("count", [1, 2, 4])  # up to a tenth
def test_defects_of_one_kind_do_not_vouch_for_each_other(count: int) -> None:
    found = screen(Features(with_defects(count)))
    assert np.flatnonzero(found.dropped).tolist() == list(range(count))
    assert not found.aside.any()
    assert sorted(found.rows) == list(range(count, N))


def test_what_a_fifth_of_the_pictures_have_is_normal() -> None:
    found = screen(Features(with_defects(N // 5)))
    assert not found.dropped.any() and not found.aside.any()


def test_a_picture_that_is_strange_all_over_is_fitted_on_and_not_calibrated_on() -> None:
    made = with_defects(1)
    made[7] += 5  # as under other light
    found = screen(Features(made))
    assert np.flatnonzero(found.dropped).tolist() == [0] and np.flatnonzero(found.aside).tolist() == [7]
    assert 7 in found.fitted and sorted(found.rows) == [i for i in range(N) if i not in (0, 7)]


@pytest.mark.parametrize(("brighter", "aside"), [(60, [7]), (0, [])])
def test_what_is_strange_all_over_under_the_same_light_is_dropped(brighter: int, aside: list[int]) -> None:
    made = patches()
    made[7] += 5
    pictures = np.random.default_rng(0).integers(90, 130, (N, 32, 32, 3)).astype(np.uint8)
    pictures += np.arange(N, dtype=np.uint8)[:, None, None, None] % 8  # some are a little brighter than others
    pictures[7] += np.uint8(brighter)
    found = screen(Features(made, pictures=pictures))
    assert np.flatnonzero(found.aside).tolist() == aside
    assert np.flatnonzero(found.dropped).tolist() == [7] * (not aside)


def whole(seed: int = 1) -> np.ndarray:
    """Pooled features of which those of pictures 5 and 6 point elsewhere."""
    made = 5 + np.random.default_rng(seed).normal(size=(N, 2 * D)).astype(np.float32)
    made[5:7, :D] -= 4
    return made


def test_where_one_picture_stands_out_those_that_do_so_less_are_held_back() -> None:
    features = Features(with_defects(1), {"deep": whole()})
    found = screen(features)
    assert np.flatnonzero(found.dropped).tolist() == [0] and not found.aside.any()
    assert {5, 6} <= set(np.flatnonzero(found.held_back))
    assert not set(found.fitted) & {0, 5, 6}
    # Calibrated on are all but the one dropped, each once.
    assert sorted(found.rows) == list(range(1, N))
    # A detector scores those held back as it will score any new picture.
    detector = Mahalanobis().fit(features[found.fitted])
    scores = np.concatenate([one.image for one in score_held_back(detector, features, found)])
    assert np.array_equal(scores, detector.score(features[found.held_back]).image)


def test_a_folder_without_one_that_stands_out_holds_nothing_back() -> None:
    found = screen(Features(patches(), {"deep": whole()}))
    assert strangeness_of(pooled_distances(Features(pooled={"deep": whole()})))[5] > limit_of(contamination.CHANCE, N)
    assert not found.held_back.any() and len(found.fitted) == len(found.rows) == N


def test_pooled_distances_are_those_of_directions_to_the_fifth_nearest_other_picture() -> None:
    made = whole()
    found = pooled_distances(Features(pooled={"deep": made, "deeper": 3 * made}))
    unit = made / np.linalg.norm(made, axis=1, keepdims=True)
    every = np.sort(np.linalg.norm(unit[:, None] - unit[None], axis=-1), axis=1)[:, 5]  # the 0th is itself
    assert found == pytest.approx(every / np.median(every), rel=1e-4)


def test_few_pictures_have_no_outliers() -> None:
    made = with_defects(1)[: contamination.LEAST - 1]
    assert not screen(Features(made)).dropped.any()


def test_distances_are_those_to_the_nearest_patch_of_the_third_nearest_other_picture() -> None:
    made = patches(n=12)[:, :4, :4]  # 16 patches: all of them are compared with
    found = patch_distances(made)
    flat = made.reshape(12, 16, D).astype(np.float64)
    every = np.linalg.norm(flat[:, :, None, None] - flat[None, None], axis=-1).min(axis=-1)  # (12, 16, 12)
    every[np.arange(12), :, np.arange(12)] = np.inf
    assert found.reshape(12, 16) == pytest.approx(np.sort(every, axis=-1)[..., 2], abs=1e-3)


def test_of_many_pictures_only_some_are_compared_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contamination, "REFERENCES", 20)
    found = screen(Features(with_defects(2)))
    assert np.flatnonzero(found.dropped).tolist() == [0, 1]


def test_the_limit_is_kept_by_normals_and_several_outliers_are_told_together() -> None:
    rng = np.random.default_rng(1)
    limit = limit_of(contamination.CHANCE, 60)
    lost = [(strangeness_of(rng.normal(size=60)) > limit).sum() for _ in range(200)]
    assert np.mean(np.array(lost) > 0) < 0.12  # 5 % by design, and twice as many at most
    values = rng.normal(size=60)
    values[:5] = (9.0, 9.1, 9.2, 30.0, 31.0)
    assert np.flatnonzero(strangeness_of(values) > limit).tolist() == [0, 1, 2, 3, 4]
    assert not strangeness_of(np.ones(60)).any()


def test_pictures_and_features_without_the_dropped(tmp_path: Path) -> None:
    made, pictures = patches(n=20), np.arange(20, dtype=np.uint8).reshape(20, 1, 1, 1)
    files = [PictureFile(tmp_path / f"{i}.png", "good") for i in range(20)]
    training = TrainingPictures(pictures, files, [], "0")
    prepared = Prepared(FeaturesEntry(), None, {}, None, None, Features(patches=made, pictures=pictures))
    assert only(training, prepared, np.arange(20), tmp_path) == (training, prepared)
    rows = np.array([0, 5, 19])
    kept, less = only(training, prepared, rows, tmp_path)
    assert [file.path.stem for file in kept.files] == ["0", "5", "19"]
    assert kept.pictures.ravel().tolist() == [0, 5, 19]
    assert less.features.patches is not None and np.array_equal(less.features.patches, made[rows])


def test_what_is_said_of_the_promise() -> None:
    left_out = [
        LeftOutFile(path="a.png", reason="r", fitted=False),
        LeftOutFile(path="b.png", reason="r", fitted=True),
        LeftOutFile(path="c.png", reason="r", fitted=False, calibrated=True),
    ]
    first, second, third, promise = notes(left_out, 97, 0.05)
    assert first == "Dropped a.png: r. Look at it."
    assert second.startswith("Set aside b.png: r. It sets no threshold")
    assert third.startswith("Held back c.png: r. The detectors do not know it")
    # (2 + 4) of 100: the one held back is calibrated on like any other.
    assert "unlike the 2 pictures dropped or set aside" in promise and "up to 6.00%" in promise
    assert notes([], 97, 0.05) == []


def test_distances_are_kept_with_the_features(bento_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = Features(with_defects(2))
    first = screen(features, entry=bento_home / "a")
    monkeypatch.setattr(contamination, "patch_distances", lambda *_, **__: pytest.fail("computed again"))
    again = screen(features, entry=bento_home / "a")
    np.testing.assert_array_equal(first.strangeness, again.strangeness)
    for other, seed in (("b", 0), ("a", 1)):
        with pytest.raises(pytest.fail.Exception, match="computed again"):
            screen(features, entry=bento_home / other, seed=seed)
