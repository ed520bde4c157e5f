"""Write a version so that it is seen whole or not at all; read one after checking every byte of it."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from bentoml import Tag
from bentoml._internal.models.model import ModelContext, ModelInfo
from filelock import FileLock
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ood_runners.artifacts.catalogue import resolve
from ood_runners.artifacts.files import explained, flush_tree, list_files, sha256
from ood_runners.artifacts.manifest import MEMBERS, WAYS_ON, BackboneManifest, Manifest
from ood_runners.artifacts.names import BACKBONE_PREFIX, RECORDS, folder_of, home, new_version, product_tag, versions_in
from ood_runners.artifacts.staging import discard, publish, staging_folder
from ood_runners.artifacts.verify import (
    MANIFEST,
    MANIFEST_SUM,
    MODEL_YAML,
    OWN_FILES,
    AnyManifest,
    content_version,
    manifest_sum,
    open_backbone,
    read_manifest,
    verify_folder,
)
from ood_runners.errors import ArtifactError

RECORDED_PACKAGES = ("bentoml", "faiss-cpu", "numpy", "openvino", "safetensors", "scikit-learn", "torch", "torchvision")
ARRAYS_SUFFIX = ".safetensors"
PART = "#"  # between a version's tag and the name of a member


class BackboneLike(Protocol):
    """What the store needs to know of an exported backbone."""

    @property
    def name(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    @property
    def origin(self) -> str: ...


@dataclass(frozen=True)
class Stored:
    """A version in the store, or one of its members: where it lies, what it says of itself, its backbones' folders.

    `part` is the tag that the runners know it by: the version's, with ``#member`` for a member.
    """

    path: Path
    tag: Tag
    manifest: Manifest
    backbone_paths: Mapping[str, Path]  # by tag
    part: str = ""

    @property
    def backbone_path(self) -> Path:
        return self.backbone_paths[self.manifest.backbone.tag]

    def member(self, name: str) -> Stored:
        """One of the version's members, to be opened like a version; ArtifactError where there is none."""
        if name not in self.manifest.members:
            raise ArtifactError(f"{self.tag} has no member {name!r}; {WAYS_ON}.")
        manifest, path = self.manifest.member(name), self.path / MEMBERS / name
        return Stored(path, self.tag, manifest, self.backbone_paths, f"{self.tag}{PART}{name}")

    @property
    def product(self) -> str:
        return self.manifest.product

    @property
    def version(self) -> str:
        return str(self.tag.version)

    def arrays(self, name: str) -> dict[str, NDArray[Any]]:
        """The arrays that were saved under `name`.

        Raises
        ------
        ArtifactError
            The version has none of that name, or the file cannot be read.
        """
        file = name + ARRAYS_SUFFIX
        if file not in self.manifest.files:
            raise ArtifactError(f"{self.tag} holds no {file}; {WAYS_ON}.")
        try:
            return dict(load_file(self.path / file))
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{self.tag}: {file} cannot be read ({error}); {WAYS_ON}.") from error


