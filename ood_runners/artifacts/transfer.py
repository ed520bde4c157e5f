"""One file that carries a version, with the backbones it needs, from one store to another.

A plain tar: ``index.json`` first (the tags, and each file's size), then ``product/…``, ``backbone/…`` and, for a
version with members on other networks, ``backbone-1/…`` and so on. It is
not compressed, since weights hardly shrink, and so it cannot swell either. `pack` and `unpack` work on streams, so
that other places than a local file can be read and written the same way.
"""

from __future__ import annotations

import io
import os
import secrets
import shutil
import tarfile
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

from bentoml import Tag
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ood_runners.artifacts.files import explained, flush_tree, list_files
from ood_runners.artifacts.manifest import BackboneManifest, BackboneTag, FileName, Manifest
from ood_runners.artifacts.names import home, parse, product_tag
from ood_runners.artifacts.staging import staging_folder
from ood_runners.artifacts.store import Stored, place, read_version
from ood_runners.artifacts.verify import verify_folder
from ood_runners.errors import ArtifactError, BadParameter, NotFound

INDEX = "index.json"
MAX_INDEX_BYTES = 16 * 2**20
MAX_BYTES = 32 * 2**30


class _Index(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    product: str
    backbone: BackboneTag
    others: list[BackboneTag] = []
    files: dict[FileName, Annotated[int, Field(ge=0)]]

    @property
    def backbones(self) -> dict[str, str]:
        """Folder in the archive to the tag of the backbone that lies there."""
        return {"backbone": self.backbone} | {f"backbone-{i}": tag for i, tag in enumerate(self.others, start=1)}


def export_version(product: str | Tag, file: Path) -> Path:
    """Write a verified version (without a version, the one in production) and its backbones to `file`; its full path.

    An existing file is replaced, in one step.

    Raises
    ------
    BadParameter
        `file` is a folder, or lies in a folder that does not exist.
    NotFound, ArtifactError
        There is no such version, it is not sound, or the disk is full.
    """
    target = Path(file).expanduser().resolve()
    if target.is_dir() or not target.parent.is_dir():
        raise BadParameter(f"{target} is no place for a file: name a file in a folder that exists.")
    stored = read_version(product)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    with explained(target.parent, f"write {target.name}"):
        try:
            with temporary.open("xb") as stream:
                pack(stored, stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    return target


def import_version(file: Path) -> Tag:
    """Put a version that `export_version` wrote into the store, after checking every byte; its tag.

    A version that the store holds already is left as it is, and a damaged copy of it is replaced.

    Raises
    ------
    NotFound
        There is no such file.
    ArtifactError
        It is damaged, foreign, or of other content than the version of that name in the store.
    """
    source = Path(file).expanduser().resolve()
    if not source.is_file():
        raise NotFound(f"There is no file {source}; `export` writes one.")
    try:
        with source.open("rb") as stream:
            return unpack(stream, source.name)
    except PermissionError as error:
        raise ArtifactError(f"{source} cannot be read ({error.strerror}).") from error


def pack(stored: Stored, stream: BinaryIO) -> None:
    """Write a version and its backbones to a stream; equal versions give equal bytes."""
    first, *others = (entry.tag for entry in stored.manifest.backbones)
    index = _Index(product=str(stored.tag), backbone=first, others=others, files={})
    roots = {"product": stored.path} | {root: stored.backbone_paths[tag] for root, tag in index.backbones.items()}
    members = {f"{root}/{name}": path / name for root, path in roots.items() for name in list_files(path)}
    sizes = {name: path.stat().st_size for name, path in members.items()}
    index = index.model_copy(update={"files": sizes})
    text = index.model_dump_json(indent=1).encode()
    with tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(_member(INDEX, len(text)), io.BytesIO(text))
        for name, path in members.items():
            with path.open("rb") as content:
                tar.addfile(_member(name, sizes[name]), content)


def unpack(stream: BinaryIO, name: str) -> Tag:
    """Read what `pack` wrote, check it and put it into the store; `name` is what messages call the stream."""
    with staging_folder("import") as stage, explained(home(), f"import {name}"):
        try:
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                index = _read_index(tar, name)
                _extract(tar, index, stage, name)
        except (tarfile.TarError, EOFError) as error:
            raise ArtifactError(f"{name} is damaged, or no file that `export` wrote ({error}).") from error
        tag = product_tag(*parse(index.product))
        backbones = {root: Tag.from_str(backbone) for root, backbone in index.backbones.items()}
        found = {
            str(backbone): verify_folder(stage / root, backbone, BackboneManifest).sha256
            for root, backbone in backbones.items()
        }
        manifest = verify_folder(stage / "product", tag, Manifest)
        if {entry.tag: entry.sha256 for entry in manifest.backbones} != found:
            raise ArtifactError(f"{name} carries another backbone than {tag} was fitted on; export it again.")
        flush_tree(stage)
        for root, backbone in backbones.items():
            place(stage / root, backbone, BackboneManifest)
        place(stage / "product", tag, Manifest)
    return tag


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = size
    member.mode = 0o644
    return member


def _plain_file(member: tarfile.TarInfo) -> bool:
    return member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()


def _read_index(tar: tarfile.TarFile, name: str) -> _Index:
    member = tar.next()
    if member is None or member.name != INDEX or not _plain_file(member) or member.size > MAX_INDEX_BYTES:
        raise ArtifactError(f"{name} is no file that `export` wrote: it does not begin with an index.")
    content = tar.extractfile(member)
    try:
        index = _Index.model_validate_json(content.read() if content else b"")
        complete = parse(index.product)[1] is not None
    except (ValidationError, BadParameter):
        complete = False
    if not complete:
        raise ArtifactError(
            f"{name} has an index that this release does not read: it is damaged, or a later release wrote it."
        )
    if sum(index.files.values()) > MAX_BYTES:
        raise ArtifactError(f"{name} says that it holds more than {MAX_BYTES // 2**30} GiB; no version is that large.")
    return index


def _extract(tar: tarfile.TarFile, index: _Index, stage: Path, name: str) -> None:
    """Write exactly the index's members below `stage`; nothing else in the archive is ever written."""
    left = dict(index.files)
    roots = {"product", *index.backbones}
    while (member := tar.next()) is not None:
        size = left.pop(member.name, None)
        root = member.name.partition("/")[0]
        if size is None or member.size != size or not _plain_file(member) or root not in roots:
            raise ArtifactError(f"{name} holds {member.name[:80]!r}, which its index does not allow; it is refused.")
        content = tar.extractfile(member)
        path = stage / member.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as target:
            if content is not None:
                shutil.copyfileobj(content, target, 2**20)
    if left:
        raise ArtifactError(f"{name} ends before {min(left)!r}: it was cut off; copy or export it again.")
