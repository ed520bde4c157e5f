from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ood_runners import images
from ood_runners.errors import BadParameter, DataError
from ood_runners.training.attention import Attention, Compared, check_defects, compare_normals, judge, weights
from ood_runners.training.datasets import defects_in

SIDE, D, SHOWS = 6, 8, 6
SPREAD = np.array([1, 1, 1, 1, 1, 1, 0.1, 0.1])


def pictures(n: int, seed: int, defect: float = 0.0, *, everywhere: bool = False) -> np.ndarray:
    """Patches (n, 6, 6, 8) that differ in six directions; a defect of one cell shows in the seventh, or in all."""
    made = np.random.default_rng(seed).normal(size=(n, SIDE, SIDE, D)) * SPREAD
    made[:, 2, 3, slice(None) if everywhere else SHOWS] += defect
    return made.astype(np.float16)


def judged(defects: np.ndarray) -> Attention:
    normal, folds = compare_normals(pictures(30, 0))
    return judge(normal, folds, Compared.of(defects, normal.bank))


def test_directions_in_which_only_defects_differ_are_found_and_count_for_more() -> None:
    found = judged(pictures(15, 1, defect=2.0))
    assert found.matrix is not None and found.matrix.shape == (D, D) and found.matrix.dtype == np.float32
    assert found.weighted > found.plain + 0.1
    gains = np.diag(found.matrix)
    assert gains.argmax() == SHOWS and gains[SHOWS] > 1.2 * np.delete(gains, SHOWS).max()
    assert "from 15 pictures of defects are used" in found.note()
    assert found.facts()["attention"]["used"] is True
    # And it finds new ones better, too.
    normal, _ = compare_normals(pictures(30, 0))
    new = Compared.of(np.concatenate([pictures(20, 5), pictures(20, 6, defect=1.5)]), normal.bank)
    odd = {name: new.maps(matrix)[:, 2, 3] for name, matrix in (("plain", None), ("weighted", found.matrix))}
    separated = {name: np.mean(values[20:, None] > values[:20]) for name, values in odd.items()}
    assert separated["weighted"] > separated["plain"]


@pytest.mark.parametrize("defects", [pictures(12, 3), pictures(12, 4, defect=20.0, everywhere=True)])
def test_weights_that_help_nothing_are_left_out_with_the_reason(defects: np.ndarray) -> None:
    """Pictures without any defect, and defects that nobody could miss."""
    found = judged(defects)
    assert found.matrix is None and found.weighted <= found.plain
    assert "12 pictures of defects are not used, as they do not help (AUROC of those left out" in found.note()
    assert found.facts()["attention"]["used"] is False


def test_weights_follow_the_defects_and_keep_the_scale_of_normal_differences() -> None:
    rng = np.random.default_rng(0)
    normal, other = (np.cov(rng.normal(size=(D, 100)) * scale) for scale in (1.0, SPREAD[:, None]))
    matrix = weights(other, normal).astype(np.float64)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-6)
    assert np.trace(matrix @ normal @ matrix) == pytest.approx(np.trace(normal), rel=1e-5)
    assert np.diag(matrix)[:6].min() > 1.5 * np.diag(matrix)[6:].max()
    np.testing.assert_allclose(weights(7 * np.eye(D), normal), np.eye(D), atol=1e-5)


def test_defects_are_found_in_a_folder_and_its_folders(tmp_path: Path) -> None:
    for name in ("a.png", "scratch/b.png", "good/c.png", "scratch/note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(images.encode_png(np.zeros((32, 32, 3), np.uint8)))
    assert [(file.path.name, file.label) for file in defects_in(tmp_path)] == [
        ("a.png", tmp_path.name),
        ("b.png", "scratch"),
    ]


def test_folders_that_cannot_be_learned_from_are_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    with pytest.raises(DataError, match="no pictures of defects"):
        check_defects(tmp_path, ["memory_bank"])
    with pytest.raises(DataError, match="There is no folder"):
        check_defects(tmp_path / "absent", ["memory_bank"])
    with pytest.raises(BadParameter, match="--defects is for memory_bank"):
        check_defects(tmp_path, ["mahalanobis"])
    check_defects(None, ["mahalanobis"])
