"""The memory bank against scikit-learn's exact neighbours and brute force."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from ood_runners.detectors import coreset, indexes, memory_bank
from ood_runners.detectors.base import Probes
from ood_runners.detectors.memory_bank import MemoryBank
from ood_runners.errors import ArtifactError, DataError
from ood_runners.features import Features, Scores


def normals(n: int = 12, side: int = 6, d: int = 10, seed: int = 0) -> Features:
    patches = np.random.default_rng(seed).normal(size=(n, side, side, d)).astype(np.float16)
    return Features(patches=patches)


def reference_map(bank: Any, patches: Any, k: int) -> np.ndarray:
    """Mean distance to the k nearest entries, by scikit-learn in float64."""
    neighbours = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(bank.astype(np.float64))
    distances, _ = neighbours.kneighbors(patches.reshape(-1, patches.shape[-1]).astype(np.float64))
    return distances.mean(axis=1).reshape(patches.shape[:3])


def assert_same(left: Scores, right: Scores) -> None:
    np.testing.assert_allclose(left.image, right.image, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(left.map, right.map, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_map_equals_scikit_learn(k: int) -> None:
    detector = MemoryBank(size=100, k=k).fit(normals())
    queries = normals(5, seed=1)
    scores = detector.score(queries)
    assert detector.bank_.shape == (100, 10) and detector.bank_.dtype == np.float16
    assert scores.map is not None and scores.map.shape == (5, 6, 6) and scores.map.dtype == np.float32
    np.testing.assert_allclose(scores.map, reference_map(detector.bank_, queries.patches, k), rtol=1e-4)
    np.testing.assert_allclose(scores.image, scores.map.reshape(5, -1).max(axis=1))  # 1 % of 36 cells is one


def test_entries_are_the_patches_that_source_names() -> None:
    features = normals()
    detector = MemoryBank(size=80)
    detector.fit_held_out(features, np.arange(12) % 3)
    cells = features.patches.reshape(12, 36, 10)
    np.testing.assert_array_equal(cells[detector.source_[:, 0], detector.source_[:, 1]], detector.bank_)
    np.testing.assert_array_equal(detector.source_[:, 0] % 3, detector.fold_)
    assert detector.source_.dtype == np.int32 and len(np.unique(detector.source_, axis=0)) == 80


def test_held_out_equals_brute_force() -> None:
    features, folds = normals(), np.random.default_rng(4).permutation(np.arange(12) % 4)
    detector = MemoryBank(size=90, k=2)
    scores = detector.fit_held_out(features, folds)
    for i, fold in enumerate(folds):
        rest = detector.bank_[detector.fold_ != fold]
        np.testing.assert_allclose(scores.map[i], reference_map(rest, features.patches[i : i + 1], 2)[0], rtol=1e-4)
    # The final bank is a superset of each one that scored a fold.
    assert (detector.score(features).map <= scores.map + 1e-3).all()


def test_probes_are_scored_without_the_fold_of_their_origin() -> None:
    features, folds, origin = normals(), np.arange(12) % 4, np.array([5, 2, 8, 5])
    made = normals(4, seed=9)
    detector = MemoryBank(size=90, k=2)
    scores = detector.fit_held_out(features, folds, probes=Probes(made, origin))
    assert len(scores) == 12 + 4
    for i, fold in enumerate(folds[origin]):
        rest = detector.bank_[detector.fold_ != fold]
        np.testing.assert_allclose(scores.map[12 + i], reference_map(rest, made.patches[i : i + 1], 2)[0], rtol=1e-4)


def test_uneven_folds_share_in_proportion_and_fill_the_bank() -> None:
    detector = MemoryBank(size=101)
    detector.fit_held_out(normals(), np.array([5] * 6 + [2] * 4 + [9] * 2))
    folds, counts = np.unique(detector.fold_, return_counts=True)
    assert folds.tolist() == [2, 5, 9] and counts.sum() == 101
    np.testing.assert_allclose(counts / 101, [4 / 12, 6 / 12, 2 / 12], atol=0.01)


def test_one_fold_gives_the_bank_of_fit() -> None:
    fitted = MemoryBank(size=50, seed=3).fit(normals())
    again = MemoryBank(size=50, seed=3).fit(normals())
    np.testing.assert_array_equal(fitted.bank_, again.bank_)
    with pytest.raises(DataError, match="two folds"):
        MemoryBank().fit_held_out(normals(), np.zeros(12, np.int64))


def test_a_batch_equals_its_pictures_one_by_one() -> None:
    detector = MemoryBank(size=60).fit(normals())
    queries = normals(70, seed=2)  # more than are searched at a time
    one_by_one = Scores.concatenate([detector.score(queries[i : i + 1]) for i in range(len(queries))])
    assert_same(detector.score(queries), one_by_one)


def test_round_trip_scores_the_same() -> None:
    features = Features(patches=np.random.default_rng(0).normal(size=(8, 5, 5, 4)).astype(np.float32))
    detector = MemoryBank(size=40, k=2).fit(features)
    arrays = {name: array.copy() for name, array in detector.to_arrays().items()}
    loaded = MemoryBank.from_arrays(arrays, detector.params())
    np.testing.assert_array_equal(loaded.score(features).map, detector.score(features).map)
    assert loaded.params() == detector.params() and loaded.to_arrays().keys() == arrays.keys()


def test_fit_again_replaces_the_bank() -> None:
    detector = MemoryBank(size=30).fit(normals(seed=1))
    before = detector.score(normals(seed=1)).image
    detector.fit(normals(seed=8))
    assert detector.score(normals(seed=1)).image.mean() > before.mean()


def test_k_is_clipped_to_a_small_bank() -> None:
    patches = np.zeros((2, 3, 3, 4), np.float16)  # all patches coincide: the bank has a single entry
    detector = MemoryBank(k=5).fit(Features(patches=patches))
    assert len(detector.bank_) == 1
    far = detector.score(Features(patches=patches + np.float16(1)))
    np.testing.assert_allclose(far.map, 2.0)


def test_grows_with_displacement() -> None:
    detector = MemoryBank(size=100).fit(normals())
    query = normals(1, seed=3).patches.astype(np.float32)
    images = []
    for step in (0, 2, 4, 8):
        moved = query.copy()
        moved[0, 2, 2] += step
        images.append(float(detector.score(Features(patches=moved)).image[0]))
    assert images == sorted(images) and len(set(images)) == 4


def test_merge_reduce_covers_nearly_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    features = normals(30)
    whole = MemoryBank(size=120, k=1).fit(features)
    monkeypatch.setattr(coreset, "MAX_PATCHES", 200)  # runs of five pictures, and merges in between
    merged = MemoryBank(size=120, k=1).fit(features)
    assert merged.bank_.shape == whole.bank_.shape
    cells = features.patches.reshape(30, 36, 10)
    np.testing.assert_array_equal(cells[merged.source_[:, 0], merged.source_[:, 1]], merged.bank_)
    assert len(np.unique(merged.source_[:, 0])) > 20  # from all runs, not from the last
    assert merged.score(features).map.max() < 1.3 * whole.score(features).map.max()


def test_progress_grows_to_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coreset, "MAX_PATCHES", 150)
    seen: list[int] = []
    MemoryBank(size=300).fit_held_out(normals(20), np.arange(20) % 2, progress=seen.append)
    assert seen == sorted(seen) and 0 < seen[0] < 300 and seen[-1] == 300


def test_memory_stays_bounded_on_a_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (400, 14, 14, 128)  # 20 MB
    patches = np.lib.format.open_memmap(tmp_path / "patches.npy", mode="w+", dtype=np.float16, shape=shape)
    rng = np.random.default_rng(0)
    for start in range(0, 400, 50):
        patches[start : start + 50] = rng.normal(size=(50, *shape[1:]))
    patches.flush()
    features = Features(patches=np.load(tmp_path / "patches.npy", mmap_mode="r"))
    folds = np.arange(400) % 4
    detector = MemoryBank(size=80)
    monkeypatch.setattr(coreset, "MAX_PATCHES", 2_000)
    monkeypatch.setattr(memory_bank, "SEARCH_PICTURES", 4)
    import faiss  # noqa: F401  (its loading is not the bank's memory)

    tracemalloc.start()
    try:
        scores = detector.fit_held_out(features, folds)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(scores) == 400 and len(detector.bank_) == 80
    assert peak < 6 * 2**20, f"{peak / 2**20:.1f} MiB at its peak for a file of 20 MB"


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e6])
def test_refuses_what_is_not_finite(bad: float) -> None:
    features = Features(patches=normals().patches.astype(np.float32))
    features.patches[3, 1, 1, 1] = bad
    with pytest.raises(DataError, match="NaN or an infinity"):
        MemoryBank().fit(features)
    if not np.isfinite(bad):
        with pytest.raises(DataError, match="NaN or an infinity"):
            MemoryBank().fit(normals()).score(features)


def test_says_what_does_not_fit() -> None:
    with pytest.raises(DataError, match="needs patch features"):
        MemoryBank().fit(Features(pooled={"layer3": np.ones((3, 4), np.float32)}))
    detector = MemoryBank(size=20).fit(normals())
    with pytest.raises(DataError, match="11 dimensions and the memory bank 10"):
        detector.score(normals(d=11))
    arrays = detector.to_arrays() | {"bank": np.empty((0, 10), np.float16)}
    with pytest.raises(ArtifactError, match="empty"):
        MemoryBank.from_arrays(arrays, detector.params())


def spread(n: int, seed: int) -> Features:
    """Patches of n pictures around 40 centres."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(77).normal(size=(40, 32)) * 3
    return Features(
        patches=(centres[rng.integers(40, size=(n, 10, 10))] + rng.normal(size=(n, 10, 10, 32))).astype("f2")
    )


