"""A drawn scene for demonstrations: a machined aluminium flange on a conveyor belt, under one lamp.

The part is a height field, shaded through its surface normals, so that chamfers, engraving, scratches and
chips catch the light as metal does. Lengths are in widths of the part's plate; the part's own frame has its
origin in the centre of the bore. Everything that varies comes from the generator that is passed in.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]

HALF, CORNER = 0.5, 0.13  # the plate: half its width, its corners' radius
BORE, BOSS = 0.155, 0.265  # radii of the bore and of the turned boss around it
BOLTS = [(x, y) for y in (-0.36, 0.36) for x in (-0.36, 0.36)]
BOLT, SINK = 0.052, 0.082  # radii of a bolt hole and of its countersink
PIN, PIN_RADIUS = (0.0, -0.385), 0.024  # a small dowel hole between the upper bolts
TEXT, TEXT_AT = "FL-40 A7", (0.0, 0.375)
BEVEL = 0.016
PLATE_SHARE = 0.70  # of the picture's width

_TEXT_SCALE = 950  # pixels a unit in which the engraving is drawn


@dataclass
class Part:
    """What one picture shows, before it is lit.

    Attributes
    ----------
    size : int
        Pixels of each side; u, v and all fields are float32 (size, size).
    pixel : float
        One pixel's width in the part's units.
    u, v : the part's own coordinates of every pixel.
    frame : float64 (2, 3), from the part's units to pixels.
    plate : signed distance to the plate's outline, negative inside.
    height : the surface above the plate's bevelled edge.
    holes : cover of drilled-through places, 0 to 1.
    tint : reflectance beside the plain metal's, (size, size, 3).
    rough : how matt the surface is, 0 polished to 1.
    """

    size: int
    pixel: float
    u: Field
    v: Field
    frame: NDArray[np.float64]
    plate: Field
    height: Field
    holes: Field
    tint: Field
    rough: Field

    def radius(self, at: tuple[float, float]) -> Field:
        """Distance of every pixel from a point in the part's frame."""
        return np.hypot(self.u - np.float32(at[0]), self.v - np.float32(at[1]))

    def cover(self, distance: Field) -> Field:
        """How much of each pixel lies where `distance` is negative: antialiased, 0 to 1."""
        return np.clip(0.5 - distance / self.pixel, 0, 1)


