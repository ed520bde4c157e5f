"""Nearest neighbours as matrix products.

With |q - b|^2 = |q|^2 - 2 (q.b - |b|^2 / 2) the nearest entries are those of the highest q.b - |b|^2 / 2: one matrix
product, which OpenVINO runs at the processor's limit, and a selection. The highest k of many values are taken in two
steps: each of them is the highest of its group or shares the group with a higher one, so they lie within the k groups
of highest maxima. The maxima are one pass over the products; sorting sees a few hundred values a patch.

For a large bank the product runs in int8, in half the time, and gives a few more candidates than are asked for; their
distances are then taken in float32. What that misses is measured when a bank is fitted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ood_runners.inference import CPUNetwork

GROUP = 32  # entries whose maximum is taken together; the fastest of 16, 32 and 64 for 10,000 entries
ROWS = 128  # queries in one product: 5 MB of products with 10,000 entries, for each thread
MEASURED = 392  # queries whose distances are measured together: half of a picture of 224 pixels
FAR = np.float32(1e30)  # subtracted from products that must not be found
CANDIDATES = 3  # more than k that int8 finds
# Queries beyond the bank's own values by more than this are clipped: they are strange, whoever is nearest.
HEADROOM = 1.25
# Of an entry in int8. Processors without VNNI add two products in 16 bits, which those of eight-bit factors overflow.
MOST_WHOLE = 63


class Search:
    """The k nearest entries of a bank, by Euclidean distance.

    Parameters
    ----------
    bank : float16 or float32 (m, d), m >= 1
    k : neighbours; clipped to m
    rounded : whether candidates are found in int8; otherwise the search is exact
    without : bool (m,), entries that are passed over; at least k must be left
    threads : CPU threads; all cores if None
    """

    def __init__(
        self,
        bank: NDArray[Any],
        k: int,
        *,
        rounded: bool = False,
        without: NDArray[np.bool_] | None = None,
        threads: int | None = None,
    ) -> None:
        entries = np.asarray(bank, np.float32)
        self.size, self.d = entries.shape
        self.k = min(k, self.size)
        wanted = min(self.k + CANDIDATES, self.size) if rounded else self.k
        group = max(1, min(GROUP, self.size // wanted))
        columns = -(-self.size // group)
        padded = np.zeros((group * columns, self.d), np.float32)
        padded[: self.size] = entries
        half = np.full((1, len(padded)), FAR, np.float32)
        half[0, : self.size] = 0.5 * np.einsum("ij,ij->i", entries, entries)
        if without is not None:
            half[0, : self.size][without] = FAR
        model = _graph(padded, half, group, self.k, wanted, rounded)
        self._network = CPUNetwork(lambda: model, piece=ROWS, threads=threads)

    def search(self, queries: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Squared distances float32 (n, k), nearest first, and indices int64 (n, k) of the entries.

        `queries` are float32 (n, d). Distances are exact to about 1e-6 of the squared length of the query.
        """
        queries = np.asarray(queries, np.float32)
        highest, found = self._network(queries)
        squared = np.einsum("ij,ij->i", queries, queries)[:, np.newaxis] - 2 * highest
        return np.maximum(squared, 0, out=squared), found.astype(np.int64)


class Metric:
    """Distances to given entries of a bank in another metric: patches and entries are multiplied by a matrix first.

    Compiled like the products: NumPy's threads would go on spinning while the next network runs.

    Parameters
    ----------
    bank : float16 or float32 (m, d)
    matrix : float32 (d, e)
    threads : CPU threads; all cores if None
    """

    def __init__(self, bank: NDArray[Any], matrix: NDArray[np.float32], threads: int | None = None) -> None:
        import openvino as ov
        from openvino import opset13 as ops

        moved = (np.asarray(bank, np.float32) @ matrix).astype(np.float16)
        queries, entries = ops.parameter([-1, matrix.shape[0]], ov.Type.f32), ops.parameter([-1, -1], ov.Type.i64)
        near = ops.convert(ops.gather(ops.constant(moved), entries, np.array(0)), "f32")
        apart = ops.subtract(near, ops.unsqueeze(ops.matmul(queries, ops.constant(matrix), False, False), np.array(1)))
        distances = ops.reduce_l2(apart, np.array([2]))
        model = ov.Model([_output(ops.reduce_mean(distances, np.array([1])))], [queries, entries], "metric")
        self._network = CPUNetwork(lambda: model, piece=MEASURED, threads=threads)

    def measure(self, queries: NDArray[np.float32], entries: NDArray[np.int64]) -> NDArray[np.float32]:
        """Mean distance float32 (n,) of each of the queries, float32 (n, d), to its entries, indices int64 (n, k)."""
        return self._network(np.asarray(queries, np.float32), np.asarray(entries, np.int64))[0]


