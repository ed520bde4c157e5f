"""What happens to pictures on a line that drifts: light, focus, sensor, compression, a camera that is knocked.

The changes are made at the product's input size, so a blur or a shift is in shares of that picture and a JPEG's blocks
are as large as they get: a little harsher than the same change to a large photograph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from ood_runners import images

Picture = NDArray[np.uint8]

REFERENCE = 224  # pixels of the shorter side for which a blur is given
SEED = 0


@dataclass(frozen=True)
class Change:
    """One kind of change at rising strengths; `wording` makes a label of a strength."""

    name: str
    strengths: Sequence[float]
    wording: str
    apply: Callable[[Picture, float], Picture]

    def label(self, strength: float) -> str:
        """The change in words, such as ``brightness -10 %``."""
        return self.wording.format(strength)


def brightness(picture: Picture, percent: float) -> Picture:
    """Each channel times 1 + percent / 100: a lamp, an exposure. uint8 (h, w, 3) to the same."""
    return _to_uint8(picture * np.float32(1 + percent / 100))


def contrast(picture: Picture, percent: float) -> Picture:
    """Each pixel's difference to the picture's mean grey, times 1 + percent / 100."""
    mean = np.float32(picture.mean())
    return _to_uint8(mean + (picture - mean) * np.float32(1 + percent / 100))


def blur(picture: Picture, sigma: float) -> Picture:
    """Gaussian blur; `sigma` is in pixels of a picture whose shorter side is 224."""
    return np.asarray(cv2.GaussianBlur(picture, (0, 0), sigma * min(picture.shape[:2]) / REFERENCE), np.uint8)


def noise(picture: Picture, deviation: float) -> Picture:
    """Gaussian noise of this standard deviation in grey levels; the same noise each time."""
    grain = np.random.default_rng(SEED).standard_normal(picture.shape, dtype=np.float32)
    return _to_uint8(picture + grain * np.float32(deviation))


def jpeg(picture: Picture, quality: float) -> Picture:
    """Compressed and read again."""
    return images.decode(images.encode_jpeg(picture, int(quality)))


def shift(picture: Picture, percent: float) -> Picture:
    """Moved right and down by a share of the sides; what is uncovered repeats the border, mirrored."""
    height, width = picture.shape[:2]
    down, right = round(height * percent / 100), round(width * percent / 100)
    padded = cv2.copyMakeBorder(picture, down, 0, right, 0, cv2.BORDER_REFLECT_101)
    return np.asarray(padded[:height, :width], np.uint8)


def _to_uint8(values: NDArray[np.float32]) -> Picture:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


CHANGES: Sequence[Change] = (
    Change("darker", (5, 10, 20), "brightness -{:g} %", lambda picture, by: brightness(picture, -by)),
    Change("brighter", (5, 10, 20), "brightness +{:g} %", brightness),
    Change("less contrast", (10, 20, 40), "contrast -{:g} %", lambda picture, by: contrast(picture, -by)),
    Change("more contrast", (10, 20, 40), "contrast +{:g} %", contrast),
    Change("blur", (0.5, 1, 2), "blur of {:g} px", blur),
    Change("noise", (2, 5, 10), "noise of {:g} grey levels", noise),
    Change("JPEG", (90, 70, 40), "JPEG of quality {:g}", jpeg),
    Change("shift", (1, 2, 4), "shift of {:g} %", shift),
)
