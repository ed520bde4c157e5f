"""Low-rank whitening against scikit-learn's Mahalanobis distance of the same estimator."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.covariance import LedoitWolf

from ood_runners.detectors.base import Probes
from ood_runners.detectors.mahalanobis import ROWS, Gaussian, Mahalanobis
from ood_runners.errors import ArtifactError, DataError
from ood_runners.features import Features, Scores


def sample(n: int, d: int, seed: int = 0) -> np.ndarray:
    """Correlated, offset features float32 (n, d)."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(d, d)) / np.sqrt(d)
    return (0.5 + rng.normal(size=(n, d)) @ mix * np.linspace(2, 0.05, d)).astype(np.float32)


def two_layers(n: int = 40, seed: int = 0) -> Features:
    return Features(pooled={"layer2": sample(n, 20, seed), "layer3": sample(n, 60, seed + 100)})


def three_classes(n: int = 20, seed: int = 0) -> tuple[Features, np.ndarray]:
    labels = np.arange(3 * n) % 3
    shift = np.array([0.0, 4.0, -4.0], np.float32)[labels][:, None]
    features = two_layers(3 * n, seed)
    return Features(pooled={name: x + shift for name, x in features.pooled.items()}), labels


def assert_same(left: Scores, right: Scores) -> None:
    np.testing.assert_allclose(left.image, right.image, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("n", "d"), [(30, 200), (50, 50), (51, 50), (400, 50), (2 * ROWS + 7, 50)])
def test_distance_equals_scikit_learn(n: int, d: int) -> None:
    x, queries = sample(n, d), sample(25, d, seed=1) * 1.5
    reference = LedoitWolf().fit(x.astype(np.float64))
    gaussian = Gaussian.fit(x)
    np.testing.assert_allclose(
        gaussian.squared_distance(queries), reference.mahalanobis(queries.astype(np.float64)), rtol=2e-4
    )
    assert gaussian.basis.shape[1] <= min(n - 1, d)


def test_score_is_the_mean_over_layers_per_channel() -> None:
    features, queries = two_layers(), two_layers(7, seed=5)
    expected = np.zeros(7)
    for name, x in features.pooled.items():
        reference = LedoitWolf().fit(x.astype(np.float64))
        expected += reference.mahalanobis(queries.pooled[name].astype(np.float64)) / x.shape[1] / 2
    scores = Mahalanobis().fit(features).score(queries)
    np.testing.assert_allclose(scores.image, expected, rtol=2e-4)
    assert scores.image.dtype == np.float32 and scores.predicted is None and scores.map is None


@pytest.mark.parametrize("relative", [True, False])
def test_classes_share_a_covariance_and_the_nearest_counts(relative: bool) -> None:
    features, labels = three_classes()
    queries, truth = three_classes(4, seed=7)
    expected = np.zeros((12, 3))
    for name, x in features.pooled.items():
        wide, asked = x.astype(np.float64), queries.pooled[name].astype(np.float64)
        means = np.stack([wide[labels == c].mean(axis=0) for c in range(3)])
        shared = LedoitWolf(assume_centered=True).fit(wide - means[labels])
        centred = wide - wide.mean(axis=0)
        shrinkage = LedoitWolf().fit(wide).shrinkage_
        # The background ends in the floor that the classes' covariance has.
        floor = shared.shrinkage_ * np.mean((wide - means[labels]) ** 2)
        background = (1 - shrinkage) * centred.T @ centred / len(wide) + floor * np.eye(wide.shape[1])
        for c in range(3):
            expected[:, c] += shared.mahalanobis(asked - means[c]) / x.shape[1] / 2
        if relative:
            off = asked - wide.mean(axis=0)
            squared = np.einsum("nd,de,ne->n", off, np.linalg.inv(background), off)
            expected -= squared[:, None] / x.shape[1] / 2
    scores = Mahalanobis(relative=relative).fit(features, labels).score(queries)
    np.testing.assert_allclose(scores.image, expected.min(axis=1), rtol=1e-3, atol=1e-4)
    assert scores.predicted is not None and scores.predicted.tolist() == truth.tolist()


def test_predicted_is_the_label_even_when_some_are_missing() -> None:
    features, labels = three_classes()
    kept = labels != 1
    scores = Mahalanobis().fit(features[kept], labels[kept]).score(features[kept])
    np.testing.assert_array_equal(scores.predicted, labels[kept])


def test_stable_for_30_pictures_with_2048_features() -> None:
    rng = np.random.default_rng(0)
    x = np.abs(rng.normal(size=(60, 2048)) * rng.gamma(0.3, size=2048)).astype(np.float32)  # like ReLU means
    x[:, :40] = 0  # channels that never fire
    features = Features(pooled={"layer4": x[:30]})
    detector = Mahalanobis().fit(features)
    new = detector.score(Features(pooled={"layer4": x[30:]})).image
    reference = LedoitWolf().fit(x[:30].astype(np.float64)).mahalanobis(x[30:].astype(np.float64)) / 2048
    np.testing.assert_allclose(new, reference, rtol=1e-3)
    assert sum(array.nbytes for array in detector.to_arrays().values()) < 300_000  # not 2048 x 2048


