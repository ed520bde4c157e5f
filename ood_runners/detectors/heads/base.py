"""The contract of an out-of-distribution head, and the linear layer that it reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from ood_runners.errors import ArtifactError, DataError


@dataclass(frozen=True)
class Activations:
    """What a classifier saw in n pictures.

    Attributes
    ----------
    logits : float32 (n, k)
    pooled : float32 (n, d), the features that its final layer reads; None where nobody needs them
    """

    logits: NDArray[np.float32]
    pooled: NDArray[np.float32] | None = None

    def features(self) -> NDArray[np.float32]:
        """`pooled`; DataError where it is absent."""
        if self.pooled is None:
            raise DataError("This out-of-distribution head needs the pooled features of the network's last layer.")
        return self.pooled

    def __getitem__(self, rows: slice | NDArray[Any]) -> Activations:
        """The chosen pictures."""
        return Activations(self.logits[rows], None if self.pooled is None else self.pooled[rows])


@dataclass(frozen=True)
class Linear:
    """A classifier's final layer: ``logits = features @ weight.T + bias``.

    Attributes
    ----------
    weight : float32 (k, d)
    bias : float32 (k,)
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]

    def __call__(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits float32 (n, k) of features (n, d)."""
        return np.asarray(features @ self.weight.T + self.bias, np.float32)

    @cached_property
    def origin(self) -> NDArray[np.float64]:
        """The shortest features float64 (d,) whose logits come nearest to 0: ``-pinv(weight) @ bias``."""
        weight = self.weight.astype(np.float64)
        return -np.asarray(np.linalg.lstsq(weight, self.bias.astype(np.float64), rcond=None)[0])


class Head(ABC):
    """One way to read strangeness from a classifier; a frozen dataclass whose fields are its fitted arrays."""

    name: ClassVar[str]
    needs_features: ClassVar[bool] = False
    needs_linear: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def fit(cls, seen: Activations, linear: Linear | None, labels: NDArray[np.int64]) -> Self:
        """Learn from n normal pictures.

        `linear` is there where `needs_linear`; `labels` int64 (n,) are their classes, or the predicted ones.
        """

    @abstractmethod
    def score(self, seen: Activations) -> NDArray[np.float32]:
        """Float32 (n,); larger is stranger."""

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """The fitted arrays."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """The inverse of `to_arrays`; ArtifactError where an array is absent."""
        try:
            return cls(**arrays)
        except TypeError as error:
            raise ArtifactError(f"The stored head {cls.name} does not hold what it needs ({error}).") from error