def recall(
    bank: NDArray[Any],
    queries: NDArray[np.float32],
    k: int,
    without: NDArray[np.bool_] | None = None,
    threads: int | None = None,
) -> float:
    """The share of queries whose nearest entry the rounded search finds (recall@1), ties counted as found."""
    exact, rounded = (
        Search(bank, k, rounded=one, without=without, threads=threads).search(queries)[0] for one in (False, True)
    )
    return float(np.mean(rounded[:, 0] <= exact[:, 0] * (1 + 1e-4) + 1e-6))


def _graph(bank: NDArray[np.float32], half: NDArray[np.float32], group: int, k: int, wanted: int, rounded: bool) -> Any:
    """Queries (n, d) to the k highest products less `half`, float32 (n, k), and their entries, int32 (n, k)."""
    import openvino as ov
    from openvino import opset13 as ops

    queries = ops.parameter([-1, bank.shape[1]], ov.Type.f32)
    products = ops.matmul(_rounded_queries(queries, bank), _rounded_bank(bank), False, True) if rounded else None
    if products is None:
        products = ops.matmul(queries, ops.constant(bank), False, True)
    grouped = ops.reshape(ops.add(products, ops.constant(-half)), np.array([0, group, -1]), True)
    columns = ops.topk(ops.reduce_max(grouped, np.array([1])), wanted, 1, "max", "none").output(1)
    candidates = ops.reshape(ops.gather(grouped, columns, np.array(2), 1), np.array([0, -1]), True)
    best = ops.topk(candidates, wanted, 1, "max", "value")
    # Candidates lie as (group, wanted): the quotient is the row of the group, the rest which of the columns.
    row = ops.divide(best.output(1), np.int32(wanted))
    nth = ops.subtract(best.output(1), ops.multiply(row, np.int32(wanted)))
    column = ops.gather_elements(columns, nth, 1)
    entries = ops.add(ops.multiply(row, np.int32(len(bank) // group)), column)
    values = best.output(0)
    if rounded:
        near = ops.convert(ops.gather(ops.constant(bank.astype(np.float16)), entries, np.array(0)), "f32")
        exact = ops.squeeze(ops.matmul(near, ops.unsqueeze(queries, np.array(2)), False, False), np.array(2))
        halves = ops.gather(ops.constant(half[0]), entries, np.array(0))
        measured = ops.topk(ops.subtract(exact, halves), k, 1, "max", "value")
        values, entries = measured.output(0), ops.gather_elements(entries, measured.output(1), 1)
    return ov.Model([_output(values), _output(entries)], [queries], "nearest")


def _rounded_queries(queries: Any, bank: NDArray[np.float32]) -> Any:
    from openvino import opset13 as ops

    most = np.float32(HEADROOM * max(float(np.abs(bank).max()), 1e-6))
    least = np.float32(-most * 128 / 127)
    return ops.fake_quantize(queries, least, most, least, most, 256)


def _rounded_bank(bank: NDArray[np.float32]) -> Any:
    """The entries as int8 with a scale each, which OpenVINO multiplies as such."""
    from openvino import opset13 as ops

    scale = np.maximum(np.abs(bank).max(axis=1, keepdims=True), 1e-9) / MOST_WHOLE
    whole = np.clip(np.rint(bank / scale), -MOST_WHOLE, MOST_WHOLE).astype(np.int8)
    return ops.multiply(ops.convert(ops.constant(whole), "f32"), ops.constant(scale.astype(np.float32)))


def _output(node: Any) -> Any:
    return node if not hasattr(node, "output") else node.output(0)
