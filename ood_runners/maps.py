"""Anomaly maps: to the picture's size, to regions, to a picture that a person can read.

A *calibrated map* is float32 (H, W) on a scale where 0 is typical of normal pictures and 1 is the level
that the highest pixel of a normal picture exceeds with probability alpha.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

FloatMap = NDArray[np.float32]

REFERENCE_SIZE = 224
MAX_REGIONS = 20
MIN_AREA_FRACTION = 1 / 5_000  # of the picture: ten pixels of 224 x 224

# The overlay's fixed scale, as (calibrated value, RGB): cold up to the threshold, warm from it on.
SCALE: Sequence[tuple[float, tuple[int, int, int]]] = (
    (0.0, (18, 32, 140)),
    (0.4, (20, 88, 200)),
    (0.7, (16, 160, 200)),
    (0.9, (60, 200, 120)),
    (1.0, (250, 225, 40)),
    (1.4, (250, 140, 20)),
    (2.0, (215, 20, 20)),
)


@dataclass(frozen=True)
class Region:
    """A connected part of a picture that is stranger than the threshold.

    Attributes
    ----------
    box : tuple of int
        Left, top, right, bottom in pixels; right and bottom are exclusive.
    peak : float
        The highest calibrated value inside.
    area : int
        Pixels above the threshold.
    """

    box: tuple[int, int, int, int]
    peak: float
    area: int


def upscale(maps: NDArray[np.floating[Any]], size: tuple[int, int]) -> FloatMap:
    """Maps (n, h, w) at `size` (H, W), bilinear: float32 (n, H, W)."""
    height, width = size
    out = np.empty((len(maps), height, width), np.float32)
    for i, one in enumerate(maps):
        small = np.ascontiguousarray(one, np.float32)
        cv2.resize(small, (width, height), out[i], interpolation=cv2.INTER_LINEAR)
    return out


def smooth(maps: FloatMap, sigma: float) -> FloatMap:
    """Maps (n, H, W) smoothed by a Gaussian: float32 (n, H, W).

    `sigma` is in pixels of a map whose shorter side is 224 and grows with the map, so that a product fitted at another
    size is smoothed alike. PatchCore (Roth et al., 2022) uses 4.
    """
    scaled = sigma * min(maps.shape[1:]) / REFERENCE_SIZE
    out = np.empty_like(maps)
    for i, one in enumerate(maps):
        cv2.GaussianBlur(one, (0, 0), scaled, out[i], borderType=cv2.BORDER_REFLECT_101)
    return out


def find_regions(calibrated_map: FloatMap, threshold: float = 1.0, min_area: int | None = None) -> list[Region]:
    """Connected parts (8 neighbours) of a map (H, W) above `threshold`: strongest first, at most 20.

    `min_area` in pixels drops specks; the default is a 5,000th of the picture.
    """
    smallest = max(1, round(MIN_AREA_FRACTION * calibrated_map.size)) if min_area is None else min_area
    above = (calibrated_map > threshold).astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(above, connectivity=8, ltype=cv2.CV_32S)
    peaks = np.full(count, -np.inf, np.float32)
    inside = labels > 0
    np.maximum.at(peaks, labels[inside].astype(np.intp), calibrated_map[inside])
    kept = [i for i in range(1, count) if stats[i, cv2.CC_STAT_AREA] >= smallest]
    kept.sort(key=lambda i: (-peaks[i], -stats[i, cv2.CC_STAT_AREA], i))
    regions = []
    for i in kept[:MAX_REGIONS]:
        left, top, width, height, area = (int(value) for value in stats[i])
        regions.append(Region((left, top, left + width, top + height), float(peaks[i]), area))
    return regions


def overlay(picture: NDArray[np.uint8], calibrated_map: FloatMap, strength: float = 0.5) -> NDArray[np.uint8]:
    """`picture`, uint8 (h, w, 3), tinted by its calibrated map (any size): uint8 (h, w, 3).

    The scale is fixed: blue up to 0, through cyan and green to yellow at 1, red from 2 on. A normal picture
    stays blue, whatever its own highest value. `strength` is the share of the tint, 0 to 1.
    """
    height, width = picture.shape[:2]
    if calibrated_map.shape != (height, width):
        calibrated_map = np.asarray(cv2.resize(calibrated_map, (width, height)), np.float32)  # bilinear
    top = SCALE[-1][0]
    finite = np.nan_to_num(calibrated_map, nan=0.0, posinf=top, neginf=0.0)
    index = np.rint(np.clip(finite / top, 0, 1) * 255).astype(np.uint8)
    tint = _colours()[index]
    # The picture in grey under the tint: hue then speaks of the map alone.
    grey = cv2.cvtColor(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return np.asarray(cv2.addWeighted(grey, 1 - strength, tint, strength, 0), np.uint8)


def _colours() -> NDArray[np.uint8]:
    """The scale as a table, uint8 (256, 3)."""
    values = np.linspace(0, SCALE[-1][0], 256)
    stops = [value for value, _ in SCALE]
    channels = [np.interp(values, stops, [colour[c] for _, colour in SCALE]) for c in range(3)]
    return np.rint(np.stack(channels, axis=1)).astype(np.uint8)
