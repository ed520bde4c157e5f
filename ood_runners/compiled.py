"""Compiled networks kept on disk: opening one takes a third of the time that compiling takes.

What is kept may be lost or damaged at any time, and is then compiled again. It holds for one release of OpenVINO on one
kind of processor, which are part of its name, and is read only if it is what was written.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import openvino as ov

SUFFIX = ".network"
ALL_BYTES = 2**30  # in one folder; what was used longest ago goes first
_DIGEST = hashlib.sha256().digest_size


def file_of(folder: Path, parts: Iterable[bytes]) -> Path:
    """The file in `folder` of the network that these bytes determine, on this machine."""
    import openvino as ov

    core = ov.Core()
    machine = [core.get_property("CPU", name) for name in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")]
    digest = hashlib.sha256(repr([ov.get_version(), *machine]).encode())
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return folder / f"{digest.hexdigest()[:32]}{SUFFIX}"


def read(path: Path, config: dict[str, Any]) -> ov.CompiledModel | None:
    """What was kept there, if it is there and whole."""
    import openvino as ov

    with suppress(OSError, RuntimeError, ValueError):
        data = np.fromfile(path, np.uint8)
        stored, digest = data[:-_DIGEST], data[-_DIGEST:]
        if hashlib.sha256(stored.data).digest() == digest.tobytes():
            network = ov.Core().import_model(ov.Tensor(stored), "CPU", config)
            os.utime(path)
            return network
    return None


def write(path: Path, network: ov.CompiledModel) -> None:
    """Keep a network there in one step; a folder that cannot be written, or a full disk, is no failure."""
    with suppress(OSError):
        stored = network.export_model().getvalue()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            try:
                file.write(stored)
                file.write(hashlib.sha256(stored).digest())
                file.close()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
        _make_room(path.parent)


def _make_room(folder: Path) -> None:
    total = 0
    for file in sorted(folder.iterdir(), key=lambda one: one.stat().st_mtime, reverse=True):
        total += file.stat().st_size
        if total > ALL_BYTES:
            file.unlink(missing_ok=True)
