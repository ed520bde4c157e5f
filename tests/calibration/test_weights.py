from __future__ import annotations

import numpy as np
import pytest

from ood_runners.calibration.weights import weights_from_probes

PRIOR = {"memory_bank": 1.0, "mahalanobis": 0.5, "vae": 0.3}


def scores(**shifts: float) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Scores of probes and of normals; the probes' are shifted by so many standard deviations."""
    rng = np.random.default_rng(0)
    normals = {name: rng.normal(size=4000) for name in shifts}
    return {name: rng.normal(size=4000) + shift for name, shift in shifts.items()}, normals


def test_equal_detectors_keep_their_prior_and_a_blind_one_counts_for_nothing():
    probes, normals = scores(memory_bank=2, mahalanobis=2, vae=0)
    weights = weights_from_probes(PRIOR, probes, normals)
    assert list(weights) == list(PRIOR)
    assert weights["memory_bank"] == pytest.approx(1, abs=0.05)
    assert weights["mahalanobis"] == pytest.approx(0.5, abs=0.03)
    assert weights["vae"] < 0.01


def test_the_best_keeps_its_weight_and_the_others_fall_with_the_distance_they_see():
    probes, normals = scores(memory_bank=0.5, mahalanobis=2, vae=2)
    weights = weights_from_probes(PRIOR, probes, normals)
    assert max(weights["mahalanobis"] / 0.5, weights["vae"] / 0.3) == 1
    assert weights["memory_bank"] == pytest.approx(0.5 / 2, abs=0.03)


def test_among_detectors_that_see_nearly_all_rare_mistakes_still_tell():
    """AUROC 0.996 and 0.966: 2 AUROC - 1 is nearly the same, and one makes eight times as many mistakes."""
    probes, normals = scores(memory_bank=3.75, mahalanobis=2.58)
    weights = weights_from_probes({"memory_bank": 1.0, "mahalanobis": 1.0}, probes, normals)
    assert weights["mahalanobis"] == pytest.approx(2.58 / 3.75, abs=0.03)


def test_a_few_normals_without_a_mistake_are_no_perfection():
    rng = np.random.default_rng(0)
    normals = {name: rng.normal(size=30) for name in ("memory_bank", "vae")}
    probes = {"memory_bank": np.full(50, 100.0), "vae": rng.normal(size=50) + 2}
    weights = weights_from_probes({"memory_bank": 1.0, "vae": 0.3}, probes, normals)
    assert weights["memory_bank"] == 1
    assert 0.15 < weights["vae"] < 0.25  # AUROC 0.92 of at most 0.984


def test_a_detector_that_is_worse_than_chance_does_not_count_backwards():
    probes, normals = scores(memory_bank=2, mahalanobis=-2, vae=1)
    assert weights_from_probes(PRIOR, probes, normals)["mahalanobis"] == 0


def test_where_none_sees_the_probes_the_prior_stands():
    probes, normals = scores(memory_bank=-1, mahalanobis=-2, vae=-1)
    assert weights_from_probes(PRIOR, probes, normals) == PRIOR


def test_ties_count_as_one_half():
    weights = weights_from_probes(
        {"memory_bank": 1.0, "vae": 1.0},
        {"memory_bank": np.array([1.0, 2.0]), "vae": np.array([1.0, 1.0])},
        {"memory_bank": np.array([0.0, 0.0]), "vae": np.array([1.0, 1.0])},
    )
    assert weights == {"memory_bank": 1.0, "vae": 0.0}
