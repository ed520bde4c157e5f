"""The detector that chooses, standardises and stores heads; the fitted final layer against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

from ood_runners.detectors.base import Probes
from ood_runners.detectors.heads import HEADS, Linear, Standard, fused
from ood_runners.detectors.heads.fusion import FITTED, TRAINED
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


@pytest.mark.parametrize("k", [2, 4])
def test_head_equals_scikit_learn(k: int) -> None:
    features, labels = classes(k)
    queries, truth = classes(k, seed=5)
    detector = Softmax(head="msp").fit(features, labels)
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
    assert detector.layer_ == "layer1" and detector.linear_ is not None and detector.linear_.weight.shape == (3, 8)
    np.testing.assert_array_equal(detector.score(both).image, detector.score(features).image)


def test_predicted_is_the_label_even_when_some_are_missing() -> None:
    features, labels = classes(4)
    kept = labels != 1
    predicted = Softmax().fit(features[kept], labels[kept]).score(features[kept]).predicted
    assert predicted is not None and set(predicted.tolist()) == {0, 2, 3}
    assert (predicted == labels[kept]).mean() > 0.95


def own_network(n: int = 45, seed: int = 0) -> tuple[Features, Linear]:
    """Features whose logits are those of a final layer that is known."""
    pooled = np.abs(classes(n=n // 3, seed=seed)[0].pooled["layer4"])
    rng = np.random.default_rng(5)
    layer = Linear(rng.normal(size=(7, 32)).astype(np.float32), rng.normal(size=7).astype(np.float32))
    return Features(pooled={"layer2": pooled[:, :4], "layer4": pooled}, logits=layer(pooled)), layer


def fitted(head: str, labelled: bool) -> tuple[Softmax, Features]:
    if labelled:
        features, labels = classes()
        return Softmax(head=head).fit(features, labels), features
    features, layer = own_network()
    detector = Softmax(head=head)
    detector.classifier = layer
    return detector.fit(features), features


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("head", ["auto", *HEADS])
def test_a_batch_equals_its_pictures_one_by_one_and_a_round_trip(head: str, labelled: bool) -> None:
    detector, features = fitted(head, labelled)
    whole = detector.score(features)
    singles = Scores.concatenate([detector.score(features[i : i + 1]) for i in range(len(features))])
    np.testing.assert_allclose(whole.image, singles.image, rtol=1e-3, atol=1e-4)
    arrays = dict(sorted(detector.to_arrays().items()))  # a file keeps no order
    loaded = Softmax.from_arrays(arrays, detector.params())
    np.testing.assert_allclose(loaded.score(features).image, whole.image, rtol=1e-6)
    np.testing.assert_array_equal(loaded.score(features).predicted, whole.predicted)
    assert loaded.params() == detector.params() and loaded.classifier is None


def test_auto_follows_where_the_final_layer_comes_from() -> None:
    own, features = fitted("auto", labelled=False)
    assert tuple(own.heads_) == TRAINED and own.layer_ == "layer4"
    assert tuple(fitted("auto", labelled=True)[0].heads_) == FITTED
    one = fitted("energy", labelled=False)[0]
    assert one.layer_ is None and features.logits is not None
    np.testing.assert_allclose(one.score(features).image, -np.logaddexp.reduce(features.logits, axis=1), rtol=1e-5)


@pytest.mark.parametrize("labelled", [True, False])
def test_held_out_scores_look_like_those_of_new_pictures(labelled: bool) -> None:
    detector, features = fitted("auto", labelled)
    labels = np.arange(len(features)) % 3 if labelled else None
    rng = np.random.default_rng(0)
    held_out = detector.fit_held_out(features, rng.permutation(len(features)) % 5, labels)
    new = classes(n=100, seed=9)[0] if labelled else own_network(n=300, seed=9)[0]
    fresh = detector.score(new).image
    share = (fresh[:, None] > held_out.image[None, :]).mean()  # 1/2 if they are alike; seen pictures score lower
    assert 0.4 < share < 0.6
    assert held_out.predicted is not None and len(held_out) == len(features)


def test_a_held_out_score_leaves_out_the_picture_itself() -> None:
    """A head alone gives the score of a detector fitted without the fold; probes those of their origin's fold."""
    features, labels = classes()
    folds, origin = np.arange(len(features)) % 3, np.array([4, 0, 5])
    made = classes(seed=3)[0][:3]
    scores = Softmax(head="knn").fit_held_out(features, folds, labels, probes=Probes(made, origin))
    plain = Softmax(head="knn").fit_held_out(features, folds, labels)
    np.testing.assert_array_equal(scores.image[: len(features)], plain.image)
    for fold in range(3):
        rest = Softmax(head="knn").fit(features[folds != fold], labels[folds != fold])
        np.testing.assert_allclose(plain.image[folds == fold], rest.score(features[folds == fold]).image, rtol=1e-5)
        mine = folds[origin] == fold
        np.testing.assert_allclose(scores.image[len(features) :][mine], rest.score(made[mine]).image, rtol=1e-5)


