"""Exact nearest neighbours as one matrix product.

With |q - b|^2 = |q|^2 - 2 (q.b - |b|^2 / 2) the nearest entries are those of the highest q.b - |b|^2 / 2: one matrix
product, which OpenVINO runs at the processor's limit, and a selection. The highest k of many values are taken in two
steps: each of them is the highest of its group or shares the group with a higher one, so they lie within the k groups
of highest maxima. The maxima are one pass over the products; sorting sees a few hundred values a patch.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ood_runners.inference import compile_for_cpu

GROUP = 32  # entries whose maximum is taken together; the fastest of 16, 32 and 64 for 10,000 entries
ROWS = 1024  # queries in one product: 41 MB of products with 10,000 entries
FAR = np.float32(1e30)  # subtracted from products that must not be found


class ExactSearch:
    """The k nearest entries of a bank, by Euclidean distance.

    Parameters
    ----------
    bank : float16 or float32 (m, d), m >= 1
    k : neighbours; clipped to m
    threads : CPU threads; all cores if None
    """

    def __init__(self, bank: NDArray[Any], k: int, threads: int | None = None) -> None:
        entries = np.asarray(bank, np.float32)
        self.size, self.d = entries.shape
        self.k = min(k, self.size)
        group = max(1, min(GROUP, self.size // self.k))
        self._columns = -(-self.size // group)
        padded = np.zeros((group * self._columns, self.d), np.float32)
        padded[: self.size] = entries
        self._half = np.full((1, len(padded)), FAR, np.float32)
        self._half[0, : self.size] = 0.5 * np.einsum("ij,ij->i", entries, entries)
        self._request = _compile(padded, group, self.k, threads).create_infer_request()
        self._lock = threading.Lock()

    def search(
        self, queries: NDArray[np.float32], without: NDArray[np.bool_] | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Squared distances float32 (n, k), nearest first, and indices int64 (n, k) of the entries.

        `queries` are float32 (n, d). `without`, bool (m,), marks entries that are passed over; at least k must be
        left. Distances are exact to about 1e-6 of the squared length of the query.
        """
        half = self._half
        if without is not None:
            half = half.copy()
            half[0, : self.size][without] = FAR
        squared = np.empty((len(queries), self.k), np.float32)
        found = np.empty((len(queries), self.k), np.int64)
        for start in range(0, len(queries), ROWS):
            part = np.ascontiguousarray(queries[start : start + ROWS], dtype=np.float32)
            end = start + len(part)
            with self._lock:
                results = self._request.infer([part, half], share_inputs=True)
                products, inside, column = (np.array(results[i]) for i in range(3))
            np.subtract(np.einsum("ij,ij->i", part, part)[:, None], 2 * products, out=squared[start:end])
            row, nth = np.divmod(inside.astype(np.int64), self.k)
            found[start:end] = row * self._columns + np.take_along_axis(column, nth, axis=1)
        return np.maximum(squared, 0, out=squared), found


def _compile(bank: NDArray[np.float32], group: int, k: int, threads: int | None) -> Any:
    """Queries (n, d) and halves (1, m) to the k highest products, where in their groups' rows, and their columns."""
    import openvino as ov
    from openvino import opset13 as ops

    queries = ops.parameter([-1, bank.shape[1]], ov.Type.f32)
    half = ops.parameter([1, len(bank)], ov.Type.f32)
    products = ops.subtract(ops.matmul(queries, ops.constant(bank), False, True), half)
    grouped = ops.reshape(products, np.array([0, group, -1]), True)
    columns = ops.topk(ops.reduce_max(grouped, np.array([1])), k, 1, "max", "none").output(1)
    candidates = ops.reshape(ops.gather(grouped, columns, np.array(2), 1), np.array([0, -1]), True)
    best = ops.topk(candidates, k, 1, "max", "value")
    model = ov.Model([best.output(0), best.output(1), columns], [queries, half], "nearest")
    return compile_for_cpu(model, threads)
