from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ood_runners.artifacts.manifest import FeaturesEntry, LeftOutFile
from ood_runners.features import Features
from ood_runners.training import contamination
from ood_runners.training.contamination import notes, only, outliers, patch_distances, screen
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
    found = screen(patches())
    assert not found.dropped.any() and not found.aside.any()
    assert np.array_equal(found.fitted, np.arange(N)) and np.array_equal(found.calibrated, np.arange(N))


@pytest.mark.parametrize("count", [1, 2, 4])  # up to a tenth
def test_defects_of_one_kind_do_not_vouch_for_each_other(count: int) -> None:
    found = screen(with_defects(count))
    assert np.flatnonzero(found.dropped).tolist() == list(range(count))
    assert not found.aside.any()
    assert len(found.fitted) == len(found.calibrated) == N - count


def test_what_a_fifth_of_the_pictures_have_is_normal() -> None:
    found = screen(with_defects(N // 5))
    assert not found.dropped.any() and not found.aside.any()


def test_a_picture_that_is_strange_all_over_is_fitted_on_and_not_calibrated_on() -> None:
    made = with_defects(1)
    made[7] += 5  # as under other light
    found = screen(made)
    assert np.flatnonzero(found.dropped).tolist() == [0] and np.flatnonzero(found.aside).tolist() == [7]
    assert 7 in found.fitted and found.fitted[found.calibrated].tolist() == [i for i in range(N) if i not in (0, 7)]


def test_few_pictures_have_no_outliers() -> None:
    made = with_defects(1)[: contamination.LEAST - 1]
    assert not screen(made).dropped.any()


def test_distances_are_those_to_the_nearest_patch_of_the_third_nearest_other_picture() -> None:
    made = patches(n=12)[:, :4, :4]  # 16 patches: all of them are compared with
    found = patch_distances(made)
    flat = made.reshape(12, 16, D).astype(np.float64)
    every = np.linalg.norm(flat[:, :, None, None] - flat[None, None], axis=-1).min(axis=-1)  # (12, 16, 12)
    every[np.arange(12), :, np.arange(12)] = np.inf
    assert found.reshape(12, 16) == pytest.approx(np.sort(every, axis=-1)[..., 2], abs=1e-3)


def test_of_many_pictures_only_some_are_compared_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contamination, "REFERENCES", 20)
    found = screen(with_defects(2))
    assert np.flatnonzero(found.dropped).tolist() == [0, 1]


def test_the_limit_is_kept_by_normals_and_several_outliers_are_told_together() -> None:
    rng = np.random.default_rng(1)
    lost = [outliers(rng.normal(size=60))[0].sum() for _ in range(200)]
    assert np.mean(np.array(lost) > 0) < 0.12  # 5 % by design, and twice as many at most
    values = rng.normal(size=60)
    values[:5] = (9.0, 9.1, 9.2, 30.0, 31.0)
    strange, strangeness, limit = outliers(values)
    assert np.flatnonzero(strange).tolist() == [0, 1, 2, 3, 4]
    assert (strangeness[:5] > limit).all()
    assert not outliers(np.ones(60))[0].any()


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
    ]
    first, second, promise = notes(left_out, 97, 0.05)
    assert first == "Dropped a.png: r. Look at it."
    assert second.startswith("Set aside b.png: r. It sets no threshold")
    assert "unlike the 2 pictures left out" in promise and "up to 6.00%" in promise  # (2 + 4) of 100
    assert notes([], 97, 0.05) == []