def test_what_standardises_a_held_out_score_leaves_out_its_fold() -> None:
    features, labels = classes()
    folds = np.arange(len(features)) % 3
    alone = np.stack([Softmax(head=head).fit_held_out(features, folds, labels).image for head in FITTED])
    together = Softmax().fit_held_out(features, folds, labels).image
    for fold in range(3):
        standards = [Standard.fit(row[folds != fold]) for row in alone]
        expected = fused(standards, list(alone[:, folds == fold]))
        np.testing.assert_allclose(together[folds == fold], expected, rtol=1e-4, atol=1e-5)


def test_confidence_far_from_all_pictures_does_not_count_as_normal() -> None:
    """A layer fitted on pictures of one kind is surest of what is furthest away; the default is not."""
    features, labels = classes(n=40)
    normal = classes(n=40, seed=2)[0]
    far = Features(pooled={name: 30 * x for name, x in normal.pooled.items()})
    turned = Features(pooled={"layer4": np.roll(far.pooled["layer4"], 5, axis=1), "layer1": far.pooled["layer1"]})
    energy = Softmax(head="energy").fit(features, labels)
    assert np.median(energy.score(turned).image) < energy.score(normal).image.min()
    both = Softmax().fit(features, labels)
    assert both.score(turned).image.min() > np.quantile(both.score(normal).image, 0.95)


def test_the_number_of_kept_pictures_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ood_runners.detectors.softmax.STATISTICS", 20)
    features, labels = classes()
    assert Softmax(head="knn").fit(features, labels).to_arrays()["head.knn.bank"].shape == (20, 32)


def test_float16_is_upcast() -> None:
    logits = np.array([[30000, 0], [20, 0]], np.float16)
    image = Softmax(head="energy").fit(Features(logits=logits)).score(Features(logits=logits)).image
    np.testing.assert_allclose(image, [-30000, -20], rtol=1e-6)


def test_says_what_does_not_fit() -> None:
    features, labels = classes()
    with pytest.raises(DataError, match="class folders, or use weights that include one"):
        Softmax().fit(features)
    with pytest.raises(DataError, match="at least two classes"):
        Softmax().fit(features, np.zeros_like(labels))
    with pytest.raises(DataError, match="needs pooled features"):
        Softmax().fit(with_logits(), np.arange(30) % 2)
    with pytest.raises(BadParameter, match="no head 'entropy'; choose auto, or one of msp,"):
        Softmax(head="entropy").fit(with_logits())
    with pytest.raises(DataError, match="needs the weights of the classifier's final layer"):
        Softmax(head="react").fit(own_network()[0])
    with pytest.raises(DataError, match="fitted on 12 logits; there are: 5"):
        Softmax(head="msp").fit(with_logits()).score(with_logits(k=5))
    with pytest.raises(DataError, match="no pooled features of 'layer4'"):
        Softmax().fit(features, labels).score(with_logits())
    with pytest.raises(ArtifactError, match="which classes or which heads"):
        Softmax.from_arrays({"classes": np.arange(3)}, {"score": "energy", "temperature": 1.0})
    arrays = Softmax(head="knn").fit(features, labels).to_arrays()
    del arrays["bias"]
    with pytest.raises(ArtifactError, match="without a bias"):
        Softmax.from_arrays(arrays, {})


def test_refuses_what_is_not_finite() -> None:
    features = with_logits()
    detector = Softmax(head="msp").fit(features)
    features.logits[0, 0] = np.nan
    with pytest.raises(DataError, match="logits hold a NaN or an infinity"):
        detector.score(features)