def test_features_that_never_vary_stay_finite() -> None:
    x = np.ones((10, 5), np.float32)
    detector = Mahalanobis().fit(Features(pooled={"layer3": x}))
    same, other = detector.score(Features(pooled={"layer3": np.stack([x[0], x[0] + 1])})).image
    assert same == pytest.approx(0, abs=1e-6) and np.isfinite(other) and other > 1


def test_grows_with_displacement() -> None:
    features = two_layers()
    detector = Mahalanobis().fit(features)
    direction = np.random.default_rng(3).normal(size=60).astype(np.float32)
    steps = np.arange(1, 8, dtype=np.float32)[:, None]
    mean = {name: np.repeat(x.mean(axis=0, keepdims=True), 7, axis=0) for name, x in features.pooled.items()}
    moved = mean | {"layer3": mean["layer3"] + steps * direction}
    image = detector.score(Features(pooled=moved)).image
    assert (np.diff(image) > 0).all()
    np.testing.assert_allclose(image / image[0], steps[:, 0] ** 2, rtol=1e-3)


@pytest.mark.parametrize("labelled", [True, False])
def test_a_batch_equals_its_pictures_one_by_one_and_a_round_trip(labelled: bool) -> None:
    features, labels = three_classes()
    detector = Mahalanobis().fit(features, labels if labelled else None)
    queries = two_layers(15, seed=8)
    whole = detector.score(queries)
    assert_same(whole, Scores.concatenate([detector.score(queries[i : i + 1]) for i in range(15)]))
    loaded = Mahalanobis.from_arrays(detector.to_arrays(), detector.params())
    np.testing.assert_array_equal(loaded.score(queries).image, whole.image)
    assert loaded.params() == {"layers": None, "relative": True}
    assert all(array.dtype in (np.float32, np.int64) for array in detector.to_arrays().values())


def test_held_out_scores_leave_the_fold_out() -> None:
    features, folds = two_layers(12), np.arange(12) % 3
    scores = Mahalanobis().fit_held_out(features, folds)
    rest = Mahalanobis().fit(features[folds != 1])
    np.testing.assert_allclose(scores.image[folds == 1], rest.score(features[folds == 1]).image)


def test_probes_are_scored_by_detectors_that_have_not_seen_their_origin() -> None:
    features, folds, origin = two_layers(12), np.arange(12) % 3, np.array([4, 0, 1, 4])
    made = two_layers(4)
    scores = Mahalanobis().fit_held_out(features, folds, probes=Probes(made, origin))
    assert len(scores) == 12 + 4
    plain = Mahalanobis().fit_held_out(features, folds)
    np.testing.assert_array_equal(scores.image[:12], plain.image)
    for i, fold in enumerate(folds[origin]):
        rest = Mahalanobis().fit(features[folds != fold])
        np.testing.assert_allclose(scores.image[12 + i], rest.score(made[i : i + 1]).image[0], rtol=1e-5)


def test_only_the_chosen_layers_count() -> None:
    features = two_layers()
    detector = Mahalanobis(layers=["layer3"]).fit(features)
    without = Features(pooled={"layer3": features.pooled["layer3"]})
    np.testing.assert_array_equal(detector.score(features).image, detector.score(without).image)


def test_says_what_does_not_fit() -> None:
    features = two_layers()
    with pytest.raises(DataError, match=r"no pooled features of 'layer4'; there are: layer2, layer3"):
        Mahalanobis(layers=["layer4"]).fit(features)
    with pytest.raises(DataError, match="at least one layer"):
        Mahalanobis().fit(Features(logits=np.ones((3, 2), np.float32)))
    with pytest.raises(DataError, match="at least 2 pictures"):
        Mahalanobis().fit(features[:1])
    with pytest.raises(DataError, match="two pictures a class"):
        Mahalanobis().fit(features, np.arange(40))
    detector = Mahalanobis().fit(features)
    with pytest.raises(DataError, match="60 channels and the detector was fitted on 20"):
        detector.score(Features(pooled={"layer2": features.pooled["layer3"]}))
    arrays = detector.to_arrays()
    arrays.pop("gaussian.basis.layer3")
    with pytest.raises(ArtifactError, match=r"gaussian\.basis\.layer3"):
        Mahalanobis.from_arrays(arrays, {})


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_refuses_what_is_not_finite(bad: float) -> None:
    features = two_layers()
    detector = Mahalanobis().fit(features)
    features.pooled["layer2"][3, 4] = bad
    for call in (detector.score, Mahalanobis().fit):
        with pytest.raises(DataError, match="pooled features of layer2 hold a NaN or an infinity"):
            call(features)


def test_what_is_far_from_all_pictures_is_strange_in_the_relative_form() -> None:
    """With a floor of its own for each covariance, fewer pictures than features made it the most normal."""
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 4
    centres = np.random.default_rng(1).normal(size=(4, 100)) * 2

    def pictures(n: int) -> Features:
        return Features(pooled={"layer4": (centres[np.arange(n) % 4] + rng.normal(size=(n, 100))).astype(np.float32)})

    detector = Mahalanobis(relative=True).fit(pictures(40), labels)
    far = Features(pooled={"layer4": (rng.normal(size=(40, 100)) * 3).astype(np.float32)})
    assert np.median(detector.score(far).image) > np.median(detector.score(pictures(40)).image)
