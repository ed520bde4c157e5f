from __future__ import annotations

from pathlib import Path

import pytest

from ood_runners.errors import DataError
from ood_runners.training.datasets import discover


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def test_a_plain_folder(tmp_path):
    touch(tmp_path, "b.PNG", "a.jpg", ".hidden.png", "notes.txt")
    found = discover(tmp_path)
    assert (found.layout, found.classes, found.test) == ("folder", [], [])
    assert [file.path.name for file in found.train] == ["a.jpg", "b.PNG"]


def test_mvtec_layout_pairs_each_defect_with_its_mask(tmp_path):
    touch(tmp_path, "train/good/0.png", "test/good/0.png", "test/scratch/000.png", "test/scratch/001.png")
    touch(tmp_path, "ground_truth/scratch/000_mask.png")
    found = discover(tmp_path)
    assert found.layout == "mvtec"
    assert [(f.label, f.path.name, f.mask and f.mask.name) for f in found.test] == [
        ("good", "0.png", None),
        ("scratch", "000.png", "000_mask.png"),
        ("scratch", "001.png", None),
    ]


def test_class_folders(tmp_path):
    touch(tmp_path, "train/cat/0.png", "train/dog/0.png", "test/dog/1.png")
    found = discover(tmp_path)
    assert (found.layout, found.classes) == ("classes", ["cat", "dog"])
    assert [file.label for file in found.train] == ["cat", "dog"] and [file.label for file in found.test] == ["dog"]


def test_one_class_folder_is_a_plain_folder(tmp_path):
    touch(tmp_path, "train/ok/0.png")
    assert discover(tmp_path).layout == "folder"


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ((), "There are no pictures in"),
        (("a/0.png", "b/0.png"), r"only folders \(a, b\)"),
        (("train/good/readme.txt",), "There are no pictures in"),
        (("train/cat/0.png", "train/dog/x.txt"), "class folder .*dog holds no pictures"),
    ],
)
def test_folders_without_pictures(tmp_path, names, sentence):
    touch(tmp_path, *names)
    with pytest.raises(DataError, match=sentence):
        discover(tmp_path)


def test_paths_that_are_no_folder(tmp_path):
    with pytest.raises(DataError, match="There is no folder"):
        discover(tmp_path / "absent")
    touch(tmp_path, "a.png")
    with pytest.raises(DataError, match="is a file"):
        discover(tmp_path / "a.png")