def test_a_large_bank_is_searched_in_int8_where_that_finds_enough() -> None:
    features = spread(30, 5)
    detector = MemoryBank(size=2_500, search="int8")
    held_out = detector.fit_held_out(features, np.arange(30) % 5)
    info = detector.info()
    assert 0 < info["recall"] <= 1  # one without VNNI rounds sums of products, and finds far less
    assert info["search"] == ("int8" if info["recall"] >= 0.99 else "exact")
    searched = [
        MemoryBank.from_arrays(detector.to_arrays() | {"recall": np.array([found])}, detector.params())
        for found in (0.999, 0.5)
    ]
    assert [one.info()["search"] for one in searched] == ["int8", "exact"]
    rounded, exact = (one.score(features).image for one in searched)
    if info["recall"] >= 0.99:
        np.testing.assert_allclose(rounded, exact, rtol=1e-2, atol=2e-2)
    assert np.all(np.isfinite(held_out.image)) and (rounded >= exact - 0.02).all()
    assert MemoryBank(size=500).fit(features).info() == {"entries": 500, "search": "exact"}


@pytest.mark.parametrize("search", ["ivf", "hnsw", "lsh", "pq"])
def test_an_index_scores_new_pictures_and_those_held_out_as_the_exact_search(search: str) -> None:
    features, folds, queries = spread(30, 5), np.arange(30) % 5, spread(6, 8)
    exact, indexed = MemoryBank(size=1_500, search="exact"), MemoryBank(size=1_500, search=search)
    plain, held_out = (one.fit_held_out(features, folds) for one in (exact, indexed))
    np.testing.assert_allclose(held_out.image, plain.image, rtol=1e-3)
    assert np.mean(np.isclose(held_out.map, plain.map, rtol=1e-3, atol=1e-3)) > (0.999 if search == "pq" else 0.9999)
    info = indexed.info()
    assert info["search"] == search and info["recall"] >= 0.99 and info["index_recall"] == {search: info["recall"]}
    assert info["index_excess"][search] <= 0.01
    assert exact.position_ is not None
    maps, close = (one.score(queries).map * exact.position_.spread + exact.position_.centre for one in (exact, indexed))
    assert (close >= maps * (1 - 1e-3)).all()  # what an index misses only makes a distance larger
    assert np.mean(np.isclose(close, maps, rtol=0.05 if search == "pq" else 1e-3)) > 0.97
    close = indexed.score(queries).map
    loaded = MemoryBank.from_arrays({k: v.copy() for k, v in indexed.to_arrays().items()}, indexed.params())
    np.testing.assert_array_equal(loaded.score(queries).map, close)
    assert loaded.info() == info
    one_by_one = Scores.concatenate([loaded.score(queries[i : i + 1]) for i in range(6)])
    assert_same(loaded.score(queries), one_by_one)


