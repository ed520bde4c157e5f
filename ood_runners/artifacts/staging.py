"""From a folder being written to a version in the store, in one step.

``bentoml.models.create`` copies file by file into the store's final folder. A process that is interrupted or killed
there leaves a part, which either looks like a version or, where ``model.yaml`` was not copied yet, makes every listing
of the store fail. So a version is
written into a folder of its own under ``<BENTOML_HOME>/ood-staging``, which BentoML never lists, and renamed into
the store when it is whole. A lock file beside each such folder tells the folders of dead processes from those of
live ones.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bentoml import Tag
from filelock import FileLock, Timeout

from ood_runners.artifacts.files import explained, flush_folder, write_atomically
from ood_runners.artifacts.names import STAGING, folder_of, home, models_folder, versions_in
from ood_runners.errors import ArtifactError


def check_writable() -> None:
    """See that versions can be written here; call it before hours of work, not after.

    Raises
    ------
    ArtifactError
        The store is read-only, or is spread over two file systems.
    """
    with staging_folder("check") as folder, explained(models_folder(), "write to the model store"):
        if folder.stat().st_dev != models_folder().stat().st_dev:
            raise ArtifactError(
                f"{models_folder()} and {home()} lie on different file systems, so that a version cannot be put in "
                "place in one step; mount BENTOML_HOME itself instead of its folder 'models'."
            )
        (models_folder() / f".{folder.name}").touch()
        (models_folder() / f".{folder.name}").unlink()


@contextmanager
def staging_folder(label: str) -> Iterator[Path]:
    """An empty folder on the store's file system that is gone at the end, whatever happens in the block."""
    root = home() / STAGING
    with explained(root, "make a temporary folder"):
        root.mkdir(exist_ok=True)
        _sweep(root)
        folder = root / f"{label}.{secrets.token_hex(6)}"
        lock = FileLock(root / f"{folder.name}.lock")
        lock.acquire()
    try:
        with explained(root, "make a temporary folder"):
            folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


def _sweep(root: Path) -> None:
    """Remove what killed processes left: folders whose lock nobody holds."""
    for folder in root.iterdir():
        if not folder.is_dir():
            continue
        lock = FileLock(root / f"{folder.name}.lock")
        try:
            with lock.acquire(blocking=False):
                shutil.rmtree(folder, ignore_errors=True)
        except (Timeout, OSError):
            continue
        Path(lock.lock_file).unlink(missing_ok=True)


def publish(folder: Path, tag: Tag) -> bool:
    """Move a finished folder into the store in one step; False if the store holds that version already."""
    target = folder_of(tag)
    for _ in range(10):
        target.parent.mkdir(exist_ok=True)
        try:
            os.rename(folder, target)
        except FileNotFoundError:  # the last other version was deleted just now, and its folder with it
            continue
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return False
            raise
        flush_folder(target.parent)
        _point_latest(tag)
        return True
    raise ArtifactError(f"{target.parent} keeps vanishing; another process deletes versions there: try again.")


def discard(tag: Tag) -> None:
    """Take a version out of the store in one step, then remove its files."""
    target = folder_of(tag)
    with staging_folder("discard") as folder:
        try:
            os.rename(target, folder / "version")
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            shutil.rmtree(target)  # a container's lower layer: folders there cannot be renamed
    latest = target.parent / "latest"
    left = versions_in(tag.name)
    with suppress(OSError):
        if not left or latest.read_text().strip() == tag.version:
            latest.unlink()  # BentoML finds the newest again when it is asked
    if not left:
        with suppress(OSError):  # not empty: another process has just written a version
            target.parent.rmdir()


def _point_latest(tag: Tag) -> None:
    """Keep BentoML's own `latest` true for its command line; nothing here reads it."""
    latest = models_folder() / tag.latest_path()
    try:
        with suppress(FileNotFoundError):
            if latest.read_text().strip() > str(tag.version):
                return
        write_atomically(latest, str(tag.version))
    except OSError:
        with suppress(OSError):
            latest.unlink()
