"""A fit under other light: what it changes, what it leaves alone, and that cross-fitting stays honest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ood_runners.artifacts.manifest import FeaturesEntry
from ood_runners.detectors import Mahalanobis, MemoryBank
from ood_runners.errors import BadParameter
from ood_runners.features import Features
from ood_runners.training.augment import PERCENT, check_augment, fit_held_out, under_light
from ood_runners.training.changes import brightness
from ood_runners.training.prepare import Prepared
from ood_runners.training.progress import SilentProgress
from tests.training.brightness import picture
from tests.training.test_learning import network

FOLDS = np.arange(20) % 5


@pytest.fixture(scope="module")
def pictures() -> NDArray[np.uint8]:
    return np.stack([picture(seed) for seed in range(20)])


@pytest.fixture(scope="module")
def features(pictures: NDArray[np.uint8]) -> Features:
    return network(pictures)


@pytest.fixture(scope="module")
def light(pictures: NDArray[np.uint8], features: Features, tmp_path_factory: pytest.TempPathFactory) -> Features:
    run: Any = network
    prepared = Prepared(FeaturesEntry(), None, {}, None, run, features)
    return under_light(prepared, pictures, tmp_path_factory.mktemp("light"), SilentProgress())


def test_the_pictures_come_first_and_then_each_brightness(
    pictures: NDArray[np.uint8], features: Features, light: Features
) -> None:
    assert len(light) == 60
    darker = network(np.stack([brightness(one, PERCENT[0]) for one in pictures]))
    for name, array in features.to_arrays().items():
        np.testing.assert_array_equal(light.to_arrays()[name][:20], array)
        np.testing.assert_array_equal(light.to_arrays()[name][20:40], darker.to_arrays()[name])
    assert light[slice(40, 60)].patches.mean() > features.patches.mean() > darker.patches.mean()


@pytest.mark.parametrize("kind", [MemoryBank, Mahalanobis])
def test_darker_pictures_come_nearer(
    kind: type[MemoryBank | Mahalanobis], pictures: NDArray[np.uint8], features: Features, light: Features
) -> None:
    plain, augmented = kind(), kind()
    before = fit_held_out(plain, features, None, FOLDS, None)
    after = fit_held_out(augmented, features, light, FOLDS, None)
    assert len(before) == len(after) == 20
    darker = network(np.stack([brightness(picture(seed), -15) for seed in range(100, 110)]))
    # How far off they are, beside what is usual for pictures as they are.
    far = plain.score(darker).image.mean() / before.image.mean()
    near = augmented.score(darker).image.mean() / after.image.mean()
    assert near < 0.8 * far


def test_no_picture_is_scored_by_a_detector_that_has_seen_its_variants(light: Features, features: Features) -> None:
    bank = MemoryBank(size=60 * 64)  # every patch
    fit_held_out(bank, features, light, FOLDS, None)
    assert bank.source_[:, 0].max() == 19
    np.testing.assert_array_equal(bank.fold_, FOLDS[bank.source_[:, 0]])


def test_other_detectors_and_no_augmentation_see_the_pictures_alone(features: Features, light: Features) -> None:
    class Other(Mahalanobis):
        name = "softmax"

    expected = Mahalanobis().fit_held_out(features, FOLDS)
    for found in (
        fit_held_out(Other(), features, light, FOLDS, None),
        fit_held_out(Mahalanobis(), features, None, FOLDS, None),
    ):
        np.testing.assert_array_equal(found.image, expected.image)


def test_labels_go_with_the_variants(features: Features, light: Features) -> None:
    labels = np.arange(20) // 10
    detector = Mahalanobis()
    fit_held_out(detector, features, light, FOLDS, labels)
    copied = light.pooled["all"].reshape(3, 2, 10, -1).mean(axis=(0, 2))
    np.testing.assert_allclose(detector.class_means_["all"], copied, rtol=1e-5)


def test_user_mistakes() -> None:
    check_augment(None, ["vae"])
    check_augment("light", ["vae", "mahalanobis"])
    with pytest.raises(BadParameter, match="no augmentation 'dark'; choose light"):
        check_augment("dark", ["memory_bank"])
    with pytest.raises(BadParameter, match="for mahalanobis and memory_bank"):
        check_augment("light", ["vae", "softmax"])


def test_a_fit_records_it(bento_home: Path, tmp_path: Path) -> None:
    from ood_runners.artifacts import read_version
    from ood_runners.images import encode_png
    from ood_runners.training.fit import fit

    for i in range(12):
        (tmp_path / f"{i:02}.png").write_bytes(encode_png(picture(i)))
    result = fit(
        tmp_path, product="light", backbone="efficientnet_lite0", size=(64, 64), precision="float32",
        detectors=["memory_bank", "softmax"], device="cpu", augment="light",
    )  # fmt: skip
    info = {name: entry.info for name, entry in read_version("light").manifest.detectors.items()}
    assert info["memory_bank"]["augment"] == {"brightness_percent": [-15, 15]}
    assert "augment" not in info["softmax"]
    assert result.manifest.calibration.n == 12
