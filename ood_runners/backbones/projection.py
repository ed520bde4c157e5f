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
    """``(x - mean) @ matrix``: mean float32 (c,), matrix float32 (c, d).

    What it gives, multiplied by `fine`, float32 (d, d), is close to the projection of the same patches with some
    channels enlarged (see `ProjectionFitter.finish`); None where none were.
    """

    mean: NDArray[np.float32]
    matrix: NDArray[np.float32]
    fine: NDArray[np.float32] | None = None

    def apply(self, patches: NDArray[Any]) -> NDArray[np.float32]:
        """Project (..., c) of any float type to float32 (..., d)."""
        projected: NDArray[np.float32] = np.matmul(patches.astype(np.float32) - self.mean, self.matrix)
        return projected

    @property
    def bias(self) -> NDArray[np.float32]:
        """float32 (d,) such that ``x @ matrix + bias`` is the projection."""
        return (-(self.mean.astype(np.float64) @ self.matrix.astype(np.float64))).astype(np.float32)

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """The state: ``mean``, ``matrix`` and, where there is one, ``fine``."""
        return {"mean": self.mean, "matrix": self.matrix} | ({} if self.fine is None else {"fine": self.fine})

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Projection:
        """The inverse of `to_arrays`."""
        fine = None if "fine" not in arrays else np.asarray(arrays["fine"], np.float32)
        return cls(np.asarray(arrays["mean"], np.float32), np.asarray(arrays["matrix"], np.float32), fine)


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

    def finish(self, dim: int = 128, power: float = -0.25, enlarged: NDArray[np.floating] | None = None) -> Projection:
        """The first `dim` principal components (fewer where the data have fewer), each scaled by variance**power.

        power -0.5 whitens, 0 is plain PCA; -0.25 lies between: rare directions count for more than their variance,
        without drowning the others in noise. Signs are fixed by each component's largest coefficient being
        positive, so that the same patches give the same projection.

        With `enlarged`, a factor for each channel (c,), the projection has a matrix `fine`: the least-squares map from
        its components to those of patches whose channels are multiplied by these factors.
        """
        if self._n < 2:
            raise DataError("There are too few patches to fit a projection; give more pictures.")
        offset = self._sum / self._n
        covariance = (self._second - self._n * np.outer(offset, offset)) / (self._n - 1)
        dim = min(dim, self._n - 1)
        matrix = _components(covariance, dim, power)
        fine = None
        if enlarged is not None:
            other = _components(covariance * np.outer(enlarged, enlarged), dim, power) * enlarged[:, np.newaxis]
            crossed = matrix.T @ covariance
            fine = np.asarray(np.linalg.solve(crossed @ matrix, crossed @ other), np.float32)
        mean = (self._shift + offset).astype(np.float32)
        return Projection(mean, np.ascontiguousarray(matrix, np.float32), fine)


def _components(covariance: NDArray[np.float64], dim: int, power: float) -> NDArray[np.float64]:
    """The first `dim` principal components, or as many as there are, each by variance**power: float64 (c, d)."""
    from scipy.linalg import eigh

    largest = (max(0, len(covariance) - dim), len(covariance) - 1)
    variances, vectors = eigh(covariance, subset_by_index=largest)  # in a third of the time that all of them take
    variances, vectors = variances[::-1], vectors[:, ::-1]
    rank = int(np.sum(variances > max(_NOISE * variances[0], np.finfo(np.float32).tiny)))
    if rank == 0:
        raise DataError("All patches of all pictures are the same; check that the pictures show anything.")
    dim = min(dim, rank)
    variances, vectors = variances[:dim], vectors[:, :dim]
    signs = np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(dim)])
    return np.asarray(vectors * signs * variances**power, np.float64)
