"""The promise: of new normal pictures a share of alpha is called anomalous, and their p-values are uniform."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import kstest

from ood_runners.calibration import Calibration
from ood_runners.calibration.guarantee import false_alarms
from ood_runners.detectors import Mahalanobis
from ood_runners.features import Features

ALPHAS = (0.02, 0.05, 0.10)
N, M, SPLITS, FOLDS, CHANNELS = 79, 40, 30, 10, 40
LAYERS = {"memory_bank": "early", "mahalanobis": "late"}  # two real detectors under the names that fusion knows


def population() -> Features:
    """Normal pictures with heavy tails and layers that have much in common; nothing of a Gaussian law."""
    rng = np.random.default_rng(7)
    common = rng.standard_t(8, size=(N + M, CHANNELS))
    pooled = {
        layer: (common + rng.standard_t(8, size=(N + M, CHANNELS))).astype(np.float32) for layer in LAYERS.values()
    }
    return Features(pooled=pooled)


def splits(cross_fitted: bool) -> list[np.ndarray]:
    """p-values (m,) of the judged pictures of each split."""
    features, rng, found = population(), np.random.default_rng(1), []
    for _ in range(SPLITS):
        order = rng.permutation(N + M)
        seen, new = features[order[:N]], features[order[N:]]
        detectors = {name: Mahalanobis(layers=[layer]) for name, layer in LAYERS.items()}
        folds = rng.permutation(np.arange(N) % FOLDS)
        held_out = {name: one.fit_held_out(seen, folds) for name, one in detectors.items()}
        if not cross_fitted:
            held_out = {name: one.score(seen) for name, one in detectors.items()}
        calibration = Calibration.fit(held_out, {name: 1.0 for name in LAYERS}, (32, 32), ALPHAS[0])
        judged = calibration.judge({name: one.score(new) for name, one in detectors.items()})
        found.append(np.array([one.p_value for one in judged]))
    return found


def bounds(alpha: float) -> tuple[float, float]:
    """What the number of false alarms of all splits lies between with a chance of 99.8 %, if the promise holds."""
    drawn = false_alarms(alpha, N, M).rvs((20_000, SPLITS), random_state=np.random.default_rng(0)).sum(axis=1)
    low, high = np.quantile(drawn, [0.001, 0.999])
    return float(low), float(high)


def distance(p: list[np.ndarray], rng: np.random.Generator) -> float:
    """Kolmogorov-Smirnov distance from uniform of pooled p-values, which are multiples of 1 / (n + 1)."""
    pooled = np.concatenate(p)
    return float(kstest(pooled - rng.uniform(size=len(pooled)) / (N + 1), "uniform").statistic)


def usual_distance(rng: np.random.Generator) -> float:
    """What that distance stays below in 199 of 200 sets of splits where each one's pictures are exchangeable."""
    found = []
    for _ in range(400):
        ranks = rng.uniform(size=(SPLITS, N + M))
        known = np.sort(ranks[:, :N], axis=1)
        p = [(1 + N - np.searchsorted(one, new)) / (N + 1) for one, new in zip(known, ranks[:, N:], strict=True)]
        found.append(distance(p, rng))
    return float(np.quantile(found, 0.995))


def test_over_repeated_splits_false_alarms_are_as_promised_and_p_values_uniform() -> None:
    kept, broken = splits(cross_fitted=True), splits(cross_fitted=False)
    for alpha in ALPHAS:
        low, high = bounds(alpha)
        assert low <= sum(int((p <= alpha).sum()) for p in kept) <= high
    rng = np.random.default_rng(3)
    usual = usual_distance(rng)
    # The other half: it would be seen if calibration scores were those of pictures that the detectors were fitted on.
    assert distance(kept, rng) < usual < distance(broken, rng)


@pytest.mark.parametrize(("alpha", "n", "k"), [(0.1, 19, 2), (0.05, 19, 1), (0.3, 9, 3), (0.01, 99, 1)])
def test_the_law_of_false_alarms_is_that_of_ranks(alpha: float, n: int, k: int) -> None:
    m, rng = 6, np.random.default_rng(0)
    drawn = rng.uniform(size=(20_000, n + m))
    threshold = -np.sort(-drawn[:, :n], axis=1)[:, k - 1]
    above = (drawn[:, n:] > threshold[:, None]).sum(axis=1)
    law = false_alarms(alpha, n, m)
    assert law.mean() == pytest.approx(m * k / (n + 1))
    np.testing.assert_allclose(np.bincount(above, minlength=m + 1) / len(above), law.pmf(np.arange(m + 1)), atol=0.015)


def test_the_law_where_no_alarm_is_possible_or_all_are() -> None:
    assert false_alarms(0.01, 50, 9).mean() == 0
    assert false_alarms(1 - 1e-12, 50, 9).mean() == pytest.approx(9)
