"""A generated inspection set: pictures of one machined part, sound and faulty, with exact masks.

For a first look at the service, for tests and for teaching; it says nothing about accuracy on real parts.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from ood_runners.errors import BadParameter, DataError
from ood_runners.images import encode_png
from ood_runners.training import inspection_scene as scene
from ood_runners.training.inspection_scene import Field, Part
from ood_runners.training.progress import Progress, SilentProgress

SUPERSAMPLING = 1.25
SMALLEST = 96
_MASKED = 0.35  # a pixel belongs to a defect from this cover on

Defect = Callable[[Part, np.random.Generator], Field]


def generate(
    folder: Path,
    *,
    train: int = 60,
    good: int = 20,
    per_defect: int = 8,
    size: int = 384,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Write an inspection set in MVTec's layout into `folder`, and return `folder`.

    ``train/good`` and ``test/good`` hold sound parts, ``test/<defect>`` faulty ones, and
    ``ground_truth/<defect>/<name>_mask.png`` the faults' pixels (255) at the picture's size. All are PNG. One
    seed gives the same files whatever the counts: picture i of a folder depends on the seed, folder and i alone.

    Parameters
    ----------
    folder : created where it is missing; files of the same names are replaced.
    train, good, per_defect : pictures in ``train/good``, in ``test/good`` and in each of the `DEFECTS`.
    size : pixels of each side, at least 96.

    Raises
    ------
    BadParameter
        A count below 0 or a size below 96.
    DataError
        The folder cannot be written.
    """
    if min(train, good, per_defect) < 0:
        raise BadParameter("The numbers of pictures cannot be negative.")
    if size < SMALLEST:
        raise BadParameter(f"The pictures' size must be at least {SMALLEST} pixels, not {size}.")
    folders = [("train/good", train), ("test/good", good), *((f"test/{name}", per_defect) for name in DEFECTS)]
    try:
        with (progress or SilentProgress()).stage("generate", sum(count for _, count in folders)) as stage:
            for number, (name, count) in enumerate(folders):
                kind = Path(name).name
                for i in range(count):
                    picture, mask = draw(kind, np.random.default_rng([seed, number, i]), size)
                    _write(folder / name / f"{i:03d}.png", picture)
                    if kind != "good":
                        _write(folder / "ground_truth" / kind / f"{i:03d}_mask.png", mask)
                    stage.advance()
    except OSError as error:
        raise DataError(f"The inspection set cannot be written to {folder} ({error.strerror or error}).") from error
    return folder


