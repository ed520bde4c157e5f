"""Exact nearest neighbours as one matrix product."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from ood_runners.detectors.search import ROWS, Metric, Search, recall
from ood_runners.detectors.torch_search import TorchMetric, TorchSearch
from tests.gpu import DEVICES, needs_gpu

Finder = Callable[..., Search | TorchSearch]


def on(device: str) -> Finder:
    return lambda bank, k, **options: TorchSearch(bank, k, device, **options)


FINDERS = [
    pytest.param(Search, id="openvino"),
    pytest.param(on("cpu"), id="torch"),
    pytest.param(on("cuda"), id="cuda", marks=needs_gpu),
]
every_finder = pytest.mark.parametrize("finder", FINDERS)


def brute_force(bank: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    squared = ((queries[:, None].astype(np.float64) - bank[None].astype(np.float64)) ** 2).sum(axis=2)
    order = np.argsort(squared, axis=1)[:, :k]
    return np.take_along_axis(squared, order, axis=1), order


@pytest.mark.parametrize(("m", "k"), [(1, 1), (2, 3), (3, 3), (31, 3), (33, 1), (700, 5), (1001, 3)])
@every_finder
def test_finds_what_brute_force_finds(finder: Finder, m: int, k: int) -> None:
    rng = np.random.default_rng(m)
    bank = rng.normal(size=(m, 16)).astype(np.float16)
    queries = rng.normal(size=(57, 16)).astype(np.float32)
    squared, found = finder(bank, k).search(queries)
    expected, order = brute_force(bank, queries, k)
    np.testing.assert_allclose(squared, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found, order)


@every_finder
def test_many_queries_are_searched_in_parts(finder: Finder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ood_runners.detectors.torch_search.PRODUCTS", 300 * ROWS)
    rng = np.random.default_rng(0)
    bank, queries = rng.normal(size=(300, 8)).astype(np.float32), rng.normal(size=(2 * ROWS + 5, 8)).astype(np.float32)
    search = finder(bank, 3)
    assert search.search(queries[:0])[0].shape == (0, 3)
    squared, found = search.search(queries)
    last_squared, last_found = search.search(queries[-3:])
    np.testing.assert_allclose(squared[-3:], last_squared, rtol=1e-5)
    np.testing.assert_array_equal(found[-3:], last_found)


@pytest.mark.parametrize(("finder", "rounded"), [(Search, True), *((one.values[0], False) for one in FINDERS[:2])])
def test_entries_can_be_passed_over(finder: Finder, rounded: bool) -> None:
    rng = np.random.default_rng(1)
    bank, queries = rng.normal(size=(200, 8)).astype(np.float32), rng.normal(size=(40, 8)).astype(np.float32)
    without = np.arange(200) % 4 == 1
    options = {"rounded": True} if rounded else {}
    squared, found = finder(bank, 3, without=without, **options).search(queries)
    expected, order = brute_force(bank[~without], queries, 3)
    np.testing.assert_allclose(squared, expected, rtol=1e-2 if rounded else 1e-4, atol=1e-4)
    assert np.mean(found == np.flatnonzero(~without)[order]) > (0.97 if rounded else 0.999)
    assert not without[found].any()


def test_distances_of_rounded_candidates_are_measured_in_float32() -> None:
    rng = np.random.default_rng(3)
    bank = (rng.normal(size=(5_000, 64)) * np.linspace(2, 0.3, 64)).astype(np.float16)
    queries = bank[rng.integers(5_000, size=300)] + rng.normal(0, 0.3, (300, 64)).astype(np.float32)
    exact, entries = Search(bank, 3).search(queries)
    rounded, found = Search(bank, 3, rounded=True).search(queries)
    same = found == entries
    assert same.mean() > 0.99
    np.testing.assert_allclose(rounded[same], exact[same], rtol=1e-4)
    assert recall(bank, queries, 3) > 0.99


def test_recall_tells_when_int8_is_too_coarse() -> None:
    rng = np.random.default_rng(4)
    # All differences lie in what one far entry leaves no steps for.
    bank = rng.normal(0, 0.01, (3_000, 16)).astype(np.float32)
    bank[0] = 100
    queries = rng.normal(0, 0.01, (200, 16)).astype(np.float32)
    assert recall(bank, queries, 3) < 0.9


def test_an_entry_is_at_distance_zero_from_itself() -> None:
    bank = np.random.default_rng(2).normal(size=(500, 64)).astype(np.float16)
    squared, found = Search(bank, 1).search(bank[:20].astype(np.float32))
    assert squared.max() < 1e-4
    np.testing.assert_array_equal(found[:, 0], np.arange(20))


@pytest.mark.parametrize("device", DEVICES)
def test_another_metric_is_the_same_in_torch(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ood_runners.detectors.torch_search.PRODUCTS", 1_000)
    rng = np.random.default_rng(5)
    bank, matrix = rng.normal(size=(400, 16)).astype(np.float16), rng.normal(size=(16, 12)).astype(np.float32)
    queries, entries = rng.normal(size=(77, 16)).astype(np.float32), rng.integers(0, 400, (77, 3))
    moved = (bank.astype(np.float32) @ matrix).astype(np.float16).astype(np.float32)
    expected = np.linalg.norm(moved[entries] - (queries @ matrix)[:, None], axis=2).mean(axis=1)
    for metric in (Metric(bank, matrix), TorchMetric(bank, matrix, device)):
        np.testing.assert_allclose(metric.measure(queries, entries), expected, rtol=1e-4)
        assert metric.measure(queries[:0], entries[:0]).shape == (0,)
