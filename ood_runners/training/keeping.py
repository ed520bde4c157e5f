"""What one fit computes and a later one may use: arrays under a hash of all that they depend on, in ``BENTOML_HOME``.

It may be lost at any time and is then made again. A disk that has no room for it is no failure of the fit.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ood_runners import __version__
from ood_runners.artifacts.files import flush_tree
from ood_runners.artifacts.names import CACHE, home
from ood_runners.artifacts.staging import staging_folder
from ood_runners.artifacts.store import installed_packages
from ood_runners.errors import OODError

FOLDER = f"{CACHE}/features"
ENTRY_BYTES, ALL_BYTES = 2 * 2**30, 4 * 2**30  # what is larger is not kept; what was used longest ago goes first
_RECORD = "prepared.json"
_PACKAGES = ("numpy", "openvino", "torch")


@dataclass(frozen=True)
class Kept:
    """Arrays, memory-mapped, what else is to be known of them, and the folder in which they and other files lie."""

    arrays: dict[str, NDArray[Any]]
    record: dict[str, Any]
    folder: Path


def entry_of(*parameters: Any) -> Path:
    """The folder of what depends on these (JSON values), this release and the packages that compute."""
    packages = {name: installed_packages().get(name) for name in _PACKAGES}
    key = json.dumps([__version__, packages, *parameters])
    return home() / FOLDER / hashlib.sha256(key.encode()).hexdigest()[:32]


def find(entry: Path) -> Kept | None:
    """What was kept there, if it is there and whole."""
    with suppress(OSError, ValueError, KeyError):
        stored = json.loads((entry / _RECORD).read_text(encoding="utf-8"))
        arrays = {name: np.load(entry / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in stored["arrays"]}
        os.utime(entry)
        return Kept(arrays, stored["record"], entry)
    return None


def keep(
    entry: Path, arrays: Mapping[str, NDArray[Any]], record: Mapping[str, Any] | None = None, files: Sequence[Path] = ()
) -> None:
    """Write arrays, JSON values and copies of files; what is too large, or finds no room, is not kept."""
    if sum(array.nbytes for array in arrays.values()) > ENTRY_BYTES:
        return
    with suppress(OSError, OODError), staging_folder("features") as folder:
        kept = folder / "entry"
        kept.mkdir()
        for name, array in arrays.items():
            np.save(kept / f"{name}.npy", array, allow_pickle=False)
        for file in files:
            shutil.copyfile(file, kept / file.name)
        stored = {"arrays": list(arrays), "record": dict(record or {})}
        (kept / _RECORD).write_text(json.dumps(stored), encoding="utf-8")
        flush_tree(kept)
        entry.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(entry, ignore_errors=True)  # one that could not be read
        os.rename(kept, entry)
        _make_room(entry.parent)


def _make_room(folder: Path) -> None:
    entries = sorted(folder.iterdir(), key=lambda one: one.stat().st_mtime, reverse=True)
    total = 0
    for entry in entries:
        total += sum(file.stat().st_size for file in entry.iterdir())
        if total > ALL_BYTES:
            shutil.rmtree(entry, ignore_errors=True)