def save_arrays(folder: Path, name: str, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays of numbers to ``<name>.safetensors`` in `folder`, for `Stored.arrays` to read.

    Raises
    ------
    TypeError
        An array holds something else than numbers.
    """
    for key, array in arrays.items():
        if np.asarray(array).dtype.kind not in "biuf":
            raise TypeError(f"{name}: {key!r} has dtype {np.asarray(array).dtype}, only numbers are stored")
    # safetensors writes the memory behind an array as it lies: a transposed view would come back wrong.
    save_file({key: np.asarray(array, order="C") for key, array in arrays.items()}, folder / (name + ARRAYS_SUFFIX))


class VersionWriter:
    """A version being written. Write files below `path`, then `commit`; without it nothing is left behind."""

    def __init__(self, path: Path, tag: Tag) -> None:
        self.path = path
        self.tag = tag
        self.committed = False

    def commit(self, manifest: Manifest) -> Tag:
        """Seal what was written and put it into the store in one step.

        The store fills in the manifest's `tag`, `files` and, for those not given, `packages`.
        """
        filled = manifest.model_copy(
            update={"tag": str(self.tag), "packages": installed_packages() | manifest.packages}
        )
        for entry in filled.backbones:
            open_backbone(entry, filled.tag)
        metadata = {"alpha": manifest.calibration.alpha, "backbone": manifest.backbone.tag}
        with explained(home(), f"write {self.tag}"):
            _seal(self.path, self.tag, filled, metadata)
            if not publish(self.path, self.tag):
                raise ArtifactError(f"{self.tag} exists already; run it again for a fresh version.")
        self.committed = True
        return self.tag


@contextmanager
def open_writer(product: str) -> Iterator[VersionWriter]:
    """A writer for a fresh version of `product`; whatever ends the block, an uncommitted version leaves no trace.

    Raises
    ------
    BadParameter
        The product's name is not usable.
    ArtifactError
        The disk is full or read-only.
    """
    tag = product_tag(product, new_version())
    with staging_folder(tag.name) as folder, explained(home(), f"write {tag}", disk_only=True):
        yield VersionWriter(folder, tag)


def write_version(manifest: Manifest, write: Callable[[Path], None]) -> Tag:
    """Put a fresh version into the store: `write` fills a folder, `manifest` describes it."""
    with open_writer(manifest.product) as writer:
        write(writer.path)
        return writer.commit(manifest)


def write_backbone(info: BackboneLike, folder: Path) -> Tag:
    """Put a copy of an exported backbone's folder into the store; its tag if the store has the same content already.

    The version is made from the content, so that two exports that differ in anything have two tags. A damaged
    copy in the store is replaced by the sound one.
    """
    with staging_folder(BACKBONE_PREFIX + info.name) as stage, explained(home(), f"write the backbone {info.name}"):
        names = [name for name in list_files(folder) if name not in OWN_FILES]
        if not names:
            raise ArtifactError(f"{folder} holds no exported backbone.")
        for name in names:
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, stage / name)
        tag = Tag(BACKBONE_PREFIX + info.name, content_version({name: sha256(stage / name) for name in names}))
        manifest = BackboneManifest(
            tag=str(tag), name=info.name, sha256=info.sha256, origin=info.origin, packages=installed_packages()
        )
        _seal(stage, tag, manifest, {"origin": info.origin})
        place(stage, tag, BackboneManifest)
    return tag


def place(folder: Path, tag: Tag, kind: type[AnyManifest]) -> None:
    """Put a sealed and verified folder into the store; an equal version there stays, a damaged copy is replaced.

    Raises
    ------
    ArtifactError
        The store holds a version of that tag with other content.
    """
    if publish(folder, tag):
        return
    held = folder_of(tag)
    other: AnyManifest | None = None
    with suppress(ArtifactError):
        other = read_manifest(held, tag, kind)
    # A backbone's tag stands for its content; who exported it, and when, does not matter.
    if isinstance(other, Manifest) and other != read_manifest(folder, tag, kind):
        raise ArtifactError(f"The store holds {tag} already, with other content; a version never changes.")
    with suppress(ArtifactError):
        verify_folder(held, tag, kind)
        _touch(held)
        return
    discard(tag)
    publish(folder, tag)


@contextmanager
def exporting(name: str) -> Iterator[None]:
    """Let one process at a time look for the backbone `name` and, where it is not there, write it.

    Raises
    ------
    ArtifactError
        The store is read-only or full.
    """
    folder = home() / RECORDS
    lock = FileLock(folder / f".{BACKBONE_PREFIX}{name}.lock")
    with explained(folder, f"lock the backbone {name}"):
        folder.mkdir(exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def find_backbone(name: str, sha256: str) -> tuple[Tag, Path] | None:
    """The newest sound backbone in the store with these weights (the SHA-256 of the weights), to spare an export."""
    found = [(manifest, tag) for manifest, tag in _sound_backbones(name) if manifest.sha256 == sha256]
    if not found:
        return None
    tag = max(found, key=lambda item: item[0].created)[1]
    _touch(folder_of(tag))
    return tag, folder_of(tag)


def backbone_weights(name: str) -> list[str]:
    """The SHA-256 of the weights of each sound backbone `name` in the store."""
    return sorted({manifest.sha256 for manifest, _ in _sound_backbones(name)})


def _sound_backbones(name: str) -> Iterator[tuple[BackboneManifest, Tag]]:
    for version in versions_in(BACKBONE_PREFIX + name):
        tag = Tag(BACKBONE_PREFIX + name, version)
        with suppress(ArtifactError):
            yield verify_folder(folder_of(tag), tag, BackboneManifest, remember=True), tag


def _touch(folder: Path) -> None:
    """Say that a stored folder is about to be needed, so that `prune` leaves it."""
    with suppress(OSError):
        os.utime(folder)


def read_version(product: str | Tag, version: str | None = None, *, verify: bool = True) -> Stored:
    """Open a version: exactly named (``product:version``, a tag), or the product's version in production.

    With `verify`, every file's SHA-256 is checked and nothing may be missing or extra, in the version and in its
    backbone; without, only the manifests are.

    Raises
    ------
    NotFound
        No such product or version.
    ArtifactError
        The version is damaged, foreign or from a later release; the message says which file and what to do.
    """
    tag = resolve(product, version)
    folder = folder_of(tag)
    manifest = verify_folder(folder, tag, Manifest) if verify else read_manifest(folder, tag, Manifest)
    paths = {entry.tag: open_backbone(entry, manifest.tag, verify=verify) for entry in manifest.backbones}
    return Stored(folder, tag, manifest, paths, str(tag))


def read_part(tag: str) -> Stored:
    """The version of a tag, or of ``tag#member`` that member; raises as `read_version`."""
    version, _, member = tag.partition(PART)
    stored = read_version(version)
    return stored.member(member) if member else stored


def _seal(folder: Path, tag: Tag, manifest: Manifest | BackboneManifest, metadata: dict[str, Any]) -> None:
    """Add BentoML's description, the manifest with every file's hash, and the manifest's own; flush all to disk."""
    described = ModelInfo(
        tag=tag,
        module="",
        labels={"made-by": "ood-runners"},
        options={},
        metadata=metadata,
        context=ModelContext(framework_name="", framework_versions={}),
        signatures={},
        api_version="v1",
        creation_time=manifest.created,
    )
    with (folder / MODEL_YAML).open("w", encoding="utf-8") as stream:
        described.dump(stream)
    files = {name: sha256(folder / name) for name in list_files(folder) if name not in (MANIFEST, MANIFEST_SUM)}
    # Validated once more, so that what cannot be read again is never written.
    sealed = type(manifest).from_json(manifest.model_copy(update={"files": files}).to_json(), str(tag))
    text = sealed.to_json().encode()
    (folder / MANIFEST).write_bytes(text)
    (folder / MANIFEST_SUM).write_text(manifest_sum(text), encoding="utf-8")
    flush_tree(folder)


@functools.cache
def installed_packages() -> dict[str, str]:
    """Versions of the packages that a version's numbers depend on, by name."""
    found: dict[str, str] = {}
    for name in RECORDED_PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
