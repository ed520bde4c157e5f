from __future__ import annotations

import numpy as np
import pytest

from ood_runners.calibration import Calibration
from ood_runners.calibration.weights import CATEGORIES, FOLDERS, INSPECTION, fusion_weights, knows_pictures
from ood_runners.errors import BadParameter
from ood_runners.features import Scores

SIZE = (32, 48)
WEIGHTS = {"memory_bank": 1.0, "mahalanobis": 0.5}


def draw(n: int, seed: int, shift: float = 0.0) -> dict[str, Scores]:
    rng = np.random.default_rng(seed)
    maps = rng.gamma(4.0, size=(n, 8, 12)).astype(np.float32) + np.float32(shift)
    common = rng.normal(size=n)  # the detectors share features, so their scores are correlated
    image = (maps.max(axis=(1, 2)) + common).astype(np.float32)
    other = (common + rng.normal(size=n) + shift).astype(np.float32)
    return {"memory_bank": Scores(image, maps), "mahalanobis": Scores(other)}


def fitted(n: int = 99, alpha: float = 0.05) -> Calibration:
    return Calibration.fit(draw(n, 0), WEIGHTS, SIZE, alpha)


def test_normals_are_flagged_at_about_alpha_and_strange_pictures_are_found():
    rates = []
    for seed in range(40):
        calibration = Calibration.fit(draw(99, seed), WEIGHTS, SIZE, 0.1)
        judged = calibration.judge(draw(200, 1000 + seed))
        rates.append(np.mean([one.verdict == "anomalous" for one in judged]))
    assert 0.08 < np.mean(rates) < 0.12
    assert all(one.verdict == "anomalous" for one in fitted().judge(draw(50, 7, shift=15.0)))


def test_probes_set_the_weights_and_the_false_alarm_rate_stays():
    def drawn(n: int, seed: int, shift: float = 0.0) -> dict[str, Scores]:
        return {"memory_bank": draw(n, seed, shift)["memory_bank"], "mahalanobis": draw(n, seed + 5000)["mahalanobis"]}

    rates, found = [], []
    for seed in range(40):
        calibration = Calibration.fit(drawn(99, seed), WEIGHTS, SIZE, 0.1, probes=drawn(60, 2000 + seed, shift=5.0))
        assert calibration.weights["memory_bank"] == 1 and calibration.weights["mahalanobis"] < 0.1
        rates.append(np.mean([one.verdict == "anomalous" for one in calibration.judge(drawn(200, 1000 + seed))]))
        found.append(np.mean([one.verdict == "anomalous" for one in calibration.judge(drawn(50, 3000, shift=5.0))]))
    assert 0.08 < np.mean(rates) < 0.12
    assert np.mean(found) > 0.5


def test_a_judgement_holds_every_detector_and_ranks_beyond_the_smallest_p():
    calibration = fitted()
    far, further = (calibration.judge(draw(1, 5, shift))[0] for shift in (20.0, 40.0))
    assert far.p_value == further.p_value == pytest.approx(0.01)
    assert further.score > far.score
    assert set(far.detectors) == {"memory_bank", "mahalanobis"}
    assert far.detectors["mahalanobis"].p_value == pytest.approx(0.01)


def test_alpha_is_raised_to_what_n_can_decide_and_a_finer_one_is_refused():
    calibration = fitted(n=50, alpha=0.01)
    assert calibration.alpha == pytest.approx(1 / 51) and calibration.alpha_requested == 0.01
    with pytest.raises(BadParameter, match=r"smallest is 0\.01961"):
        calibration.judge(draw(1, 1), alpha=0.01)
    with pytest.raises(BadParameter, match="between 0 and 1"):
        calibration.judge(draw(1, 1), alpha=2)


def test_a_batch_is_judged_as_its_pictures_one_by_one():
    calibration, scores = fitted(), draw(6, 3)
    singly = [calibration.judge({name: s[i : i + 1] for name, s in scores.items()})[0] for i in range(6)]
    assert calibration.judge(scores) == singly


def test_a_normal_map_stays_below_one_and_its_regions_have_p_values():
    calibration = fitted()
    maps = calibration.anomaly_map(draw(300, 11), SIZE)
    assert maps.shape == (300, *SIZE) and maps.dtype == np.float32
    exceeds = np.mean(maps.reshape(300, -1).max(axis=1) > 1)
    assert exceeds < 0.12  # alpha 0.05, with 300 pictures and 99 calibration scores
    assert abs(np.median(maps)) < 0.1
    assert calibration.region_p_value(0.0) == pytest.approx(1.0)
    assert calibration.region_p_value(1.001) <= 0.05
    assert calibration.region_p_value(50.0) == pytest.approx(0.01)


def test_without_a_map_the_sentence_says_so():
    calibration = Calibration.fit({"mahalanobis": draw(30, 0)["mahalanobis"]}, {"mahalanobis": 1.0}, SIZE, 0.05)
    assert not calibration.localises
    with pytest.raises(BadParameter, match="no detector that localises"):
        calibration.anomaly_map(draw(1, 1), SIZE)


def test_stored_and_loaded_it_judges_the_same():
    calibration, scores = fitted(), draw(5, 9, shift=2.0)
    loaded = Calibration.from_arrays(calibration.to_arrays(), calibration.names)
    assert loaded.judge(scores) == calibration.judge(scores)
    assert np.array_equal(loaded.anomaly_map(scores, SIZE), calibration.anomaly_map(scores, SIZE))
    assert loaded.region_p_value(1.2) == calibration.region_p_value(1.2)


def test_the_named_class_comes_through():
    scores = draw(3, 2) | {"softmax": Scores(np.zeros(3, np.float32), predicted=np.array([2, 0, 1]))}
    calibration = Calibration.fit(draw(30, 0), WEIGHTS, SIZE, 0.1)
    assert [one.predicted for one in calibration.judge(scores)] == [2, 0, 1]


def test_a_picture_unlike_all_others_is_pointed_out():
    held_out = draw(40, 0)
    assert fitted(40).outliers(held_out).tolist() == []
    for i in (3, 17):
        held_out["memory_bank"].image[i] += 60
    calibration = Calibration.fit(held_out, WEIGHTS, SIZE, 0.05)
    assert sorted(calibration.outliers(held_out).tolist()) == [3, 17]


def test_a_head_counts_only_where_it_knows_the_pictures():
    rng = np.random.default_rng(0)
    sure_of_many = np.eye(100)[rng.integers(100, size=200)] * 20
    assert knows_pictures(sure_of_many)
    assert not knows_pictures(np.eye(100)[np.zeros(200, int)] * 20)  # sure, but of one class
    assert not knows_pictures(rng.normal(size=(200, 100)))  # many, but unsure
    assert not knows_pictures(None)
    assert fusion_weights(["vae"], folders=False, categories=False) == {"vae": INSPECTION["vae"]}
    assert fusion_weights(["softmax"], folders=False, categories=True) == {"softmax": CATEGORIES["softmax"]}
    # Class folders decide, whatever a network makes of the pictures.
    for knows in (False, True):
        weights = fusion_weights(["mahalanobis", "softmax"], folders=True, categories=knows)
        assert weights == {"mahalanobis": FOLDERS["mahalanobis"], "softmax": FOLDERS["softmax"]}
    assert FOLDERS["mahalanobis"] > CATEGORIES["mahalanobis"]
