"""What the backbone hands to the detectors, and what they hand back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating[Any]]
POOLED_PREFIX = "pooled."
LOAD = "load"  # in a runner's item: see `engines.Engine`
AT = "@"  # joins a detector and the member of a version that it belongs to


def scorer(detector: str, member: str = "") -> str:
    """What a detector's score is called: ``memory_bank``, and ``memory_bank@resnet50-224`` where it is a member's."""
    return f"{detector}{AT}{member}" if member else detector


def detector_of(scorer: str) -> str:
    """The detector that a score is from."""
    return scorer.partition(AT)[0]


@dataclass(frozen=True)
class Features:
    """Features of n pictures; every array has n as its first axis, and any of them may be absent.

    Attributes
    ----------
    patches : float16 or float32 (n, h, w, d)
        Patch features on the grid of the finest tapped layer (raw, or projected once a projection is fitted).
    pooled : mapping of layer name to float32 (n, c)
        Global averages of the tapped layers.
    logits : float32 (n, k)
        The classification head's output, where the weights have one.
    pictures : uint8 (n, height, width, 3)
        The pictures themselves at the product's input size, for detectors that look at pixels.
    """

    patches: FloatArray | None = None
    pooled: Mapping[str, FloatArray] = field(default_factory=dict)
    logits: FloatArray | None = None
    pictures: NDArray[np.uint8] | None = None

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        named = {"patches": self.patches, "logits": self.logits, "pictures": self.pictures}
        arrays = {name: array for name, array in named.items() if array is not None}
        return arrays | {POOLED_PREFIX + layer: array for layer, array in self.pooled.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Features:
        pooled = {k.removeprefix(POOLED_PREFIX): v for k, v in arrays.items() if k.startswith(POOLED_PREFIX)}
        return cls(arrays.get("patches"), pooled, arrays.get("logits"), arrays.get("pictures"))

    @property
    def whole(self) -> Features:
        """Without patches and pixels: what describes whole pictures, some kilobytes each.

        Of a large folder's patches and pixels a copy does not fit into memory.
        """
        return Features(pooled=self.pooled, logits=self.logits)

    def __len__(self) -> int:
        return next((len(array) for array in self.to_arrays().values()), 0)

    def __getitem__(self, rows: slice | NDArray[Any] | Sequence[int]) -> Features:
        """The chosen pictures, as Features (a slice, a boolean mask or a list of indices)."""
        return self.from_arrays({name: array[rows] for name, array in self.to_arrays().items()})

    @classmethod
    def concatenate(cls, parts: Iterable[Features]) -> Features:
        """One Features of all the parts' pictures, in order; the parts hold the same arrays."""
        rows = [part.to_arrays() for part in parts]
        if not rows:
            return cls()
        return cls.from_arrays({name: np.concatenate([row[name] for row in rows]) for name in rows[0]})

    def chunks(self, size: int) -> Iterator[Features]:
        """The pictures in runs of `size`; arrays may be memory-mapped, so read large ones this way."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def to_items(self) -> list[dict[str, NDArray[Any]]]:
        """One flat dict a picture (keys ``patches``, ``logits``, ``pictures``, ``pooled.<layer>``), for the wire."""
        arrays = self.to_arrays()
        return [{name: array[i] for name, array in arrays.items()} for i in range(len(self))]

    @classmethod
    def from_items(cls, items: Sequence[Mapping[str, NDArray[Any]]]) -> Features:
        """The inverse of `to_items`; keys that are not features are ignored."""
        if not items:
            return cls()
        names = [k for k in items[0] if k in ("patches", "logits", "pictures") or k.startswith(POOLED_PREFIX)]
        return cls.from_arrays({name: np.stack([item[name] for item in items]) for name in names})


@dataclass(frozen=True)
class Scores:
    """A detector's raw scores; they grow with strangeness.

    Attributes
    ----------
    image : float32 (n,)
    map : float32 (n, h, w), where the detector localises, on its own grid
    predicted : int64 (n,), where the detector names a class: index into its ``classes_``
    """

    image: NDArray[np.float32]
    map: NDArray[np.float32] | None = None
    predicted: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, rows: slice | NDArray[Any] | Sequence[int]) -> Scores:
        """The chosen pictures' scores."""

        def pick(array: Any) -> Any:
            return None if array is None else array[rows]

        return Scores(pick(self.image), pick(self.map), pick(self.predicted))

    @classmethod
    def concatenate(cls, parts: Sequence[Scores]) -> Scores:
        """The scores of all parts' pictures, in order."""

        def join(arrays: list[Any]) -> Any:
            return None if any(a is None for a in arrays) else np.concatenate(arrays)

        return cls(join([p.image for p in parts]), join([p.map for p in parts]), join([p.predicted for p in parts]))
