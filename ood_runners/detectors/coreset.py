"""Greedy k-centre coresets: few points such that none of the others is far from all of them.

References
----------
Sener and Savarese, "Active Learning for Convolutional Neural Networks: A Core-Set Approach", ICLR 2018.
Roth et al., "Towards Total Recall in Industrial Anomaly Detection" (PatchCore), CVPR 2022.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ood_runners.detectors.checks import finite_float32

MAX_PATCHES = 300_000  # in memory at a time: about 160 MB at 128 dimensions
PROJECTION_DIM = 64
CHUNK_ROWS = 4096  # 1 MB of 64-d points and 4 MB of distances to 256 centres: stays in the cache
RELATIVE_ZERO = 1e-6  # squared distances below this share of the largest squared norm are float32 noise


def coreset_of_pictures(
    patches: NDArray[Any],
    rows: NDArray[np.int64],
    size: int,
    seed: int,
    weighted: Callable[[NDArray[Any]], NDArray[Any]],
    progress: Callable[[int], None] | None,
) -> tuple[NDArray[np.float16], NDArray[np.int32]]:
    """Coreset of some pictures' patches: float16 (m, d) and their origin int32 (m, 2), picture and cell.

    `patches` are float16 or float32 (n, h, w, d) and may be memory-mapped, `rows` int64 are the pictures', and
    `weighted` is applied to their patches first. With more than `MAX_PATCHES` patches, coresets of runs of pictures are
    merged and reduced to one again; greedy k-centre composes (Malkomes et al., "Fast Distributed k-Center Clustering
    with Outliers", 2015).
    """
    cells, d = patches.shape[1] * patches.shape[2], patches.shape[3]
    run = max(1, MAX_PATCHES // cells)
    runs = -(-len(rows) // run)
    entries: NDArray[np.float16] = np.empty((0, d), np.float16)
    origin: NDArray[np.int32] = np.empty((0, 2), np.int32)
    for i in range(runs):
        pictures = rows[i * run : (i + 1) * run]
        points = _to_float16(weighted(patches[pictures])).reshape(-1, d)
        report = None if progress is None else lambda count, i=i: progress((i * size + count) // runs)
        chosen = greedy_coreset(points, size, seed=seed, progress=report)
        entries = np.concatenate([entries, points[chosen]])
        origin = np.concatenate(
            [origin, np.stack([pictures[chosen // cells], chosen % cells], axis=1).astype(np.int32)]
        )
        last = i == runs - 1
        if len(entries) > size and (last or len(entries) > MAX_PATCHES):
            kept = greedy_coreset(entries, size, seed=seed)
            entries, origin = entries[kept], origin[kept]
    return entries, origin


def _to_float16(array: NDArray[Any]) -> NDArray[np.float16]:
    """Rounded to the bank's stored type; values beyond its range become infinite and are refused later."""
    with np.errstate(over="ignore"):
        return np.asarray(array, dtype=np.float16)


def greedy_coreset(
    points: NDArray[Any],
    size: int,
    *,
    seed: int = 0,
    projection_dim: int | None = PROJECTION_DIM,
    block: int = 256,
    progress: Callable[[int], None] | None = None,
) -> NDArray[np.int64]:
    """Indices of a greedy k-centre (farthest point) coreset, in the order chosen.

    The first point is drawn with `seed`; each next one is the point farthest from all chosen so far.
    Points that coincide with a chosen one are never taken, so fewer than `size` indices can come back.

    The order is the exact greedy one, reached in blocks: the `block` farthest points are picked from among
    themselves as long as the best of them is at least as far as the farthest point outside. Distances
    only fall, so no outsider can have been next. All distances are then updated by one matrix product.

    Parameters
    ----------
    points : (n, d), any real dtype; may be a memory map, which is read once in chunks
    size : at most so many indices
    projection_dim : distances are taken on a random (Johnson-Lindenstrauss) projection to so many
        dimensions when d is larger; None takes them on the points themselves
    block : candidates in a round
    progress : called with the number of points chosen so far

    Returns
    -------
    int64 (m,), m <= size. Memory beyond `points`: about 4 n (min(d, projection_dim) + 2) bytes.

    Raises
    ------
    DataError
        When a point holds a NaN or an infinity.
    """
    n = len(points)
    size = min(size, n)
    if size <= 0:
        return np.empty(0, np.int64)
    rng = np.random.default_rng(seed)
    first = int(rng.integers(n))
    projected = _project(points, projection_dim, rng)
    norms = np.einsum("ij,ij->i", projected, projected)
    zero = RELATIVE_ZERO * float(norms.max())
    # Squared distance to the nearest chosen point; -1 marks the chosen.
    distances = np.full(n, np.inf, np.float32)
    chosen = np.empty(size, np.int64)
    chosen[0], count = first, 1
    _update(distances, projected, norms, chosen[:1], zero)
    while count < size:
        candidates, outside = _farthest(distances, block)
        picks = _greedy_inside(projected[candidates], distances[candidates], outside, size - count, zero)
        if not len(picks):
            break  # every point coincides with a chosen one
        new = candidates[picks]
        chosen[count : count + len(new)] = new
        count += len(new)
        _update(distances, projected, norms, new, zero)
        if progress is not None:
            progress(count)
    return chosen[:count]


def _project(points: NDArray[Any], dim: int | None, rng: np.random.Generator) -> NDArray[np.float32]:
    """Centred float32 copy (n, min(d, dim)); centring keeps the expanded distances exact near zero."""
    n, d = points.shape
    matrix = None
    if dim is not None and d > dim:
        matrix = (rng.standard_normal((d, dim)) / np.sqrt(dim)).astype(np.float32)
    projected = np.empty((n, d if matrix is None else matrix.shape[1]), np.float32)
    for start in range(0, n, CHUNK_ROWS):
        rows = finite_float32(points[start : start + CHUNK_ROWS], "points of the coreset")
        projected[start : start + CHUNK_ROWS] = rows if matrix is None else rows @ matrix
    projected -= projected.mean(axis=0, dtype=np.float64).astype(np.float32)
    return projected


def _farthest(distances: NDArray[np.float32], block: int) -> tuple[NDArray[np.int64], float]:
    """Indices of the `block` largest distances, and the largest among the rest (-1 when there is no rest)."""
    n = len(distances)
    if n <= block:
        return np.arange(n), -1.0
    order = np.argpartition(distances, n - block - 1)
    return order[n - block :], float(distances[order[n - block - 1]])


def _greedy_inside(
    points: NDArray[np.float32], distances: NDArray[np.float32], outside: float, limit: int, zero: float
) -> list[int]:
    """Greedy picks among a block, in order, while none outside of it can be farther."""
    norms = np.einsum("ij,ij->i", points, points)
    between = norms[:, None] + norms[None, :] - 2 * (points @ points.T)
    between[between <= zero] = 0
    distances = distances.copy()
    picks: list[int] = []
    while len(picks) < limit:
        best = int(distances.argmax())
        if distances[best] <= 0 or distances[best] < outside:
            break
        picks.append(best)
        np.minimum(distances, between[best], out=distances)
        distances[best] = -1
    return picks


def _update(
    distances: NDArray[np.float32],
    points: NDArray[np.float32],
    norms: NDArray[np.float32],
    centres: NDArray[np.int64],
    zero: float,
) -> None:
    """Lower every point's distance to its nearest chosen point by the new centres, in place."""
    offsets = norms[centres][:, None]
    doubled = -2 * points[centres]
    for start in range(0, len(points), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        products = doubled @ points[rows].T
        products += offsets
        nearest = products.min(axis=0)
        nearest += norms[rows]
        nearest[nearest <= zero] = 0
        np.minimum(distances[rows], nearest, out=distances[rows])
    distances[centres] = -1
