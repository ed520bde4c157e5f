from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training.brightness import BrightnessProduct, Dataset, PictureFile, picture, spotted, write

Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Write pixels under `tmp_path`/data."""
    return lambda name, pixels: write(tmp_path / "data" / name, pixels)


@pytest.fixture(scope="session")
def product() -> BrightnessProduct:
    return BrightnessProduct()


@pytest.fixture(scope="session")
def inspection(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """20 normal pictures, 8 with a bright patch, 4 with a dark one (2 of them without a mask), 2 broken files."""
    root = tmp_path_factory.mktemp("inspection")
    test = [PictureFile(write(root / f"test/good/{i:02}.png", picture(i)), "good") for i in range(20)]
    for label, contrast, first, count in (("bright", 60, 100, 8), ("dark", -60, 200, 4)):
        for i in range(count):
            pixels, mask = spotted(first + i, contrast)
            file = write(root / f"test/{label}/{i:02}.png", pixels)
            # Masks come at another size than their pictures, as they may.
            large = mask.repeat(2, axis=0).repeat(2, axis=1)
            has_mask = label == "bright" or i < 2
            stored = write(root / f"ground_truth/{label}/{i:02}_mask.png", large) if has_mask else None
            test.append(PictureFile(file, label, stored))
    empty, text = root / "test/good/empty.png", root / "test/bright/text.png"
    empty.write_bytes(b"")
    text.write_text("no picture")
    test += [PictureFile(empty, "good"), PictureFile(text, "bright")]
    return Dataset(root, "mvtec", [], test)
