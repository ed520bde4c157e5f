"""The curve rises where pictures differ from each other, and is flat where they are all alike."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from ood_runners.detectors import Mahalanobis, MemoryBank, Softmax
from ood_runners.errors import BadParameter, DataError
from ood_runners.features import Features
from ood_runners.training import report
from ood_runners.training.evaluate import evaluate
from ood_runners.training.learning import LearningCurve, Point, learning_curve
from tests.training.brightness import SIZE, BrightnessProduct, Dataset, PictureFile, write

GRID = 8


def network(pictures: np.ndarray) -> Features:
    """Mean and spread of each colour in each cell: a network that can be read."""
    small = np.stack([cv2.resize(one, (GRID, GRID), interpolation=cv2.INTER_AREA) for one in pictures])
    edges = np.stack([np.abs(cv2.Laplacian(one, cv2.CV_32F)) for one in pictures])
    rough = np.stack([cv2.resize(one, (GRID, GRID), interpolation=cv2.INTER_AREA) for one in edges])
    patches = np.concatenate([small.astype(np.float32), rough], axis=3)
    return Features(patches=patches, pooled={"all": patches.mean(axis=(1, 2))})


def made_product(*detectors: object, classes: list[str] | None = None) -> SimpleNamespace:
    names = {one.name: one for one in detectors}  # type: ignore[attr-defined]
    return SimpleNamespace(
        own=SimpleNamespace(detectors=names, network=network),
        input_size=(SIZE, SIZE),
        manifest=SimpleNamespace(data=SimpleNamespace(classes=classes)),
        calibration=SimpleNamespace(weights=dict.fromkeys(names, 1.0), alpha_requested=0.05),
    )


def parts(root: Path, count: int, kinds: int, labels: list[str] | None = None) -> Dataset:
    """Stripes of `kinds` widths and colours, so that so many kinds have to be seen."""
    rng = np.random.default_rng(0)
    files = []
    for i in range(count):
        kind = np.random.default_rng(i % kinds)
        colour, width = kind.uniform(40, 200, 3), kind.integers(4, 16)
        x = np.arange(SIZE) + rng.integers(0, width)
        stripes = np.where((x // width % 2)[None, :, None], colour, colour[::-1]) + rng.normal(0, 3, (SIZE, SIZE, 3))
        path = write(root / f"{i:03}.png", stripes.clip(0, 255).astype(np.uint8))
        files.append(PictureFile(path, labels[i % len(labels)] if labels else "good"))
    return Dataset(root, "folder", files)


@pytest.fixture(scope="module")
def curve(tmp_path_factory: pytest.TempPathFactory) -> LearningCurve:
    dataset = parts(tmp_path_factory.mktemp("parts"), 60, 20)
    (dataset.root / "broken.png").write_text("no picture")
    broken = PictureFile(dataset.root / "broken.png", "good")
    return learning_curve(
        made_product(MemoryBank(size=400), Mahalanobis()), replace(dataset, train=[*dataset.train, broken])
    )


def test_more_kinds_of_normal_pictures_seen_is_a_higher_auroc(curve: LearningCurve) -> None:
    assert [point.pictures for point in curve.points] == [5, 10, 20, 48]
    first, last = curve.points[0], curve.points[-1]
    assert last.auroc > first.auroc + 0.05
    assert [point.alpha for point in curve.points] == pytest.approx([1 / 6, 1 / 11, 0.05, 0.05])
    assert curve.detectors == ["memory_bank", "mahalanobis"]
    assert curve.pictures == 60  # that can be read


def test_no_picture_is_judged_by_what_was_fitted_on_it(tmp_path: Path) -> None:
    """Pictures of which no two are alike stay as strange as their defects, unless they are fitted on themselves."""
    curve = learning_curve(made_product(MemoryBank(size=2_000)), parts(tmp_path, 30, 30))
    assert curve.points[-1].auroc < 0.82


def test_one_seed_gives_one_curve(tmp_path: Path) -> None:
    dataset, product = parts(tmp_path, 15, 3), made_product(MemoryBank(size=100))
    assert learning_curve(product, dataset) == learning_curve(product, dataset)
    assert [point.pictures for point in learning_curve(product, dataset).points] == [5, 12]


def test_class_folders_are_fitted_with_their_labels(tmp_path: Path) -> None:
    dataset = parts(tmp_path, 40, 4, ["a", "b", "c", "d"])
    labelled = learning_curve(made_product(Mahalanobis(), classes=["a", "b", "c", "d"]), dataset)
    plain = learning_curve(made_product(Mahalanobis()), dataset)
    assert [point.pictures for point in labelled.points] == [12, 24, 32]
    assert labelled.points[-1].auroc != plain.points[-1].auroc


def made(*aurocs: float, pictures: int = 50) -> LearningCurve:
    points = [Point(5 * 2**i, auroc, 0.0, 0.1) for i, auroc in enumerate(aurocs)]
    return LearningCurve(["memory_bank"], pictures, 0.01, points)


def test_advice() -> None:
    rising = made(0.7, 0.8, 0.9)
    assert rising.enough() is None
    assert rising.advice().startswith("Accuracy still grows at the end (0.700 with 5, 0.900 with 20)")
    levels_off = made(0.7, 0.895, 0.9)
    assert levels_off.enough() == levels_off.points[1]
    assert "fewer than 10 pictures, adding more helps" in levels_off.advice()
    assert levels_off.advice().endswith("An alpha of 1 % needs 99; 50 decide at 1.96 %.")
    flat = made(0.9, 0.9, 0.9, pictures=200)
    assert flat.advice().startswith("From 5 pictures on, more of them hardly help")
    assert flat.advice().endswith("An alpha of 1 % needs 99, which there are.")
    # A dip at the end does not make more pictures look useless before it.
    assert made(0.7, 0.9, 0.8).enough() == made(0.7, 0.9, 0.8).points[1]


def test_terminal_json_and_page(curve: LearningCurve, product: BrightnessProduct, inspection: Dataset) -> None:
    evaluation = replace(evaluate(product, inspection), learning=curve)
    assert curve.advice() in evaluation.lines()
    stored = json.loads(evaluation.to_json())["learning_curve"]
    assert [point["auroc"] for point in stored["points"]] == [point.auroc for point in curve.points]
    page = report.render(evaluation, product)
    assert "How much data is enough" in page and "attainable alpha (%)" in page
    assert "How much data is enough" not in report.render(replace(evaluation, learning=None), product)


def test_user_mistakes(tmp_path: Path) -> None:
    dataset = parts(tmp_path, 14, 2)
    with pytest.raises(DataError, match="needs 15 training pictures or more; 14 of"):
        learning_curve(made_product(MemoryBank(size=100)), dataset)
    with pytest.raises(BadParameter, match="this product has only softmax"):
        learning_curve(made_product(Softmax()), dataset)