def noise(rng: np.random.Generator, size: int, sigma: float) -> Field:
    """Smooth noise, float32 (size, size), mean 0 and deviation 1; `sigma` pixels wide."""
    step = max(1, int(sigma / 2))
    small = -(-size // step) + 8
    grain = rng.standard_normal((small, small), dtype=np.float32)
    grain = np.asarray(cv2.GaussianBlur(grain, (0, 0), sigma / step), np.float32)
    grain = (grain - grain.mean()) / (grain.std() + 1e-6)
    large = cv2.resize(grain, (small * step, small * step), interpolation=cv2.INTER_CUBIC) if step > 1 else grain
    return np.asarray(large[4 * step : 4 * step + size, 4 * step : 4 * step + size], np.float32)


def place(rng: np.random.Generator, size: int) -> Part:
    """A part at a natural position (a few degrees, a few percent), complete and without faults but for `drill`."""
    angle = np.radians(np.clip(rng.normal(0, 2.2), -5, 5))
    scale = size * PLATE_SHARE * rng.normal(1, 0.008)
    centre = size / 2 + rng.normal(0, 0.012 * size, 2)
    cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
    frame = np.array([[cos, -sin, centre[0]], [sin, cos, centre[1]]])
    y, x = np.mgrid[:size, :size].astype(np.float32)
    dx, dy = (x - centre[0]).astype(np.float32), (y - centre[1]).astype(np.float32)
    u = ((cos * dx + sin * dy) / scale**2).astype(np.float32)
    v = ((-sin * dx + cos * dy) / scale**2).astype(np.float32)
    outside_u, outside_v = np.abs(u) - (HALF - CORNER), np.abs(v) - (HALF - CORNER)
    plate = (
        np.hypot(np.maximum(outside_u, 0), np.maximum(outside_v, 0))
        + np.minimum(np.maximum(outside_u, outside_v), 0)
        - CORNER
    ).astype(np.float32)
    zeros = np.zeros((size, size), np.float32)
    return Part(size, 1 / scale, u, v, frame, plate, zeros, zeros, np.ones((size, size, 3), np.float32), zeros)


def machine(part: Part, rng: np.random.Generator, missing: int | None = None) -> None:
    """Cut the part's shape: bevel, boss, bore, engraving, brushed and turned finish, and all holes but `missing`.

    `missing` counts the four bolt holes 0 to 3 and the dowel hole 4.
    """
    centre = part.radius((0, 0))
    part.height = np.clip(-part.plate, 0, BEVEL) + np.clip(BOSS - centre, 0, BEVEL) * 1.2
    part.height -= np.clip(BORE + BEVEL - centre, 0, BEVEL)
    part.holes = part.cover(centre - BORE)
    for i, at in enumerate([*BOLTS, PIN]):
        if i == missing:
            continue
        distance = part.radius(at)
        radius, sink = (BOLT, SINK) if i < 4 else (PIN_RADIUS, PIN_RADIUS + 0.008)
        part.height -= np.clip(sink - distance, 0, sink - radius) * 0.6
        part.holes = np.maximum(part.holes, part.cover(distance - radius))
    part.height -= 0.006 * _engraving(part)
    part.height += 0.00035 * _brushed(part, rng)
    turned = np.interp(centre.ravel(), np.linspace(0, 0.8, 1_500), _grooves(rng, 1_500)).reshape(centre.shape)
    on_boss = part.cover(centre - (BOSS - BEVEL))
    part.height += (0.00035 * on_boss * turned).astype(np.float32)
    part.rough = 0.25 + 0.05 * noise(rng, part.size, part.size / 12)


def shade(part: Part, rng: np.random.Generator) -> Field:
    """The lit scene, linear float32 (size, size, 3), about 0 to 1."""
    belt = _belt(part, rng)
    azimuth, elevation = np.radians(rng.normal(-125, 7)), np.radians(rng.normal(52, 2.5))
    light = np.array(
        [np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)], np.float32
    )
    # The plate lies a little above the belt: a soft shadow away from the lamp, a dark line of contact.
    solid = part.cover(part.plate) * (1 - part.holes)
    offset = np.array([[1, 0, -light[0] * 0.05 / part.pixel], [0, 1, -light[1] * 0.05 / part.pixel]])
    cast = cv2.warpAffine(solid, offset, (part.size, part.size), borderMode=cv2.BORDER_REPLICATE)
    shadow = np.maximum(
        0.72 * cv2.GaussianBlur(cast, (0, 0), 0.018 / part.pixel),
        0.55 * cv2.GaussianBlur(solid, (0, 0), 0.008 / part.pixel),
    )
    # Metal: normals from the height; a broad and a narrow highlight.
    slope = 0.9 / part.pixel
    nx = -cv2.Scharr(part.height, cv2.CV_32F, 1, 0) / 32 * slope
    ny = -cv2.Scharr(part.height, cv2.CV_32F, 0, 1) / 32 * slope
    length = np.sqrt(nx * nx + ny * ny + 1)
    facing = np.maximum((nx * light[0] + ny * light[1] + light[2]) / length, 0)
    half = light + np.array([0, 0, 1], np.float32)
    half /= np.linalg.norm(half)
    mirror = np.maximum((nx * half[0] + ny * half[1] + half[2]) / length, 0)
    broad = np.power(mirror, 15)
    polish = np.clip(1 - part.rough, 0, 1)
    metal = 0.10 + 0.30 * facing + polish * (0.38 * broad + 0.25 * broad**6)
    # What the surroundings mirror in it: a broad sheen across the brush strokes, never twice the same.
    metal *= 1 + 0.04 * noise(rng, part.size, part.size / 7)
    metal += 0.10 * polish * np.exp(-np.square((part.v - np.float32(rng.normal(-0.12, 0.05))) / np.float32(0.33)))
    # Through the holes one sees the belt, deep in shadow, and the lit far wall.
    wall = cv2.GaussianBlur(part.holes, (0, 0), 0.010 / part.pixel)
    inside = part.cover(part.plate)
    through = inside * part.holes
    scene = belt * ((1 - shadow) * (1 - inside + 0.16 * through))[..., None]
    scene += part.tint * (metal * (inside - through))[..., None] * np.array([0.985, 1.0, 1.02], np.float32)
    scene += (0.05 * (1 - wall) * through)[..., None]
    return np.asarray(scene, np.float32)


