"""Energy and maximum softmax probability against SciPy, and the fitted head against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import logsumexp, softmax
from sklearn.linear_model import LogisticRegression

from ood_runners.detectors.softmax import INVERSE_REGULARISATION, Softmax
from ood_runners.errors import ArtifactError, BadParameter, DataError
from ood_runners.features import Features, Scores


def with_logits(n: int = 30, k: int = 12, seed: int = 0) -> Features:
    return Features(logits=(np.random.default_rng(seed).normal(size=(n, k)) * 6).astype(np.float32))


def classes(k: int = 3, n: int = 15, seed: int = 0) -> tuple[Features, np.ndarray]:
    """Pictures of k classes whose deepest layer tells them apart; labels 0 … k-1 in turn."""
    rng = np.random.default_rng(seed)
    labels = np.arange(k * n) % k
    centres = np.random.default_rng(77).normal(size=(k, 32)) * 2
    deep = (centres[labels] + rng.normal(size=(k * n, 32)) + 5).astype(np.float32)
    return Features(pooled={"layer4": deep, "layer1": rng.normal(size=(k * n, 8)).astype(np.float32)}), labels


@pytest.mark.parametrize("temperature", [0.5, 1.0, 10.0])
def test_energy_equals_scipy(temperature: float) -> None:
    features = with_logits()
    scores = Softmax(temperature=temperature).fit(features).score(features)
    wide = features.logits.astype(np.float64)
    np.testing.assert_allclose(scores.image, -temperature * logsumexp(wide / temperature, axis=1), rtol=1e-5)
    np.testing.assert_array_equal(scores.predicted, wide.argmax(axis=1))
    assert scores.image.dtype == np.float32


def test_msp_equals_scipy() -> None:
    features = with_logits()
    scores = Softmax(score="msp").fit(features).score(features)
    expected = 1 - softmax(features.logits.astype(np.float64), axis=1).max(axis=1)
    np.testing.assert_allclose(scores.image, expected, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("score", ["energy", "msp"])
def test_less_confidence_is_stranger_and_extremes_stay_ordered(score: str) -> None:
    top = np.array([1000, 80, 40, 20, 5, 1, 0], np.float32)  # 1 - p rounds to 0 in float32 from 17 on
    features = Features(logits=np.stack([top, np.zeros(7, np.float32), np.zeros(7, np.float32)], axis=1))
    image = Softmax(score=score).fit(features).score(features).image
    assert np.isfinite(image).all() and (np.diff(image) > 0).all()


@pytest.mark.parametrize("k", [2, 4])
def test_head_equals_scikit_learn(k: int) -> None:
    features, labels = classes(k)
    queries, truth = classes(k, seed=5)
    detector = Softmax(score="msp").fit(features, labels)
    x = features.pooled["layer4"].astype(np.float64)
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    model = LogisticRegression(C=INVERSE_REGULARISATION, max_iter=1000).fit((x - mean) / deviation, labels)
    expected = model.predict_proba((queries.pooled["layer4"] - mean) / deviation)
    np.testing.assert_allclose(softmax(detector.logits(queries), axis=1), expected, atol=1e-4)
    scores = detector.score(queries)
    np.testing.assert_allclose(scores.image, 1 - expected.max(axis=1), atol=1e-4)
    assert detector.layer_ == "layer4" and (scores.predicted == truth).mean() > 0.9


def test_head_is_preferred_over_the_networks_own_logits() -> None:
    features, labels = classes()
    both = Features(pooled=features.pooled, logits=with_logits(len(features)).logits)
    detector = Softmax(layer="layer1").fit(both, labels)
    assert detector.layer_ == "layer1" and detector.weight_.shape == (8, 3)
    np.testing.assert_array_equal(detector.score(both).image, detector.score(features).image)


def test_predicted_is_the_label_even_when_some_are_missing() -> None:
    features, labels = classes(4)
    kept = labels != 1
    predicted = Softmax().fit(features[kept], labels[kept]).score(features[kept]).predicted
    assert predicted is not None and set(predicted.tolist()) == {0, 2, 3}
    assert (predicted == labels[kept]).mean() > 0.95


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("score", ["energy", "msp"])
def test_a_batch_equals_its_pictures_one_by_one_and_a_round_trip(score: str, labelled: bool) -> None:
    features, labels = classes()
    features = Features(pooled=features.pooled, logits=with_logits(len(features)).logits)
    detector = Softmax(score=score, temperature=2.0).fit(features, labels if labelled else None)
    whole = detector.score(features)
    singles = Scores.concatenate([detector.score(features[i : i + 1]) for i in range(len(features))])
    np.testing.assert_allclose(whole.image, singles.image, rtol=1e-4, atol=1e-6)
    loaded = Softmax.from_arrays(detector.to_arrays(), detector.params())
    np.testing.assert_array_equal(loaded.score(features).image, whole.image)
    np.testing.assert_array_equal(loaded.score(features).predicted, whole.predicted)
    assert loaded.params() == detector.params()


def test_float16_is_upcast() -> None:
    logits = np.array([[30000, 0], [20, 0]], np.float16)
    image = Softmax().fit(Features(logits=logits)).score(Features(logits=logits)).image
    np.testing.assert_allclose(image, [-30000, -20], rtol=1e-6)


def test_says_what_does_not_fit() -> None:
    features, labels = classes()
    with pytest.raises(DataError, match="class folders, or use weights that include one"):
        Softmax().fit(features)
    with pytest.raises(DataError, match="at least two classes"):
        Softmax().fit(features, np.zeros_like(labels))
    with pytest.raises(DataError, match="needs pooled features"):
        Softmax().fit(with_logits(), np.arange(30) % 2)
    with pytest.raises(BadParameter, match="'energy' or 'msp', not 'entropy'"):
        Softmax(score="entropy").fit(with_logits())
    with pytest.raises(BadParameter, match="above 0"):
        Softmax(temperature=0).fit(with_logits())
    with pytest.raises(DataError, match="fitted on 12 logits; there are: 5"):
        Softmax().fit(with_logits()).score(with_logits(k=5))
    with pytest.raises(DataError, match="no pooled features of 'layer4'"):
        Softmax().fit(features, labels).score(with_logits())
    with pytest.raises(ArtifactError, match="which classes"):
        Softmax.from_arrays({}, {})


def test_refuses_what_is_not_finite() -> None:
    features = with_logits()
    detector = Softmax().fit(features)
    features.logits[0, 0] = np.nan
    with pytest.raises(DataError, match="logits hold a NaN or an infinity"):
        detector.score(features)
