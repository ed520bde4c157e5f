"""Folders of pictures -> what to fit on and what to test on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ood_runners.errors import DataError
from ood_runners.images import SUFFIXES

GOOD = "good"
MASK_SUFFIX = "_mask"


@dataclass(frozen=True)
class PictureFile:
    """A picture, what its folder calls it, and the mask of its defect where there is one."""

    path: Path
    label: str
    mask: Path | None = None


@dataclass(frozen=True)
class Dataset:
    """A folder's pictures.

    Attributes
    ----------
    layout : "mvtec" (train/good, test/*, ground_truth/*), "classes" (train/<class>/*) or "folder"
    train : normal pictures
    test : pictures to evaluate on; in the mvtec layout every label but ``good`` is a defect
    classes : the class folders' names, sorted; empty in the other layouts
    """

    root: Path
    layout: str
    train: list[PictureFile]
    test: list[PictureFile] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)


def discover(folder: Path) -> Dataset:
    """Read a folder's layout; no picture is opened.

    Raises
    ------
    DataError
        The path does not exist, is no folder, cannot be read, or holds no pictures where it should.
    """
    folder = Path(folder)
    if not folder.exists():
        raise DataError(f"There is no folder {folder}; check the path.")
    if not folder.is_dir():
        raise DataError(f"{folder} is a file; give the folder that holds the pictures.")
    try:
        return _discover(folder)
    except PermissionError as error:
        raise DataError(f"{error.filename or folder} may not be read; check its permissions.") from error


def defects_in(folder: Path) -> list[PictureFile]:
    """The pictures of a folder and of the folders in it, labelled by their folder; one named ``good`` is passed over.

    Raises
    ------
    DataError
        There is no such folder, it may not be read, or it holds no pictures.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder} with pictures of defects; check the path.")
    try:
        found = [file for sub in [folder, *_folders(folder)] if sub.name != GOOD for file in _labelled(sub, sub.name)]
    except PermissionError as error:
        raise DataError(f"{error.filename or folder} may not be read; check its permissions.") from error
    if not found:
        raise DataError(f"There are no pictures of defects in {folder} or its folders; check the path.")
    return found


def _discover(folder: Path) -> Dataset:
    train = folder / "train"
    if (train / GOOD).is_dir():
        found = Dataset(folder, "mvtec", _labelled(train / GOOD, GOOD), list(_mvtec_tests(folder)))
        where = train / GOOD
    elif train.is_dir() and (classes := [sub.name for sub in _folders(train)]):
        test = folder / "test"
        found = Dataset(
            folder,
            "classes",
            [file for name in classes for file in _labelled(train / name, name)],
            [file for sub in (_folders(test) if test.is_dir() else []) for file in _labelled(sub, sub.name)],
            classes,
        )
        where = train
        if len(classes) == 1:
            found = Dataset(folder, "folder", found.train)
    else:
        where = train if train.is_dir() else folder
        found = Dataset(folder, "folder", _labelled(where, GOOD))
    if not found.train:
        raise DataError(_nothing_in(where))
    empty = [name for name in found.classes if not any(file.label == name for file in found.train)]
    if empty:
        raise DataError(f"The class folder {train / empty[0]} holds no pictures; remove it or add pictures.")
    return found


def _nothing_in(folder: Path) -> str:
    subfolders = [sub.name for sub in _folders(folder)]
    if subfolders and folder.name != "train":
        return (
            f"{folder} holds no pictures itself, only folders ({', '.join(subfolders[:5])}); give the folder of normal "
            "pictures, or arrange classes as train/<class>/."
        )
    return f"There are no pictures in {folder} (looked for {', '.join(sorted(SUFFIXES))})."


def _mvtec_tests(folder: Path) -> Iterator[PictureFile]:
    test = folder / "test"
    for sub in _folders(test) if test.is_dir() else []:
        masks = folder / "ground_truth" / sub.name
        by_stem = {mask.stem.removesuffix(MASK_SUFFIX): mask for mask in _pictures(masks)} if masks.is_dir() else {}
        for path in _pictures(sub):
            yield PictureFile(path, sub.name, by_stem.get(path.stem))


def _labelled(folder: Path, label: str) -> list[PictureFile]:
    return [PictureFile(path, label) for path in _pictures(folder)]


def _pictures(folder: Path) -> list[Path]:
    return sorted(
        p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file()
    )


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
