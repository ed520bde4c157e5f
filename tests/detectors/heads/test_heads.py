"""Each head against SciPy, scikit-learn or a sum done by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import logsumexp, softmax

from ood_runners.detectors.heads import HEADS, Activations, Linear
from ood_runners.detectors.heads.shaping import REACT_QUANTILE
from ood_runners.errors import ArtifactError, DataError

NAMES = ["msp", "max_logit", "energy", "gen", "vim", "relative_mahalanobis", "knn", "react", "scale"]


def seen(n: int = 40, d: int = 30, k: int = 6, seed: int = 0) -> tuple[Activations, Linear, np.ndarray]:
    """Rectified features of k classes, a final layer whose rows are the classes' centres, and the classes."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % k
    centres = np.maximum(np.random.default_rng(7).normal(size=(k, d)), 0)
    features = np.maximum(2 * centres[labels] + rng.normal(size=(n, d)), 0).astype(np.float32)
    linear = Linear(centres.astype(np.float32), np.linspace(-1, 1, k).astype(np.float32))
    return Activations(linear(features), features), linear, labels


def scores(name: str, queries: Activations | None = None) -> np.ndarray:
    normal, linear, labels = seen()
    return HEADS[name].fit(normal, linear, labels).score(queries or seen(seed=1)[0])


def test_the_names() -> None:
    assert list(HEADS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_equals_its_pictures_one_by_one_and_a_round_trip(name: str) -> None:
    normal, linear, labels = seen()
    queries = seen(seed=1)[0]
    head = HEADS[name].fit(normal, linear, labels)
    whole = head.score(queries)
    assert whole.shape == (40,) and whole.dtype == np.float32 and len(np.unique(whole)) > 30
    singles = np.concatenate([head.score(queries[i : i + 1]) for i in range(40)])
    np.testing.assert_allclose(whole, singles, rtol=1e-4, atol=1e-5)
    arrays = {key: array.copy() for key, array in head.to_arrays().items()}
    np.testing.assert_array_equal(HEADS[name].from_arrays(arrays).score(queries), whole)


@pytest.mark.parametrize("name", NAMES)
def test_what_resembles_no_class_is_stranger(name: str) -> None:
    _, linear, _ = seen()
    rng = np.random.default_rng(3)
    other = np.maximum(rng.normal(size=(40, 30)) * 0.5, 0).astype(np.float32)
    assert scores(name, Activations(linear(other), other)).mean() > scores(name).mean()


def test_the_heads_of_logits() -> None:
    queries = seen(seed=1)[0]
    wide = queries.logits.astype(np.float64)
    p = softmax(wide, axis=1)
    np.testing.assert_allclose(scores("msp"), 1 - p.max(axis=1), rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(scores("max_logit"), -wide.max(axis=1), rtol=1e-5)
    np.testing.assert_allclose(scores("energy"), -logsumexp(wide, axis=1), rtol=1e-5)
    np.testing.assert_allclose(scores("gen"), ((p * (1 - p)) ** 0.1).sum(axis=1), rtol=1e-3)


def test_gen_counts_the_hundred_most_probable() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 300)).astype(np.float32)
    p = np.sort(softmax(logits.astype(np.float64), axis=1), axis=1)[:, -100:]
    found = HEADS["gen"].fit(Activations(logits), None, np.zeros(3, np.int64)).score(Activations(logits))
    np.testing.assert_allclose(found, ((p * (1 - p)) ** 0.1).sum(axis=1), rtol=1e-5)


@pytest.mark.parametrize("name", ["msp", "max_logit", "energy", "gen"])
def test_extremes_stay_ordered(name: str) -> None:
    top = np.array([1000, 80, 40, 20, 5, 1, 0], np.float32)  # 1 - p rounds to 0 in float32 from 17 on
    logits = np.stack([top, np.zeros(7, np.float32), np.zeros(7, np.float32)], axis=1)
    image = HEADS[name].fit(Activations(logits), None, np.zeros(7, np.int64)).score(Activations(logits))
    assert np.isfinite(image).all() and (np.diff(image[1:]) > 0).all() and image[0] <= image[1]


def test_react_cuts_the_features() -> None:
    normal, linear, _ = seen()
    queries = seen(seed=1)[0]
    ceiling = np.quantile(normal.features(), REACT_QUANTILE)
    cut = np.minimum(queries.features(), ceiling) @ linear.weight.T + linear.bias
    np.testing.assert_allclose(scores("react"), -logsumexp(cut, axis=1), rtol=2e-3)


