"""Principal components of patch features, fitted in one stream and applied as one matrix product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ood_runners.errors import DataError

_ROWS = 16_384
# Eigenvalues below this share of the largest are rounding of the float32 products, not variance.
_NOISE = 1e-6


@dataclass(frozen=True)
class Projection:
    """``(x - mean) @ matrix``: mean float32 (c,), matrix float32 (c, d)."""

    mean: NDArray[np.float32]
    matrix: NDArray[np.float32]

    def apply(self, patches: NDArray[Any]) -> NDArray[np.float32]:
        """Project (..., c) of any float type to float32 (..., d)."""
        projected: NDArray[np.float32] = np.matmul(patches.astype(np.float32) - self.mean, self.matrix)
        return projected

    @property
    def bias(self) -> NDArray[np.float32]:
        """float32 (d,) such that ``x @ matrix + bias`` is the projection."""
        return (-(self.mean.astype(np.float64) @ self.matrix.astype(np.float64))).astype(np.float32)

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """The state: ``mean`` and ``matrix``."""
        return {"mean": self.mean, "matrix": self.matrix}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Projection:
        """The inverse of `to_arrays`."""
        return cls(np.asarray(arrays["mean"], np.float32), np.asarray(arrays["matrix"], np.float32))


class ProjectionFitter:
    """PCA of a stream of patches; memory is c x c, however many patches come.

    Products run in float32 on chunks, around the first chunk's mean so that little cancels, and are summed in
    float64.
    """

    def __init__(self) -> None:
        self._n = 0
        self._shift = np.zeros(0, np.float32)
        self._sum = np.zeros(0)
        self._second = np.zeros((0, 0))

    def partial_fit(self, patches: NDArray[Any]) -> ProjectionFitter:
        """Take in float (n, h, w, c), or any (..., c)."""
        channels = patches.shape[-1]
        rows = patches.reshape(-1, channels)
        for start in range(0, len(rows), _ROWS):
            chunk = rows[start : start + _ROWS].astype(np.float32)
            if self._n == 0:
                self._shift = chunk.mean(axis=0)
                self._sum, self._second = np.zeros(channels), np.zeros((channels, channels))
            chunk -= self._shift
            self._sum += chunk.sum(axis=0, dtype=np.float64)
            self._second += chunk.T @ chunk
            self._n += len(chunk)
        return self

    def finish(self, dim: int = 128, power: float = -0.25) -> Projection:
        """The first `dim` principal components (fewer where the data have fewer), each scaled by variance**power.

        power -0.5 whitens, 0 is plain PCA; -0.25 lies between: rare directions count for more than their variance,
        without drowning the others in noise. Signs are fixed by each component's largest coefficient being
        positive, so that the same patches give the same projection.
        """
        if self._n < 2:
            raise DataError("There are too few patches to fit a projection; give more pictures.")
        offset = self._sum / self._n
        covariance = (self._second - self._n * np.outer(offset, offset)) / (self._n - 1)
        variances, vectors = np.linalg.eigh(covariance)
        variances, vectors = variances[::-1], vectors[:, ::-1]
        rank = int(np.sum(variances > max(_NOISE * variances[0], np.finfo(np.float32).tiny)))
        if rank == 0:
            raise DataError("All patches of all pictures are the same; check that the pictures show anything.")
        dim = min(dim, rank, self._n - 1)
        variances, vectors = variances[:dim], vectors[:, :dim]
        signs = np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(dim)])
        matrix = vectors * signs * variances**power
        return Projection((self._shift + offset).astype(np.float32), np.ascontiguousarray(matrix, np.float32))
