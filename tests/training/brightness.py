"""A product whose detectors look at nothing but brightness, and the pictures it is meant for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
from PIL import Image

from ood_runners.features import Scores

SIZE = 64
CELLS = 16


@dataclass(frozen=True)
class PictureFile:
    path: Path
    label: str
    mask: Path | None = None


@dataclass(frozen=True)
class Dataset:
    root: Path
    layout: str
    train: list[PictureFile] = field(default_factory=list)
    test: list[PictureFile] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)


def raw_scores(pictures):
    grey = pictures.mean(axis=3, dtype=np.float32)
    cells = grey.reshape(len(grey), CELLS, SIZE // CELLS, CELLS, SIZE // CELLS).mean(axis=(2, 4))
    spots = np.abs(cells - np.median(cells, axis=(1, 2), keepdims=True)).astype(np.float32)
    light = np.abs(grey.mean(axis=(1, 2)) - 100).astype(np.float32)
    return {
        "spots": Scores(spots.max(axis=(1, 2)), spots),
        "light": Scores(light, predicted=(grey.mean(axis=(1, 2)) > 100).astype(np.int64)),
    }


class BrightnessCalibration:
    """Conformal p-values of each detector and of the larger of the two scores, each over its median."""

    def __init__(self, pictures, alpha=0.05):
        self.alpha = alpha
        scores = raw_scores(pictures)
        self.sorted = {name: np.sort(score.image) for name, score in scores.items()}
        self.level = {name: float(np.median(values)) for name, values in self.sorted.items()}
        self.sorted["fused"] = np.sort(self.fuse(scores))
        self.map_level = float(np.quantile(scores["spots"].map.max(axis=(1, 2)), 1 - alpha))

    def fuse(self, scores):
        return np.max([score.image / self.level[name] for name, score in scores.items()], axis=0)

    def p_value(self, name, value):
        return float(1 + (self.sorted[name] >= value).sum()) / (len(self.sorted[name]) + 1)

    def judge(self, scores, alpha=None):
        alpha = self.alpha if alpha is None else alpha
        fused = self.fuse(scores)
        judgements = []
        for i, score in enumerate(fused):
            parts = {
                name: SimpleNamespace(score=one.image[i], p_value=self.p_value(name, one.image[i]))
                for name, one in scores.items()
            }
            p = self.p_value("fused", score)
            judgements.append(
                SimpleNamespace(
                    verdict="anomalous" if p <= alpha else "normal",
                    p_value=p,
                    score=score,
                    alpha=alpha,
                    detectors=parts,
                    predicted=int(scores["light"].predicted[i]),
                )
            )
        return judgements

    def anomaly_map(self, scores, size):
        shape = (size[1], size[0])
        return np.stack([cv2.resize(one, shape) for one in scores["spots"].map]) / np.float32(self.map_level)


class BrightnessProduct:
    input_size = (SIZE, SIZE)

    def __init__(self, classes=None):
        self.classes = classes
        self.manifest = SimpleNamespace(tag="ood-washer:20260102-030405-678abc")
        self.calibration = BrightnessCalibration(np.stack([picture(seed) for seed in range(1000, 1099)]))
        self.batches: list[int] = []

    def raw_scores(self, pictures):
        assert pictures.dtype == np.uint8 and pictures.shape[1:] == (SIZE, SIZE, 3)
        self.batches.append(len(pictures))
        return raw_scores(pictures)


def picture(seed, light=100, size=SIZE):
    """A grey, slightly uneven surface: uint8 (size, size, 3)."""
    rng = np.random.default_rng(seed)
    noise = cv2.GaussianBlur(rng.normal(0, 30, (size, size)).astype(np.float32), (0, 0), 3)
    return np.clip(light + rng.normal(0, 2) + noise, 0, 255).astype(np.uint8)[..., None].repeat(3, axis=2)


def spotted(seed, contrast=60):
    """A surface with a bright patch, and the mask (0 or 255) of the patch."""
    surface, mask = picture(seed), np.zeros((SIZE, SIZE), np.uint8)
    top, left = np.random.default_rng(seed).integers(8, SIZE - 24, 2)
    mask[top : top + 14, left : left + 10] = 255
    bright = surface.astype(int) + contrast * (mask[..., None] > 0)
    return np.clip(bright, 0, 255).astype(np.uint8), mask


def write(path, pixels):
    """The path, with the pixels in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path
