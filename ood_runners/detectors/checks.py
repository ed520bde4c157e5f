"""Checks that the detectors share."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ood_runners.errors import DataError
from ood_runners.features import Features


def finite_float32(array: NDArray[Any], what: str) -> NDArray[np.float32]:
    """The array as float32 (16-bit inputs are upcast); DataError when it holds a NaN or an infinity."""
    values = np.asarray(array, dtype=np.float32)
    # A sum is finite only if every term is, and costs no temporary; it may overflow, so look closely only then.
    with np.errstate(over="ignore", invalid="ignore"):
        suspicious = not np.isfinite(values.sum())
    if suspicious and not np.isfinite(values).all():
        raise DataError(
            f"The {what} hold a NaN or an infinity; check the backbone's weights and that its values fit 16 bits."
        )
    return values


def pooled_features(features: Features, layer: str, channels: int | None = None) -> NDArray[np.float32]:
    """The layer's pooled features float32 (n, channels); DataError when absent, not finite or of another width."""
    if layer not in features.pooled:
        there = ", ".join(features.pooled) or "none"
        raise DataError(f"There are no pooled features of {layer!r}; there are: {there}.")
    x = finite_float32(features.pooled[layer], f"pooled features of {layer}")
    if channels is not None and x.shape[1] != channels:
        raise DataError(
            f"The pooled features of {layer!r} have {x.shape[1]} channels and the detector was fitted on {channels}."
        )
    return x