def test_scale_equals_scaled_features() -> None:
    _, linear, _ = seen()
    features = seen(seed=1)[0].features()
    largest = np.sort(features, axis=1)[:, -4:].sum(axis=1)  # 30 features, of which round(0.85 * 30) = 26 are cut
    scaled = features * np.exp(features.sum(axis=1) / largest)[:, None]
    np.testing.assert_allclose(scores("scale"), -logsumexp(linear(scaled), axis=1), rtol=1e-4)
    nothing = Activations(linear(np.zeros((2, 30), np.float32)), np.zeros((2, 30), np.float32))
    assert np.isfinite(scores("scale", nothing)).all()


def test_knn_is_the_angle_to_the_nearest() -> None:
    bank = Activations(np.zeros((2, 2), np.float32), np.array([[1, 0], [0, 5]], np.float32))
    queries = Activations(np.zeros((2, 2), np.float32), np.array([[3, 4], [0, 1e-3]], np.float32))
    found = HEADS["knn"].fit(bank, None, np.arange(2)).score(queries)
    np.testing.assert_allclose(found, [0.2, 0], atol=1e-3)


def test_vim_by_hand() -> None:
    """Normal features along the first axis: the principal space; the rest is residual."""
    features = np.zeros((6, 3), np.float32)
    features[:, 0] = [1, 2, 3, 4, 5, 6]
    features[:, 1] = 0.01
    linear = Linear(np.eye(2, 3, dtype=np.float32), np.zeros(2, np.float32))
    head = HEADS["vim"].fit(Activations(linear(features), features), linear, np.zeros(6, np.int64))
    arrays = head.to_arrays()
    assert arrays["principal"].shape == (3, 1)  # half of three features, less than a third of the pictures
    np.testing.assert_allclose(arrays["origin"], 0, atol=1e-7)
    queries = np.array([[2, 0, 0], [2, 0, 3]], np.float32)
    on, off = head.score(Activations(linear(queries), queries))
    assert off - on == pytest.approx(3 * float(arrays["factor"][0]), rel=1e-2)


def test_vim_takes_the_same_space_from_few_and_from_many_pictures() -> None:
    normal, linear, labels = seen(n=36, d=12)
    wide = np.concatenate([normal.features(), np.zeros((36, 60), np.float32)], axis=1)  # more features than pictures
    padded = Linear(np.concatenate([linear.weight, np.zeros((6, 60), np.float32)], axis=1), linear.bias)
    few = HEADS["vim"].fit(normal, linear, labels).to_arrays()["principal"]
    many = HEADS["vim"].fit(Activations(normal.logits, wide), padded, labels).to_arrays()["principal"]
    overlap = np.linalg.svd(few.T @ many[:12])[1]
    np.testing.assert_allclose(overlap, 1, atol=1e-3)


def test_relative_mahalanobis_ranks_what_is_far_from_all_pictures_highest() -> None:
    """With a floor for each covariance it came out below the normal pictures."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 4
    centres = np.random.default_rng(1).normal(size=(4, 400)) + 3

    def pictures() -> Activations:
        features = (centres[labels] + rng.normal(size=(60, 400))).astype(np.float32)
        return Activations(features[:, :4], features)

    head = HEADS["relative_mahalanobis"].fit(pictures(), None, labels)
    elsewhere = (rng.normal(size=(60, 400)) * 2 + 3).astype(np.float32)
    assert np.median(head.score(Activations(elsewhere[:, :4], elsewhere))) > head.score(pictures()).max()


def test_says_what_is_missing() -> None:
    normal, linear, labels = seen()
    with pytest.raises(DataError, match="needs the pooled features"):
        HEADS["knn"].fit(Activations(normal.logits), linear, labels)
    for name in ("vim", "react", "scale"):
        with pytest.raises(DataError, match="weights of the classifier's final layer"):
            HEADS[name].fit(normal, None, labels)
    with pytest.raises(DataError, match="at least two pictures of some class"):
        HEADS["relative_mahalanobis"].fit(normal, linear, np.arange(40))
    with pytest.raises(ArtifactError, match="stored head vim"):
        HEADS["vim"].from_arrays({})
    with pytest.raises(ArtifactError, match=r"lacks the array 'within.mean'"):
        HEADS["relative_mahalanobis"].from_arrays({})