def draw(kind: str, rng: np.random.Generator, size: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """One picture, uint8 (size, size, 3), and its mask, uint8 (size, size) of 0 and 255.

    `kind` is ``good`` or one of the `DEFECTS`.
    """
    part = scene.place(rng, round(size * SUPERSAMPLING))
    if kind == "missing_hole":
        cover = _missing_hole(part, rng)
    else:
        scene.machine(part, rng)
        cover = DEFECTS[kind](part, rng) if kind != "good" else np.zeros_like(part.u)
    picture = scene.photograph(scene.shade(part, rng), rng, size)
    seen = cv2.resize(cover, (size, size), interpolation=cv2.INTER_AREA)
    return picture, np.where(seen >= _MASKED, 255, 0).astype(np.uint8)


def _scratch(part: Part, rng: np.random.Generator) -> Field:
    """A bent groove with raised lips across the plate, now and then two."""
    cover = np.zeros_like(part.u)
    for _ in range(1 if rng.random() < 0.7 else 2):
        start, angle = _on_plate(rng), rng.uniform(0, np.pi)
        length, width = rng.uniform(0.16, 0.45), rng.uniform(0.0028, 0.0050)
        t = np.linspace(-0.5, 0.5, 90)[:, None]
        along, across = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
        bend = rng.normal(0, 0.05) * t**2 + 0.002 * np.cumsum(rng.normal(0, 0.25, t.shape), axis=0)
        points = start + length * t * along + bend * across
        pixels = points @ part.frame[:, :2].T + part.frame[:, 2]
        line = np.zeros((part.size, part.size), np.uint8)
        shift = 4
        cv2.polylines(line, [np.round(pixels * 2**shift).astype(np.int32)], False, 255, 1, cv2.LINE_AA, shift)
        distance = cv2.distanceTransform(255 - (line > 100).astype(np.uint8) * 255, cv2.DIST_L2, 5) * part.pixel
        # The tool presses less towards both ends.
        nearest = (part.u - start[0]) * along[0] + (part.v - start[1]) * along[1]
        width_here = width * np.clip(1.15 - np.square(2 * nearest / length), 0.25, 1).astype(np.float32)
        groove = np.exp(-np.square(distance / width_here))
        lip = np.exp(-np.square((distance - 1.7 * width_here) / (0.7 * width_here)))
        solid = part.cover(part.plate) * (1 - part.holes)
        depth = rng.uniform(0.8, 1.6)
        part.height += (depth * width * (0.45 * lip - 0.9 * groove) * solid).astype(np.float32)
        part.tint *= (1 - rng.uniform(0.25, 0.55) * groove * solid)[..., None].astype(np.float32)
        cover = np.maximum(cover, part.cover(distance - 1.3 * width_here) * solid)
    return np.asarray(cover, np.float32)


def _stain(part: Part, rng: np.random.Generator) -> Field:
    """A dried drop of oil, coolant or rust: a blot with a darker rim."""
    centre, radius = _on_plate(rng), rng.uniform(0.035, 0.095)
    stretch, angle = rng.uniform(1.0, 1.7), rng.uniform(0, np.pi)
    du, dv = part.u - np.float32(centre[0]), part.v - np.float32(centre[1])
    along, across = du * np.cos(angle) + dv * np.sin(angle), dv * np.cos(angle) - du * np.sin(angle)
    wobble = 0.28 * radius * scene.noise(rng, part.size, 0.30 * radius / part.pixel)
    distance = (np.hypot(along / stretch, across) - radius + wobble).astype(np.float32)
    solid = part.cover(part.plate) * (1 - part.holes)
    edge = np.clip(0.5 - distance / (0.12 * radius), 0, 1)
    rim = np.exp(-np.square((distance + 0.12 * radius) / (0.11 * radius)))
    kinds = [(0.62, 0.50, 0.34), (0.55, 0.53, 0.50), (0.74, 0.52, 0.36), (0.60, 0.64, 0.58)]
    colour = np.array(kinds[rng.integers(len(kinds))], np.float32)
    strength = rng.uniform(0.35, 0.95) * (0.62 + 0.12 * scene.noise(rng, part.size, 5)) * edge + 0.38 * rim * edge
    amount = np.clip(strength * solid, 0, 1)[..., None]
    part.tint *= (1 - amount * (1 - colour)).astype(np.float32)
    part.rough = np.clip(part.rough + 0.5 * edge * solid, 0, 1)
    return np.asarray((distance < 0) * solid, np.float32)


def _chip(part: Part, rng: np.random.Generator) -> Field:
    """A piece broken out of the plate's outline, with a rough face where it broke."""
    side, along = rng.integers(4), rng.uniform(-0.40, 0.40)
    corner = rng.random() < 0.35
    edge = scene.HALF - (0.29 * scene.CORNER if corner else 0)
    at = np.array([edge, np.sign(along) * edge if corner else along])
    for _ in range(side):
        at = np.array([-at[1], at[0]])
    radius = rng.uniform(0.026, 0.058)
    jagged = 0.20 * radius * scene.noise(rng, part.size, 0.40 * radius / part.pixel)
    before = part.cover(part.plate) * (1 - part.holes)
    distance = (part.radius((float(at[0]), float(at[1]))) - radius + jagged).astype(np.float32)
    face = 0.45 * radius  # how far the break slopes in before it reaches the sound surface
    broken = np.clip(1 - distance / face, 0, 1) * (part.plate < 0)
    grit = scene.noise(rng, part.size, 2.0)
    part.height -= (broken * (0.016 + 0.0022 * grit)).astype(np.float32)
    part.tint *= (1 - 0.30 * broken * (distance > 0))[..., None].astype(np.float32)
    part.rough = np.maximum(part.rough, broken)
    part.plate = np.maximum(part.plate, -distance)
    return np.asarray(np.maximum(part.cover(distance), (broken > 0.15).astype(np.float32)) * before, np.float32)


def _missing_hole(part: Part, rng: np.random.Generator) -> Field:
    """A bolt hole, or the small dowel hole, that was never drilled."""
    which = int(rng.choice(5, p=[0.2, 0.2, 0.2, 0.2, 0.2]))
    scene.machine(part, rng, missing=which)
    if which == 4:
        return part.cover(part.radius(scene.PIN) - (scene.PIN_RADIUS + 0.008))
    return part.cover(part.radius(scene.BOLTS[which]) - scene.SINK)


DEFECTS: dict[str, Defect] = {
    "chip": _chip,
    "missing_hole": _missing_hole,
    "scratch": _scratch,
    "stain": _stain,
}


def _on_plate(rng: np.random.Generator) -> NDArray[np.float64]:
    """A point of the plate that is well inside and on no hole."""
    while True:
        at = rng.uniform(-0.43, 0.43, 2)
        clear = all(np.hypot(*(at - hole)) > scene.SINK + 0.01 for hole in scene.BOLTS)
        if clear and np.hypot(*at) > scene.BORE + 0.03:
            return at


def _write(path: Path, picture: NDArray[np.uint8]) -> None:
    """Whole or not at all: a set that was interrupted holds no half pictures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_bytes(encode_png(picture))
    os.replace(partial, path)