def test_an_index_that_finds_too_little_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(indexes.EFFORTS, "ivf", (1,))
    rng = np.random.default_rng(0)
    features = Features(patches=rng.normal(size=(30, 10, 10, 64)).astype(np.float16))
    detector = MemoryBank(size=1_500, search="ivf")
    detector.fit_held_out(features, np.arange(30) % 5)
    info = detector.info()
    assert info["search"] == "exact" and info["index_recall"]["ivf"] < 0.9
    loaded = MemoryBank.from_arrays(detector.to_arrays(), detector.params())
    assert loaded.info() == info
    np.testing.assert_allclose(loaded.score(features).map, detector.score(features).map)


@pytest.mark.parametrize("by_place", [False, True])
@pytest.mark.parametrize("search", ["ivf", "hnsw", "lsh", "pq"])
def test_the_image_score_is_exact_however_little_an_index_finds(search: str, by_place: bool) -> None:
    features, queries = spread(30, 5), spread(6, 8)
    queries.patches[3] *= 2  # all of it strange
    fitted = MemoryBank(size=1_500, search="exact").fit(features)
    arrays = fitted.to_arrays()
    if by_place:  # the highest cells are then others than those of the largest distances
        rng = np.random.default_rng(9)
        arrays |= {name: rng.uniform(1, 9, (10, 10)).astype(np.float32) for name in ("centre", "spread")}
    exact = MemoryBank.from_arrays(arrays, fitted.params())
    found = memory_bank.Index(search, exact.bank_, 3, 1)
    loaded = MemoryBank.from_arrays(arrays | found.to_arrays(), exact.params())
    scores, right = loaded.score(queries), exact.score(queries)
    wrong = scores.map > right.map + 1e-3 * np.abs(right.map)
    assert wrong.any() and (scores.map >= right.map - 1e-3 * np.abs(right.map)).all()
    np.testing.assert_allclose(scores.image, right.image, rtol=1e-5)
    top = np.argsort(-scores.map.reshape(6, -1), axis=1)[:, :1]  # 1 % of 100 cells is one
    assert not np.take_along_axis(wrong.reshape(6, -1), top, axis=1).any()


