"""Blocked greedy k-centre against the plain one-by-one algorithm."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ood_runners.detectors.coreset import greedy_coreset
from ood_runners.errors import DataError


def naive(points: np.ndarray, size: int, first: int) -> tuple[list[int], list[float]]:
    """Farthest-point order in float64 from `first`, and each pick's distance to those before it."""
    points = points.astype(np.float64)
    chosen, radii = [first], [np.inf]
    distances = ((points - points[first]) ** 2).sum(1)
    while len(chosen) < size:
        best = int(distances.argmax())
        chosen.append(best)
        radii.append(float(np.sqrt(distances[best])))
        distances = np.minimum(distances, ((points - points[best]) ** 2).sum(1))
    return chosen, radii


@pytest.mark.parametrize("block", [1, 7, 64, 5000])
def test_equals_the_naive_order(block: int) -> None:
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(12, 16)) * 4
    points = (centres[rng.integers(12, size=3000)] + rng.normal(size=(3000, 16))).astype(np.float32)
    chosen = greedy_coreset(points, 250, seed=3, block=block)
    expected, _ = naive(points, 250, int(chosen[0]))
    assert chosen.tolist() == expected


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 120),
    d=st.integers(1, 5),
    size=st.integers(1, 130),
    block=st.integers(1, 40),
    seed=st.integers(0, 9),
)
def test_every_pick_is_the_farthest_even_among_ties(n: int, d: int, size: int, block: int, seed: int) -> None:
    # Points on a small grid are full of ties and duplicates: compare radii, not indices.
    points = np.random.default_rng(seed).integers(0, 4, size=(n, d)).astype(np.float32)
    chosen = greedy_coreset(points, size, seed=seed, block=block)
    distinct = len(np.unique(points, axis=0))
    assert len(chosen) == min(size, distinct)
    assert len(np.unique(points[chosen], axis=0)) == len(chosen)
    for i in range(1, len(chosen)):
        gaps = np.linalg.norm(points[:, None] - points[chosen[:i]][None], axis=2).min(axis=1)
        assert gaps[chosen[i]] == pytest.approx(gaps.max(), rel=1e-4)


def test_more_rows_than_a_chunk_and_float16_memory_map(tmp_path: Path) -> None:
    points = np.random.default_rng(0).normal(size=(9001, 8)).astype(np.float16)
    np.save(tmp_path / "points.npy", points)
    mapped = np.load(tmp_path / "points.npy", mmap_mode="r")
    chosen = greedy_coreset(mapped, 40)
    assert chosen.tolist() == naive(points, 40, int(chosen[0]))[0]


def test_projection_keeps_the_covering_radius_close() -> None:
    rng = np.random.default_rng(2)
    points = (rng.normal(size=(2000, 400)) * np.linspace(3, 0.1, 400)).astype(np.float32)

    def radius(chosen: np.ndarray) -> float:
        return float(np.linalg.norm(points[:, None] - points[chosen][None], axis=2).min(axis=1).max())

    exact = greedy_coreset(points, 60, projection_dim=None)
    projected = greedy_coreset(points, 60, projection_dim=64)
    assert exact.tolist() == naive(points, 60, int(exact[0]))[0]
    assert projected.tolist() != exact.tolist()
    assert radius(projected) < 1.2 * radius(exact)


def test_same_seed_same_coreset_and_another_seed_another_start() -> None:
    points = np.random.default_rng(0).normal(size=(500, 100)).astype(np.float32)
    runs = [greedy_coreset(points, 50, seed=seed).tolist() for seed in (4, 4, 5)]
    assert runs[0] == runs[1] != runs[2]
    assert len({greedy_coreset(points, 1, seed=seed)[0] for seed in range(5)}) > 1


def test_far_from_the_origin_distances_stay_exact() -> None:
    points = (np.random.default_rng(5).normal(size=(800, 6)) + 1000).astype(np.float32)
    chosen = greedy_coreset(points, 100)
    assert chosen.tolist() == naive(points, 100, int(chosen[0]))[0]


def test_progress_reaches_the_size() -> None:
    seen: list[int] = []
    greedy_coreset(np.random.default_rng(0).normal(size=(2000, 4)), 300, block=32, progress=seen.append)
    assert seen == sorted(seen) and seen[-1] == 300 and len(seen) > 3


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_refuses_what_is_not_finite(bad: float) -> None:
    points = np.zeros((10, 3), np.float16)
    points[7, 1] = bad
    with pytest.raises(DataError, match="NaN or an infinity"):
        greedy_coreset(points, 3)


def test_nothing_asked_or_given() -> None:
    assert greedy_coreset(np.zeros((5, 2)), 0).shape == (0,)
    assert greedy_coreset(np.zeros((0, 2)), 4).shape == (0,)
    assert len(greedy_coreset(np.ones((5, 2)), 4)) == 1
