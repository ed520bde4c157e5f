"""Files: hashed, listed without links, flushed to disk, replaced in one step; the disk's errors as sentences."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from ood_runners.errors import ArtifactError, OODError

# A file changed less than this ago may change again within one tick of the file system's clock.
SETTLED_SECONDS = 2.0
NEARLY_FULL = 2**16
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def sha256(path: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@lru_cache(maxsize=256)
def _remembered(path: Path, inode: int, size: int, mtime_ns: int) -> str:
    return sha256(path)


def sha256_once(path: Path) -> str:
    """`sha256`, remembered in this process while the file's stamp stays: for the backbone that many products share."""
    status = path.stat()
    if time.time() - status.st_mtime < SETTLED_SECONDS:
        return sha256(path)
    return _remembered(path, status.st_ino, status.st_size, status.st_mtime_ns)


def list_files(folder: Path) -> list[str]:
    """Names of all files under `folder`, relative, with ``/``, in order.

    Raises
    ------
    ArtifactError
        There is a symbolic link or something that is neither file nor folder.
    """
    names: list[str] = []
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise ArtifactError(f"{path} is a link or a special file, which no stored version holds; remove it.")
            if stat.S_ISREG(mode):
                names.append(path.relative_to(folder).as_posix())
    return sorted(names)


def flush_folder(folder: Path) -> None:
    """Ask the disk to keep the folder's own entries."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_tree(folder: Path) -> None:
    """Ask the disk to keep every file and folder under `folder`."""
    for parent, _, files in os.walk(folder):
        for name in files:
            with Path(parent, name).open("rb") as stream:
                os.fsync(stream.fileno())
        flush_folder(Path(parent))


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` in one step: a reader meets the old text or the new, never a part."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fchmod(stream.fileno(), 0o644)
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    flush_folder(path.parent)


def _sentence(error: OSError, folder: Path, doing: str) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk is full: could not {doing} in {folder}; free some space there and try again."
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return (
            f"{folder} cannot be written ({os.strerror(error.errno)}): could not {doing}; use a place that can be "
            "written (BENTOML_HOME names the store's)."
        )
    return f"Could not {doing} in {folder}: {error}."


@contextmanager
def explained(folder: Path, doing: str, *, disk_only: bool = False) -> Iterator[None]:
    """Turn the disk's errors within the block into one sentence.

    Libraries report a full disk in their own ways (safetensors, faiss and OpenVINO each raise another class), so
    any error on a file system without room left counts as one. With `disk_only`, for blocks that run others' code,
    only a full or read-only disk is explained and every other error passes.

    Raises
    ------
    ArtifactError
        Naming `folder`, what was being done, and what to do about it.
    """
    try:
        yield
    except OODError:
        raise
    except OSError as error:
        if disk_only and error.errno not in DISK_ERRORS:
            raise
        raise ArtifactError(_sentence(error, folder, doing)) from error
    except Exception as error:
        code = re.search(r"os error (\d+)", str(error))
        if code:
            raise ArtifactError(_sentence(OSError(int(code[1]), str(error)), folder, doing)) from error
        if folder.exists() and shutil.disk_usage(folder).free < NEARLY_FULL:
            raise ArtifactError(_sentence(OSError(errno.ENOSPC, ""), folder, doing)) from error
        raise
