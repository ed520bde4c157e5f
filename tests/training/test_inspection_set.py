from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from ood_runners.errors import BadParameter, DataError
from ood_runners.images import read
from ood_runners.training import inspection_set
from ood_runners.training.inspection_set import DEFECTS, draw, generate


class Counting:
    """A progress that counts what it is told."""

    def __init__(self) -> None:
        self.total: int | None = None
        self.done = 0

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Counting]:
        self.total = total
        yield self

    def advance(self, n: int = 1, note: str = "") -> None:
        self.done += n


def test_layout_is_mvtecs(tmp_path: Path) -> None:
    progress = Counting()
    root = generate(tmp_path / "set", train=3, good=2, per_defect=1, size=96, progress=progress)
    assert root == tmp_path / "set"
    counts = Counter(str(path.parent.relative_to(root)) for path in root.rglob("*.png"))
    expected = {"train/good": 3, "test/good": 2}
    expected |= {f"{part}/{name}": 1 for name in DEFECTS for part in ("test", "ground_truth")}
    assert counts == expected
    assert set(DEFECTS) == {"scratch", "stain", "chip", "missing_hole"}
    assert (root / "ground_truth/stain/000_mask.png").exists()
    assert not list(root.rglob("*.part"))
    assert read(root / "train/good/002.png").shape == (96, 96, 3)
    assert progress.done == progress.total == 9


def test_same_seed_same_bytes_whatever_the_counts(tmp_path: Path) -> None:
    first = generate(tmp_path / "a", train=2, good=0, per_defect=1, size=96, seed=5)
    again = generate(tmp_path / "b", train=1, good=1, per_defect=1, size=96, seed=5)
    other = generate(tmp_path / "c", train=1, good=0, per_defect=0, size=96, seed=6)
    for name in ("train/good/000.png", "test/chip/000.png", "ground_truth/chip/000_mask.png"):
        assert (first / name).read_bytes() == (again / name).read_bytes()
    assert (first / "train/good/000.png").read_bytes() != (other / "train/good/000.png").read_bytes()
    assert (first / "train/good/000.png").read_bytes() != (first / "train/good/001.png").read_bytes()


@pytest.mark.parametrize("kind", sorted(DEFECTS))
def test_masks_mark_a_fault_of_sensible_size(kind: str) -> None:
    for i in range(10):
        picture, mask = draw(kind, np.random.default_rng([1, i]), 192)
        assert picture.shape == (192, 192, 3)
        assert picture.dtype == mask.dtype == np.uint8
        assert mask.shape == (192, 192)
        assert set(np.unique(mask)) == {0, 255}
        assert 15 <= (mask > 0).sum() <= 0.05 * mask.size


@pytest.mark.parametrize("kind", sorted(DEFECTS))
def test_the_fault_is_where_the_mask_says(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same part without its fault differs inside the mask and hardly outside of it."""
    inside, outside = [], []
    for i in range(4):
        faulty, mask = draw(kind, np.random.default_rng([2, i]), 192)
        sound = sound_twin(kind, np.random.default_rng([2, i]), monkeypatch)
        change = np.abs(faulty.astype(float) - sound).mean(2)
        inside.append(change[mask > 0].mean())
        outside.append(change[mask == 0].mean())
    assert np.mean(inside) > 5 * np.mean(outside)
    assert np.mean(inside) > 8


def sound_twin(kind: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """The picture `draw` would give had the fault not happened; the generator takes the same course."""
    scene = inspection_set.scene
    with monkeypatch.context() as patch:
        if kind == "missing_hole":
            machine = scene.machine
            patch.setattr(scene, "machine", lambda part, rng, missing=None: machine(part, rng))
        else:
            spoil = DEFECTS[kind]

            def pretend(part: scene.Part, rng: np.random.Generator) -> np.ndarray:
                before = {name: getattr(part, name).copy() for name in ("height", "tint", "rough", "plate")}
                cover = spoil(part, rng)
                for name, value in before.items():
                    setattr(part, name, value)
                return cover

            patch.setitem(DEFECTS, kind, pretend)
        return draw(kind, rng, 192)[0]


def test_good_pictures_vary_but_show_the_same_part() -> None:
    pictures = np.stack([draw("good", np.random.default_rng([3, i]), 96)[0] for i in range(12)]).astype(float)
    brightness = pictures.mean((1, 2, 3))
    assert 2 < brightness.std() < 12
    assert 60 < brightness.mean() < 190
    flat = pictures.mean(3).reshape(12, -1)
    assert np.corrcoef(flat).min() > 0.65
    assert (np.abs(pictures[0] - pictures[1]).mean()) > 3
    assert all(not draw("good", np.random.default_rng([3, i]), 96)[1].any() for i in range(2))


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(BadParameter, match="at least 96"):
        generate(tmp_path / "set", size=50)
    with pytest.raises(BadParameter, match="negative"):
        generate(tmp_path / "set", train=-1)
    assert not (tmp_path / "set").exists()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot be written"):
        generate(tmp_path / "file", train=1, good=0, per_defect=0, size=96)
