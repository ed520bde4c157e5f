"""Versions in a folder or an object store (S3 and the like), from which other machines take them.

A version lies there as two objects, ``<place>/<product>/<version>.oodmodel`` (what `export` writes) and
``….oodmodel.sha256`` beside it. The second is written last, when the first is there whole: without it a version is
not seen by anybody. Access goes through fsspec, so that credentials come from where each kind of place has them
(for S3 from AWS's own variables and files); none is read, kept or shown here.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

import fsspec
from bentoml import Tag
from fsspec.implementations.local import LocalFileSystem

from ood_runners.artifacts.files import DISK_ERRORS, explained, sha256
from ood_runners.artifacts.names import check_product, parse
from ood_runners.artifacts.staging import staging_folder
from ood_runners.artifacts.store import read_version
from ood_runners.artifacts.transfer import export_version, import_version
from ood_runners.errors import ArtifactError, BadParameter, NotFound, OODError

SUFFIX = ".oodmodel"
SUM_SUFFIX = ".sha256"
_SUM = re.compile(r"([0-9a-f]{64})  \S+\n?")
_USER = re.compile(r"(?<=://)[^/@\s]*@")


def push_version(product: str | Tag, place: str) -> str:
    """Put a verified version (without a version, the one in production) and its backbone there; its address.

    What is there already is left as it is; nobody sees a version before it is whole.

    Raises
    ------
    BadParameter
        `place` is no address that can be used.
    NotFound, ArtifactError
        There is no such version, it is not sound, the place holds other content under its name, or cannot be reached.
    """
    remote = Remote.open(place)
    stored = read_version(product)
    name = f"{stored.product}/{stored.version}{SUFFIX}"
    with staging_folder("push") as stage:
        file = export_version(stored.tag, stage / "version")
        digest = sha256(file)
        there = remote.sum_of(name)
        if there is not None and remote.digest(name) == there:
            if there != digest:
                # Whole, and yet of other bytes: refused, unless only the backbone was exported on another day.
                import_version(remote.fetch(name, stage / "there"))
            return f"{remote.shown}/{name}"
        with file.open("rb") as stream:
            remote.write(name, stream)
        if remote.digest(name) != digest:
            raise ArtifactError(f"{remote.shown}/{name} did not arrive as it was sent; push it again.")
        remote.write(name + SUM_SUFFIX, io.BytesIO(f"{digest}  {stored.version}{SUFFIX}\n".encode()))
    return f"{remote.shown}/{name}"


def pull_version(product: str, place: str) -> Tag:
    """Bring a version (without a version, the newest that is there) into this machine's store; its tag.

    Every byte is checked against the checksum beside it and against the version's own manifest. A version that the
    store holds already is left as it is.

    Raises
    ------
    BadParameter
        `product` or `place` cannot be used.
    NotFound
        There is no such version; the message names those that are there.
    ArtifactError
        It is damaged, or the place cannot be reached.
    """
    remote = Remote.open(place)
    name, version = parse(product)
    found = remote.versions(name)
    if not found:
        raise NotFound(f"There is no version of {name!r} in {remote.shown}; `push {name} …` puts one there.")
    if version is not None and version not in found:
        raise NotFound(f"There is no version {version!r} of {name!r} in {remote.shown}; it has: {', '.join(found)}.")
    path = f"{name}/{version or found[-1]}{SUFFIX}"
    with staging_folder("pull") as stage:
        file = remote.fetch(path, stage / f"{version or found[-1]}{SUFFIX}")
        if sha256(file) != remote.sum_of(path):
            raise ArtifactError(f"{remote.shown}/{path} does not match its checksum, so it is damaged; push it again.")
        tag = import_version(file)
    if parse(tag) != (name, version or found[-1]):
        raise ArtifactError(f"{remote.shown}/{path} holds {tag}; a version cannot be copied under another name.")
    return tag


@dataclass(frozen=True)
class Remote:
    """A place for versions; `shown` is its address without a password."""

    filesystem: Any
    root: str
    shown: str

    @classmethod
    def open(cls, place: str) -> Remote:
        """The place of an address: a folder, or a URL such as ``s3://bucket/models``.

        Raises
        ------
        BadParameter
            It is none, or of a kind that needs a package that is not here.
        """
        shown = _USER.sub("", place.rstrip("/")) or "/"
        kind = urlsplit(place).scheme if "://" in place else "file"
        if not place or "::" in place or kind in ("http", "https", "memory"):
            raise BadParameter(
                f"{shown!r} is no place for versions: name a folder, or a URL such as s3://bucket/models."
            )
        try:
            filesystem, root = fsspec.url_to_fs(place, skip_instance_cache=True)
        except (ImportError, ValueError) as error:
            package = "'ood-runners[s3]'" if kind in ("s3", "s3a") else f"the package of fsspec for {kind}"
            raise BadParameter(f"{shown} cannot be opened here; for {kind}:// install {package} with pip.") from error
        if isinstance(filesystem, LocalFileSystem) and not Path(root).is_dir():
            raise BadParameter(f"{shown} is no folder that exists; make it first, or mount what belongs there.")
        return cls(filesystem, root.rstrip("/"), shown)

    def versions(self, product: str) -> list[str]:
        """The versions of a product that are there whole, oldest name first."""
        folder = f"{self.root}/{check_product(product)}"
        with _explained(self.shown, "listed"):
            self.filesystem.invalidate_cache()
            try:
                names = [path.rpartition("/")[2] for path in self.filesystem.ls(folder, detail=False)]
            except FileNotFoundError:
                return []
        ending = SUFFIX + SUM_SUFFIX
        whole = {name.removesuffix(ending) for name in names if name.endswith(ending)}
        return sorted(version for version in whole if version + SUFFIX in names)

    def sum_of(self, name: str) -> str | None:
        """The checksum that lies beside a version; None if there is none, so that the version is not there."""
        with _explained(self.shown, "read"):
            self.filesystem.invalidate_cache()
            try:
                text = self.filesystem.cat_file(f"{self.root}/{name}{SUM_SUFFIX}").decode("utf-8", "replace")
            except FileNotFoundError:
                return None
        found = _SUM.fullmatch(text)
        if found is None:
            raise ArtifactError(f"{self.shown}/{name}{SUM_SUFFIX} is no checksum; remove it and push again.")
        return found[1]

    def digest(self, name: str) -> str:
        """The SHA-256 of what lies there, read back."""
        with _explained(self.shown, "read"), self.filesystem.open(f"{self.root}/{name}", "rb") as stream:
            return hashlib.file_digest(cast(Any, stream), "sha256").hexdigest()

    def fetch(self, name: str, file: Path) -> Path:
        """Copy an object to `file`, and return that."""
        with (
            explained(file.parent, f"fetch {name}", disk_only=True),
            file.open("xb") as target,
            _explained(self.shown, "read"),
            self.filesystem.open(f"{self.root}/{name}", "rb") as source,
        ):
            shutil.copyfileobj(source, target, 2**22)
        return file

    def write(self, name: str, source: BinaryIO) -> None:
        """Make an object of `source`, in one step: it is there whole, or as it was before."""
        path = f"{self.root}/{name}"
        with _explained(self.shown, "written"):
            if isinstance(self.filesystem, LocalFileSystem):
                # fsspec's own transaction would copy from another file system, where a reader can meet a part.
                _write_file(Path(path), source)
                return
            with self.filesystem.transaction, self.filesystem.open(path, "wb") as target:
                shutil.copyfileobj(source, target, 2**22)


def _write_file(target: Path, source: BinaryIO) -> None:
    target.parent.mkdir(exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("xb") as stream:
            shutil.copyfileobj(source, stream, 2**22)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _explained(place: str, doing: str) -> Iterator[None]:
    """Turn what a place answers into one sentence; what it says in its own words may hold credentials."""
    try:
        yield
    except OODError:
        raise
    except FileNotFoundError:
        raise NotFound(f"{place} could not be {doing}: there is no such place or object.") from None
    except Exception as error:
        if isinstance(error, PermissionError) or "Credential" in type(error).__name__:
            raise ArtifactError(f"{place} could not be {doing}: access is denied; see to the credentials.") from None
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise ArtifactError(f"{place} could not be {doing} ({os.strerror(error.errno)}).") from None
        raise ArtifactError(
            f"{place} could not be {doing} ({type(error).__name__}); see to the address and the network."
        ) from None
