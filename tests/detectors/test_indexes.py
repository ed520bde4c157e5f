"""Approximate search against the exact one; an index that is damaged."""

from __future__ import annotations

import numpy as np
import pytest

from ood_runners.detectors.indexes import EFFORTS, KINDS, SLACK, Index, fit_effort
from ood_runners.detectors.search import Search
from ood_runners.errors import ArtifactError

M, D = 1_500, 16


def clustered(n: int, seed: int) -> np.ndarray:
    """Points around 60 centres, as patches of pictures are around what the pictures show."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(60, D)) * 3
    return (centres[rng.integers(60, size=n)] + rng.normal(size=(n, D))).astype(np.float16)


BANK = clustered(M, 0)
QUERIES = clustered(300, 1).astype(np.float32)
GREATEST = {kind: efforts[-1] for kind, efforts in EFFORTS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_finds_nearly_all_that_the_exact_search_finds_and_measures_it_in_float32(kind: str) -> None:
    exact, entries = Search(BANK, 3).search(QUERIES)
    squared, found = Index(kind, BANK, 3, GREATEST[kind]).search(QUERIES)
    assert squared.dtype == np.float32 and found.dtype == np.int64 and squared.shape == found.shape == (300, 3)
    same = found == entries
    assert same.mean() > 0.97
    np.testing.assert_allclose(squared[same], exact[same], rtol=1e-3, atol=1e-3)
    assert (squared >= exact * (1 - 1e-3) - 1e-3).all()  # what is missed only makes a distance larger
    assert (np.diff(squared, axis=1) >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_equals_its_queries_one_by_one(kind: str) -> None:
    index = Index(kind, BANK, 3, EFFORTS[kind][0])
    squared, found = index.search(QUERIES[:40])
    one_by_one = [index.search(QUERIES[i : i + 1]) for i in range(40)]
    np.testing.assert_allclose(squared, np.concatenate([one[0] for one in one_by_one]), rtol=1e-4)
    np.testing.assert_array_equal(found, np.concatenate([one[1] for one in one_by_one]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_builds_the_same_bytes(kind: str) -> None:
    left, right = (Index(kind, BANK, 3, 8, seed=3).to_arrays() for _ in range(2))
    np.testing.assert_array_equal(left["index"], right["index"])


@pytest.mark.parametrize("kind", KINDS)
def test_stored_and_loaded_it_finds_the_same(kind: str) -> None:
    index = Index(kind, BANK, 3, EFFORTS[kind][1])
    arrays = {name: array.copy() for name, array in index.to_arrays().items()}
    assert {array.dtype.kind for array in arrays.values()} <= {"u", "i"}  # numbers, no objects
    loaded = Index.from_arrays(arrays, BANK, 3)
    assert (loaded.kind, loaded.effort) == (kind, index.effort)
    for left, right in zip(loaded.search(QUERIES), index.search(QUERIES), strict=True):
        np.testing.assert_array_equal(left, right)


def test_without_some_entries_none_of_them_is_found_and_nearly_all_others_are() -> None:
    index = Index("pq", BANK, 3, 16)
    before = index.search(QUERIES)
    passed = np.random.default_rng(5).random(M) < 0.3
    exact, entries = Search(BANK, 3, without=passed).search(QUERIES)
    squared, found = index.without(passed).search(QUERIES)
    assert not passed[found].any()
    same = found == entries
    assert same.mean() > 0.99
    np.testing.assert_allclose(squared[same], exact[same], rtol=1e-3, atol=1e-3)
    for left, right in zip(index.search(QUERIES), before, strict=True):  # it stays as it was
        np.testing.assert_array_equal(left, right)


def test_fewer_entries_than_a_cell_or_than_neighbours() -> None:
    for kind in KINDS:
        squared, found = Index(kind, BANK[:2], 5, 4).search(QUERIES[:3])
        assert found.shape == (3, 2) and sorted(found[0].tolist()) == [0, 1]
        assert np.isfinite(squared).all()
    # One cell of many is looked into, and it may hold fewer than k entries: the rest of the bank fills up.
    lonely = np.concatenate([BANK[:400], np.full((1, D), 200, np.float16)])
    index = Index("ivf", lonely, 3, 1)
    squared, found = index.search(np.full((1, D), 200, np.float32))
    assert found[0, 0] == 400 and (found >= 0).all() and squared[0, 0] == 0 and squared[0, 2] < 1e6


@pytest.mark.parametrize("kind", KINDS)
def test_the_least_effort_that_finds_enough(kind: str) -> None:
    effort, found = fit_effort(kind, BANK, QUERIES, 3, 0.95)
    assert effort in EFFORTS[kind] and found.recall > 0.9 and -1e-3 < found.excess < 0.02
    assert effort >= fit_effort(kind, BANK, QUERIES, 3, 0.0)[0]
    index = Index(kind, BANK, 3, effort)
    nearest = Search(BANK, 1).search(QUERIES[1::2])[0][:, 0]
    near = index.search(QUERIES[1::2])[0][:, 0] <= nearest * SLACK.get(kind, 1.001)
    assert found.recall == pytest.approx(np.mean(near), abs=0.01)


def test_recall_says_when_an_index_finds_too_little() -> None:
    rng = np.random.default_rng(2)
    bank = rng.normal(size=(20_000, 64)).astype(np.float16)  # as many directions as there are: no cells to speak of
    effort, found = fit_effort("hnsw", bank[:4_000], rng.normal(size=(400, 64)).astype(np.float32), 3, 1.0)
    assert effort == GREATEST["hnsw"] and 0.5 < found.recall <= 1
    index = Index("ivf", bank, 3, 4)
    exact = Search(bank, 1).search(QUERIES_64)[1]
    assert np.mean(index.search(QUERIES_64)[1][:, :1] == exact) < 0.5


QUERIES_64 = np.random.default_rng(3).normal(size=(200, 64)).astype(np.float32)


def test_few_patches_that_end_up_far_away_are_enough_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recall hardly sees one patch in a hundred, and the mean of the largest distances is all of them."""
    found = Index.search

    def lost(index: Index, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        squared, entries = found(index, queries)
        squared[::200] += 400
        return squared, entries

    queries = clustered(800, 1).astype(np.float32)
    assert fit_effort("ivf", BANK, queries, 3, 0.95)[1].enough(0.95)
    monkeypatch.setattr(Index, "search", lost)
    effort, quality = fit_effort("ivf", BANK, queries, 3, 0.95)
    assert effort == GREATEST["ivf"] and quality.recall > 0.99 and quality.excess > 0.1 and not quality.enough(0.95)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_or_foreign_index_is_refused_in_a_sentence(kind: str) -> None:
    arrays = Index(kind, BANK, 3, 8).to_arrays()
    stored, rng = arrays["index"], np.random.default_rng(0)
    damaged = [stored[: len(stored) // 2], stored[:0], np.concatenate([stored, stored[:9]])]
    for place in [0, 1, 5, 20, 33, *rng.integers(len(stored), size=40)]:
        flipped = stored.copy()
        flipped[place] ^= 1 << int(rng.integers(8))
        damaged.append(flipped)
    for one in damaged:
        with pytest.raises(ArtifactError, match="its bytes have changed"):
            Index.from_arrays(arrays | {"index": one}, BANK, 3)
    for missing in arrays:
        with pytest.raises(ArtifactError, match="cannot be read"):
            Index.from_arrays({name: array for name, array in arrays.items() if name != missing}, BANK, 3)
    with pytest.raises(ArtifactError, match="not an index of these entries"):
        Index.from_arrays(arrays, BANK[1:], 3)
    other = KINDS.index(next(name for name in KINDS if name != kind))
    for use in ([other, 8], [7, 8], [0]):
        with pytest.raises(ArtifactError, match="cannot be read"):
            Index.from_arrays(arrays | {"index_use": np.array(use)}, BANK, 3)


def test_bytes_that_are_no_index_are_refused_though_their_digest_is_right() -> None:
    from ood_runners.detectors.indexes import _digest

    arrays = Index("ivf", BANK, 3, 8).to_arrays()
    for content in (b"", b"no index at all", arrays["index"][:4].tobytes(), arrays["index"][:200].tobytes()):
        stored = np.frombuffer(content, np.uint8)
        with pytest.raises(ArtifactError, match="cannot be read"):
            Index.from_arrays(arrays | {"index": stored, "index_sha256": _digest(stored)}, BANK, 3)
