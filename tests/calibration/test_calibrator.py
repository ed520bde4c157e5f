from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import kstest

from ood_runners.calibration import Calibrator, attainable_alpha, certificate, needed_for


def test_p_value_counts_calibration_scores_at_or_above():
    calibrator = Calibrator.fit([3.0, 1.0, 2.0, 2.0])
    assert calibrator.p_value([0.0, 2.0, 2.5, 3.0, 9.0]).tolist() == pytest.approx([1.0, 0.8, 0.4, 0.4, 0.2])


def test_false_alarm_rate_is_at_most_alpha_over_many_calibration_sets():
    rng = np.random.default_rng(0)
    alphas = np.array([0.02, 0.05, 0.1, 0.3])
    flagged = np.zeros(4)
    for _ in range(4000):
        p = Calibrator.fit(rng.gamma(2.0, size=49)).p_value(rng.gamma(2.0, size=1))
        flagged += p <= alphas
    # The exact rate is floor(alpha * 50) / 50: 4,000 draws leave it within four standard errors.
    expected = np.floor(alphas * 50 + 1e-9) / 50
    assert np.all(np.abs(flagged / 4000 - expected) < 4 * np.sqrt(expected * (1 - expected) / 4000))


def test_p_values_of_new_normals_are_uniform():
    rng = np.random.default_rng(1)
    p = [float(Calibrator.fit(rng.normal(size=499)).p_value(rng.normal(size=1))[0]) for _ in range(1000)]
    assert kstest(p, "uniform").pvalue > 0.01


@pytest.mark.parametrize("alpha", [0.02, 0.1, 0.5, 0.98])
def test_threshold_divides_as_the_p_value_does(alpha):
    rng = np.random.default_rng(2)
    calibrator = Calibrator.fit(rng.normal(size=99))
    scores = np.concatenate([rng.normal(size=500), calibrator.scores])
    assert np.array_equal(scores > calibrator.threshold(alpha), calibrator.p_value(scores) <= alpha)


def test_threshold_is_infinite_where_alpha_cannot_be_attained():
    assert Calibrator.fit(np.arange(10.0)).threshold(0.05) == np.inf


@pytest.mark.parametrize(
    "scores", [np.arange(30.0), np.ones(20), np.array([5.0]), np.r_[np.zeros(10), np.arange(10.0)]]
)
def test_surprise_grows_with_the_score_and_goes_on_beyond_the_largest(scores):
    calibrator = Calibrator.fit(scores)
    grid = np.linspace(scores.min() - 5, scores.max() + 50, 2000)
    surprise = calibrator.surprise(grid)
    assert np.isfinite(surprise).all() and np.all(surprise >= 0)
    assert np.all(np.diff(surprise) >= 0)
    beyond = surprise[grid > scores.max()]
    assert np.all(np.diff(beyond) > 0)


def test_surprise_is_close_to_minus_log_p_inside_the_calibration_scores():
    rng = np.random.default_rng(3)
    calibrator = Calibrator.fit(rng.exponential(size=2000))
    grid = np.linspace(0.1, 4.0, 50)
    assert calibrator.surprise(grid) == pytest.approx(grid, abs=0.35)  # -log survival of an exponential is x itself


@pytest.mark.parametrize("scores", [[], [1.0, np.nan], [[1.0], [2.0]]])
def test_unusable_scores_are_refused(scores):
    with pytest.raises(ValueError, match="calibration needs"):
        Calibrator.fit(scores)


def test_what_n_pictures_can_promise():
    assert attainable_alpha(0.01, 50) == pytest.approx(1 / 51)
    assert attainable_alpha(0.1, 50) == 0.1
    assert needed_for(0.01) == 99 and needed_for(0.05) == 19
    assert certificate(0.05, 100)["n_needed"] == 59 and certificate(0.01, 400)["n_needed"] == 299
    # With the maximum as threshold, 59 pictures certify 5 % and 58 do not.
    assert certificate(1 / 60, 59)["bound"] < 0.05 < certificate(1 / 59, 58)["bound"]