def photograph(scene: Field, rng: np.random.Generator, size: int) -> NDArray[np.uint8]:
    """What the camera makes of a scene: uint8 (size, size, 3), RGB.

    Uneven light and vignetting, lens blur, exposure and white balance, shot and read noise, tone curve.
    """
    y, x = np.mgrid[-1 : 1 : scene.shape[0] * 1j, -1 : 1 : scene.shape[1] * 1j].astype(np.float32)
    tilt = rng.normal(0, 0.035, 2)
    field_of_light = (1 + tilt[0] * x + tilt[1] * y) * (1 - 0.10 * (x * x + y * y))
    seen = scene * field_of_light[..., None].astype(np.float32) * np.float32(rng.normal(1, 0.05))
    seen = seen * rng.normal(1, 0.008, 3).astype(np.float32)
    seen = cv2.GaussianBlur(seen, (0, 0), rng.uniform(0.6, 0.85))
    seen = np.maximum(cv2.resize(seen, (size, size), interpolation=cv2.INTER_AREA), 0)
    grain = rng.standard_normal(seen.shape, dtype=np.float32)
    seen = np.maximum(seen + grain * np.sqrt(0.00012 * seen + 0.000012), 0)
    tone = 1.18 * seen / (1 + 0.18 * seen)  # a soft shoulder, so that highlights do not clip hard
    return np.clip(np.power(tone, 1 / 2.0) * 255 + 0.5, 0, 255).astype(np.uint8)


def _engraving(part: Part) -> Field:
    """Cover of the engraved mark, drawn large once and carried into the picture."""
    font, height = cv2.FONT_HERSHEY_DUPLEX, 2.2
    (width, tall), _ = cv2.getTextSize(TEXT, font, height, 5)
    drawn = np.zeros((tall + 40, width + 40), np.uint8)
    cv2.putText(drawn, TEXT, (20, tall + 20), font, height, 255, 5, cv2.LINE_AA)
    plaque = cv2.GaussianBlur(drawn.astype(np.float32) / 255, (0, 0), 1.6)
    unit = _TEXT_SCALE
    to_part = np.array(
        [
            [1 / unit, 0, TEXT_AT[0] - plaque.shape[1] / 2 / unit],
            [0, 1 / unit, TEXT_AT[1] - plaque.shape[0] / 2 / unit],
            [0, 0, 1],
        ]
    )
    return np.asarray(cv2.warpAffine(plaque, part.frame @ to_part, (part.size, part.size), flags=cv2.INTER_AREA))


def _brushed(part: Part, rng: np.random.Generator) -> Field:
    """Fine strokes along the plate, mean 0 and deviation about 1."""
    side = int(part.size * 0.95)  # the plate and its few degrees of turn
    long, short = side // 3, side // 9
    fine = cv2.blur(rng.standard_normal((side, side), dtype=np.float32), (long, 1)) * np.sqrt(long)
    coarse = cv2.blur(rng.standard_normal((side, side), dtype=np.float32), (short, 2)) * np.sqrt(2 * short)
    strokes = fine + 0.6 * coarse
    turn = part.frame.copy()
    turn[:, :2] *= part.pixel  # rotation only: one stroke is a pixel wide at any size
    turn[:, 2] -= turn[:, :2] @ np.array([side / 2, side / 2])
    return np.asarray(cv2.warpAffine(strokes, turn, (part.size, part.size), borderMode=cv2.BORDER_REFLECT), np.float32)


def _grooves(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    """The profile that a lathe leaves along the radius."""
    regular = np.sin(np.arange(count) * 2 * np.pi / 9 + rng.uniform(0, 6))
    return 1.2 * regular + np.convolve(rng.standard_normal(count), np.ones(3) / 2, "same")


def _belt(part: Part, rng: np.random.Generator) -> Field:
    """The conveyor: dark green-grey rubber with a woven pattern that runs on between pictures, dust and wear."""
    size = part.size
    y, x = np.mgrid[:size, :size].astype(np.float32)
    x, y = x * part.pixel + rng.uniform(0, 1), y * part.pixel + rng.uniform(0, 1)
    pitch = np.float32(2 * np.pi / 0.034)
    weave = np.sin((x + y) * pitch) * np.sin((x - y) * pitch)
    base = 0.080 + 0.022 * weave + 0.006 * noise(rng, size, 1.0)
    base *= 1 + 0.07 * noise(rng, size, size / 9)
    dust = np.maximum(noise(rng, size, 1.3) - 3.3, 0)
    base += 0.10 * np.minimum(dust, 1)
    return (base[..., None] * np.array([0.88, 1.0, 0.97], np.float32)).astype(np.float32)
