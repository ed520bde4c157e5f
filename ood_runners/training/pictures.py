"""Read a training folder: pictures at the input size, what was skipped, and the data's fingerprint."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ood_runners import images
from ood_runners.errors import DataError, OODError
from ood_runners.training.datasets import Dataset, PictureFile
from ood_runners.training.progress import Progress

MIN_PICTURES = 8  # fewer leave nothing to calibrate on: the smallest false-alarm rate would be 1 in 9
TOLD = 3  # skipped files that an error names

_Loaded = tuple[str, NDArray[np.uint8] | OODError]


@dataclass(frozen=True)
class TrainingPictures:
    """Readable training pictures, uint8 (n, h, w, 3), memory-mapped in a scratch folder.

    `skipped` are (path, reason); `fingerprint` is a SHA-256 over every file's own, by path, read or not.
    """

    pictures: NDArray[np.uint8]
    files: Sequence[PictureFile]
    skipped: Sequence[tuple[str, str]]
    fingerprint: str

    def labels(self, classes: Sequence[str]) -> NDArray[np.int64] | None:
        """Class index of each picture, int64 (n,), where there are classes."""
        return np.array([classes.index(file.label) for file in self.files], np.int64) if classes else None


def read_training(dataset: Dataset, size: tuple[int, int], scratch: Path, progress: Progress) -> TrainingPictures:
    """Decode and resize every training picture; those that cannot be read are listed, not fatal.

    Raises
    ------
    DataError
        Fewer than 8 pictures could be read.
    """
    files = dataset.train
    if not files:
        raise _too_few(0, [], dataset.root)
    pictures = np.lib.format.open_memmap(
        scratch / "pictures.npy", mode="w+", dtype=np.uint8, shape=(len(files), *size, 3)
    )
    kept: list[PictureFile] = []
    skipped: list[tuple[str, str]] = []
    digest = hashlib.sha256()

    def load(file: PictureFile) -> _Loaded:
        try:
            picture = images.resize(images.read(file.path), size)
        except OODError as error:
            return _hash(file.path), error
        return _hash(file.path), picture

    with progress.stage("pictures", total=len(files)) as stage, ThreadPoolExecutor(os.cpu_count()) as pool:
        for file, (checksum, loaded) in zip(files, _in_order(pool, load, files), strict=True):
            name = file.path.relative_to(dataset.root).as_posix()
            digest.update(f"{name}\0{checksum}\n".encode())
            if isinstance(loaded, OODError):
                skipped.append((name, loaded.message.removeprefix(f"{file.path}: ")))
            else:
                pictures[len(kept)] = loaded
                kept.append(file)
            stage.advance()
    if len(kept) < MIN_PICTURES:
        raise _too_few(len(kept), skipped, dataset.root)
    return TrainingPictures(pictures[: len(kept)], kept, skipped, digest.hexdigest())


def _in_order(
    pool: ThreadPoolExecutor, load: Callable[[PictureFile], _Loaded], files: Sequence[PictureFile]
) -> Iterator[_Loaded]:
    """Results in order, with a bounded number of decoded pictures waiting."""
    for start in range(0, len(files), 64):
        yield from pool.map(load, files[start : start + 64])


def _hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"unreadable: {error.strerror}"


def _too_few(readable: int, skipped: Sequence[tuple[str, str]], root: Path) -> DataError:
    count = "one picture" if readable == 1 else f"{readable} pictures"
    of = f" of {readable + len(skipped)}" if skipped else ""
    said = [f"{name}: {reason.removesuffix('.')}" for name, reason in skipped[:TOLD]]
    said += [f"and {len(skipped) - TOLD} more"] if len(skipped) > TOLD else []
    return DataError(
        f"Only {count}{of} in {root} can be fitted on; at least {MIN_PICTURES} normal pictures are needed, and "
        f"99 for a false-alarm rate of 1 %.{' Skipped: ' if said else ''}{'; '.join(said)}"
    )
