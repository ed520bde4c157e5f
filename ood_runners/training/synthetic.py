"""Synthetic defects on normal pictures: something to tell detectors apart by where no defect was ever photographed.

They rank detectors and weights against each other; they say nothing of how many real defects will be found.

References
----------
Li et al., "CutPaste: Self-Supervised Learning for Anomaly Detection and Localization", CVPR 2021.
Zavrtanik et al., "DRAEM: A discriminatively trained reconstruction embedding for surface anomaly detection",
ICCV 2021 (noise-shaped masks filled with a foreign texture).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from ood_runners.errors import BadParameter

SMALLEST, LARGEST = 0.03, 0.20  # radius of a defect, as a share of the shorter side
VISIBLE = 10  # grey levels of change from which on a pixel belongs to the defect
MIN_PIXELS = 8  # fewer are no defect that anybody could be asked to find
ATTEMPTS = 6

Picture = NDArray[np.uint8]
Field = NDArray[np.float32]
Paint = Callable[[Field, Field, Field, np.random.Generator], Field]


def synthetic_defects(
    pictures: Picture, rng: np.random.Generator, kinds: Sequence[str] | None = None
) -> tuple[Picture, NDArray[np.bool_]]:
    """A copy of each picture with one defect, and the pixels that it changed visibly.

    The kinds take turns in a random order, so that a few pictures have all of them. Sizes and strengths range from
    hardly visible to gross. One generator state gives one result.

    Parameters
    ----------
    pictures : uint8 (n, h, w, 3), normal ones; may be memory-mapped
    kinds : names from `KINDS`; None takes all

    Returns
    -------
    uint8 (n, h, w, 3) and bool (n, h, w); each mask marks at least 8 pixels.

    Raises
    ------
    BadParameter
        A kind that there is not, no kind, or pictures of another shape.
    """
    names = list(KINDS) if kinds is None else list(kinds)
    unknown = [name for name in names if name not in KINDS]
    if unknown or not names:
        raise BadParameter(
            f"There is no synthetic defect {', '.join(unknown) or 'given'}; choose of {', '.join(KINDS)}."
        )
    if pictures.ndim != 4 or pictures.shape[3] != 3 or min(pictures.shape[1:3]) < 32:
        raise BadParameter("Synthetic defects need pictures of shape (n, h, w, 3), 32 pixels a side or more.")
    out = np.array(pictures, np.uint8)
    masks = np.zeros(pictures.shape[:3], bool)
    order: list[str] = []
    while len(order) < len(out):
        order += [names[i] for i in rng.permutation(len(names))]
    for i, name in enumerate(order[: len(out)]):
        donor = pictures[int(rng.integers(len(pictures)))]
        out[i], masks[i] = _defective(pictures[i], donor, KINDS[name], rng)
    return out, masks


def _defective(
    picture: Picture, donor: Picture, paint: Paint, rng: np.random.Generator
) -> tuple[Picture, NDArray[np.bool_]]:
    """The picture with one defect; a try that hardly changes it is repeated, at last with a plain blot."""
    x = picture.astype(np.float32)
    for attempt in range(ATTEMPTS + 1):
        cover = _shape(x, rng)
        changed = paint(x, cover, donor.astype(np.float32), rng)
        if attempt == ATTEMPTS:  # nothing to blur or to move in a picture of one colour
            changed = x + cover[..., None] * np.where(x.mean() > 127, -60, 60).astype(np.float32)
        result = np.clip(np.rint(changed), 0, 255).astype(np.uint8)
        visible = np.abs(result.astype(np.int16) - picture).max(axis=2) >= VISIBLE
        # A blurred or tinted place has pixels that happen to look as before; they belong to it.
        mask = cv2.morphologyEx(visible.astype(np.uint8), cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8)) > 0
        if mask.sum() >= MIN_PIXELS:
            break
    return result, mask


# ---------------------------------------------------------------- where and of what shape


def _shape(x: Field, rng: np.random.Generator) -> Field:
    """A ragged blob's cover, float32 (h, w) in 0..1, more often where the picture shows something."""
    height, width = x.shape[:2]
    short = min(height, width)
    radius = short * SMALLEST * (LARGEST / SMALLEST) ** rng.random()
    row, column = _place(x, rng)
    angle, stretch = rng.uniform(0, np.pi), 2.0 ** rng.uniform(0, 1.3)
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    down, right = rows - np.float32(row), columns - np.float32(column)
    along = down * np.float32(np.sin(angle)) + right * np.float32(np.cos(angle))
    across = right * np.float32(np.sin(angle)) - down * np.float32(np.cos(angle))
    distance = np.hypot(along / np.float32(stretch), across * np.float32(stretch**0.5))
    ragged = 1 + 0.35 * _noise(rng, (height, width), max(2.0, 0.6 * radius))
    edge = max(1.0, 0.15 * radius)
    return np.clip((radius * ragged - distance) / np.float32(edge) + 0.5, 0, 1).astype(np.float32)