@pytest.mark.parametrize(("cells", "kind"), [(0.0, "exact"), (1.0, "ivf")])
def test_auto_takes_an_index_for_a_large_bank_where_it_is_less_work(
    monkeypatch: pytest.MonkeyPatch, cells: float, kind: str
) -> None:
    monkeypatch.setattr(memory_bank, "INDEX_FROM", {"ivf": 1_000})
    monkeypatch.setattr(memory_bank, "MOST_SHARE", cells)
    detector = MemoryBank(size=1_500)
    detector.fit_held_out(spread(30, 5), np.arange(30) % 5)
    assert detector.info()["search"] == kind and detector.info()["index_recall"]["ivf"] >= 0.99
    small = MemoryBank(size=900)
    small.fit_held_out(spread(30, 5), np.arange(30) % 5)
    assert small.info()["search"] == "exact" and "index_recall" not in small.info()


def test_a_damaged_index_is_refused() -> None:
    detector = MemoryBank(size=600, search="hnsw").fit(spread(10, 5))
    arrays = detector.to_arrays()
    index = arrays["index"].copy()
    index[len(index) // 2] ^= 1
    with pytest.raises(ArtifactError, match="index of the memory bank cannot be read"):
        MemoryBank.from_arrays(arrays | {"index": index}, detector.params())


def test_attention_is_the_same_as_weighted_patches_and_is_stored() -> None:
    features, queries, folds = normals(), normals(5, seed=1), np.arange(12) % 3
    matrix = np.diag(np.linspace(0.5, 2.0, 10)).astype(np.float32)
    matrix[0, 1] = matrix[1, 0] = 0.25
    detector, plain = MemoryBank(size=80), MemoryBank(size=80)
    detector.attention_ = matrix
    held_out = detector.fit_held_out(features, folds)
    weighted = [Features(patches=one.patches.astype(np.float32) @ matrix) for one in (features, queries)]
    assert_same(held_out, plain.fit_held_out(weighted[0], folds))
    np.testing.assert_array_equal(detector.bank_, plain.bank_)
    scores = detector.score(queries)
    assert_same(scores, plain.score(weighted[1]))
    again = MemoryBank.from_arrays(detector.to_arrays(), detector.params())
    np.testing.assert_array_equal(again.score(queries).map, scores.map)
    singly = np.concatenate([again.score(queries[[i]]).map for i in range(5)])
    np.testing.assert_allclose(singly, scores.map, rtol=1e-5)


@pytest.mark.parametrize("search", ["exact", "pq"])
def test_the_map_is_measured_to_the_same_entries_in_a_metric_of_its_own(search: str) -> None:
    features, folds, queries = spread(30, 5), np.arange(30) % 5, spread(6, 8)
    d = features.patches.shape[-1]
    fine = np.diag(np.linspace(0.2, 3, d)).astype(np.float32)
    plain, detector = MemoryBank(size=1_500, search="exact"), MemoryBank(size=1_500, search=search)
    detector.fine_ = fine
    before, held_out = plain.fit_held_out(features, folds), detector.fit_held_out(features, folds)
    np.testing.assert_allclose(held_out.image, before.image, rtol=1e-4)  # pictures are scored as they are without
    scores = detector.score(queries)
    np.testing.assert_allclose(scores.image, plain.score(queries).image, rtol=1e-3)
    # By brute force: the nearest entries in the plain metric, measured in the other.
    rows = queries.patches.reshape(-1, d).astype(np.float64)
    bank = detector.bank_.astype(np.float64)
    _, nearest = NearestNeighbors(n_neighbors=3, algorithm="brute").fit(bank).kneighbors(rows)
    expected = np.linalg.norm((rows[:, np.newaxis] - bank[nearest]) @ fine, axis=2).mean(axis=1)
    assert detector.fine_position_ is not None and detector.position_ is not None
    found = scores.map * detector.fine_position_.spread + detector.fine_position_.centre
    close = np.isclose(found.ravel(), expected, rtol=1e-3)
    assert close.mean() > (0.99 if search == "exact" else 0.8)
    loaded = MemoryBank.from_arrays({k: v.copy() for k, v in detector.to_arrays().items()}, detector.params())
    np.testing.assert_array_equal(loaded.score(queries).map, scores.map)
    assert_same(scores, Scores.concatenate([loaded.score(queries[i : i + 1]) for i in range(6)]))


def test_an_opened_bank_has_nothing_left_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = MemoryBank(size=2_000, k=3, search="pq")
    bank.fine_ = np.eye(32, dtype=np.float32)
    bank.fit(spread(20, 0))
    opened = MemoryBank.from_arrays(bank.to_arrays(), bank.params())
    opened.open()
    expected = bank.score(spread(2, 1))
    for part in ("Search", "Metric"):
        monkeypatch.setattr(memory_bank, part, lambda *_, **__: pytest.fail("compiled for a picture"))
    assert_same(opened.score(spread(2, 1)), expected)