def _place(x: Field, rng: np.random.Generator) -> tuple[int, int]:
    """A pixel, drawn in proportion to how much goes on around it; a picture's empty border is seldom hit."""
    height, width = x.shape[:2]
    grey = x.mean(axis=2)
    step = max(1, min(height, width) // 32)
    busy = cv2.resize(np.hypot(cv2.Sobel(grey, -1, 1, 0), cv2.Sobel(grey, -1, 0, 1)), None, fx=1 / step, fy=1 / step)
    busy = cv2.GaussianBlur(busy, (0, 0), 2.0)
    weight = (busy + 0.25 * busy.mean() + 1e-3).ravel().astype(np.float64)
    cell = int(rng.choice(len(weight), p=weight / weight.sum()))
    row, column = divmod(cell, busy.shape[1])
    jitter = rng.uniform(0, step, 2)
    return min(height - 1, int(row * step + jitter[0])), min(width - 1, int(column * step + jitter[1]))


def _noise(rng: np.random.Generator, shape: tuple[int, int], scale: float) -> Field:
    """Smooth noise of two octaves, float32 `shape`, about -2 to 2; `scale` pixels wide."""
    total: Field = np.zeros(shape, np.float32)
    for octave, share in ((scale, 1.0), (scale / 2, 0.5)):
        grid = (max(2, round(shape[0] / octave) + 1), max(2, round(shape[1] / octave) + 1))
        grain = rng.standard_normal(grid, dtype=np.float32)
        large: Any = cv2.resize(grain, shape[::-1], interpolation=cv2.INTER_CUBIC)
        total = total + np.float32(share) * large
    return total


# ---------------------------------------------------------------- what is painted there


def _blend(x: Field, other: Field, amount: Field) -> Field:
    return x + amount[..., None] * (other - x)


def _cut_paste(x: Field, cover: Field, donor: Field, rng: np.random.Generator) -> Field:
    """A piece of a normal picture in the wrong place: turned, a little darker or lighter."""
    height, width = x.shape[:2]
    turn: Any = cv2.getRotationMatrix2D((width / 2, height / 2), rng.uniform(0, 360), rng.uniform(0.8, 1.25))
    turn[:, 2] += rng.uniform(-0.35, 0.35, 2) * (width, height)
    moved = cv2.warpAffine(donor, turn, (width, height), borderMode=cv2.BORDER_REFLECT_101)
    return _blend(x, np.asarray(moved * np.float32(rng.uniform(0.75, 1.25)), np.float32), cover)


def _texture(x: Field, cover: Field, donor: Field, rng: np.random.Generator) -> Field:
    """A foreign texture: grain of some width in a colour that is not far from the picture's own."""
    height, width = x.shape[:2]
    grain = _noise(rng, (height, width), rng.uniform(2.0, 8.0))
    if rng.random() < 0.5:
        grain = np.sign(grain)
    base = x[cover > 0.5].mean(axis=0) if (cover > 0.5).any() else x.mean(axis=(0, 1))
    colour = base + rng.normal(0, 40, 3)
    foreign = colour + grain[..., None] * rng.uniform(15, 55) * rng.uniform(0.6, 1.0, 3)
    return _blend(x, foreign.astype(np.float32), cover * np.float32(rng.uniform(0.4, 1.0)))


def _blur(x: Field, cover: Field, donor: Field, rng: np.random.Generator) -> Field:
    """A place that is out of focus, smeared or worn."""
    short = min(x.shape[:2])
    sigma = short / 224 * rng.uniform(2.0, 7.0)
    return _blend(x, np.asarray(cv2.GaussianBlur(x, (0, 0), sigma), np.float32), cover)


def _stain(x: Field, cover: Field, donor: Field, rng: np.random.Generator) -> Field:
    """A drop that has dried: a tint with a darker rim through which the surface shows."""
    radius = max(1.0, float(np.sqrt(cover.sum() / np.pi)))
    inner = np.asarray(cv2.GaussianBlur(cover, (0, 0), 0.25 * radius), np.float32)
    rim = np.clip(4 * inner * (1 - inner), 0, 1) * cover
    tint = 1 - rng.uniform(0.15, 0.55) * rng.uniform(0.3, 1.0, 3)
    if rng.random() < 0.3:
        tint = 2 - tint  # a bleached or wet place is lighter
    amount = cover * np.float32(0.7) + rim * np.float32(0.3)
    return _blend(x, (x * tint).astype(np.float32), amount)


def _missing(x: Field, cover: Field, donor: Field, rng: np.random.Generator) -> Field:
    """A part that is not there: what lies behind it, taken from the picture's border or from around the place."""
    if rng.random() < 0.5:
        border = np.concatenate([x[0], x[-1], x[:, 0], x[:, -1]])
        behind = np.broadcast_to(np.median(border, axis=0), x.shape) + rng.normal(0, 3, (*x.shape[:2], 1))
        return _blend(x, behind.astype(np.float32), cover)
    hole = (cover > 0.05).astype(np.uint8)
    filled = cv2.inpaint(np.clip(np.rint(x), 0, 255).astype(np.uint8), hole, 3, cv2.INPAINT_TELEA)
    return _blend(x, filled.astype(np.float32), cover)


def _colour(x: Field, cover: Field, donor: Field, rng: np.random.Generator) -> Field:
    """Another colour on the same surface: paint, heat, a wrong batch."""
    shift = rng.normal(0, 1, 3)
    shift *= rng.uniform(18, 70) / max(float(np.abs(shift).max()), 1e-6)
    return x + cover[..., None] * shift.astype(np.float32)


def _scratch(x: Field, cover: Field, donor: Field, rng: np.random.Generator) -> Field:
    """A bent line, dark or light, one to a few pixels wide, across where the blob would have been."""
    height, width = x.shape[:2]
    short = min(height, width)
    centre = np.array([np.average(axis, weights=cover + 1e-6) for axis in np.indices(cover.shape)])[::-1]
    t = np.linspace(-0.5, 0.5, 40)[:, None]
    angle = rng.uniform(0, np.pi)
    along, across = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
    length = short * rng.uniform(0.08, 0.45)
    walk = np.cumsum(rng.normal(0, 0.012, t.shape), axis=0)
    points = centre + length * (t * along + (rng.normal(0, 0.3) * t**2 + walk) * across)
    line = np.zeros((height, width), np.uint8)
    thickness = max(1, round(short / 224 * rng.uniform(1.0, 3.0)))
    cv2.polylines(line, [np.rint(points * 8).astype(np.int32)], False, 255, thickness, cv2.LINE_AA, 3)
    amount = np.asarray(line, np.float32) * np.float32(rng.uniform(0.35, 0.9) / 255)
    return _blend(x, np.full_like(x, 255 if rng.random() < 0.5 else 0), amount)


KINDS: dict[str, Paint] = {
    "cut_paste": _cut_paste,
    "texture": _texture,
    "blur": _blur,
    "stain": _stain,
    "missing": _missing,
    "colour": _colour,
    "scratch": _scratch,
}
