"""See that a folder is the version that it says it is, whole and unchanged."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import yaml
from bentoml import Tag

from ood_runners.artifacts.files import list_files, sha256, sha256_once
from ood_runners.artifacts.manifest import WAYS_ON, BackboneEntry, BackboneManifest, Manifest
from ood_runners.artifacts.names import folder_of
from ood_runners.errors import ArtifactError

MANIFEST = "manifest.json"
MANIFEST_SUM = "manifest.json.sha256"
MODEL_YAML = "model.yaml"
# Written by the store itself; all other files are the version's payload.
OWN_FILES = frozenset({MANIFEST, MANIFEST_SUM, MODEL_YAML})

AnyManifest = TypeVar("AnyManifest", Manifest, BackboneManifest)


def manifest_sum(text: bytes) -> str:
    """The line that guards the manifest itself, as ``sha256sum -c`` reads it."""
    return f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n"


def content_version(files: Mapping[str, str]) -> str:
    """A backbone's version, 12 digits of the hash of its payload: equal content has one tag, other content another."""
    lines = [f"{digest}  {name}\n" for name, digest in sorted(files.items()) if name not in OWN_FILES]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:12]


def read_manifest(folder: Path, tag: Tag, kind: type[AnyManifest]) -> AnyManifest:
    """The manifest of the version in `folder`, checked against its own hash and `tag`.

    Raises
    ------
    ArtifactError
        It is missing, damaged, foreign, from a later release, or belongs to another version.
    """
    try:
        text = (folder / MANIFEST).read_bytes()
        guard = (folder / MANIFEST_SUM).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        name = Path(error.filename or folder).name
        raise ArtifactError(f"{tag}: {name} cannot be read ({error.strerror}); {WAYS_ON}.") from error
    if guard != manifest_sum(text):
        raise ArtifactError(f"{tag}: {MANIFEST} does not match {MANIFEST_SUM}, so one of them was changed; {WAYS_ON}.")
    manifest = kind.from_json(text, str(tag))
    if manifest.tag != str(tag):
        raise ArtifactError(
            f"{tag}: {MANIFEST} is that of {manifest.tag}; a version cannot be copied under another name: use export "
            "and import."
        )
    return manifest


def verify_files(folder: Path, tag: Tag, files: Mapping[str, str], *, remember: bool = False) -> None:
    """Check that `folder` holds exactly the manifest's `files`, each with its SHA-256.

    Raises
    ------
    ArtifactError
        Naming the tag, the file and what to do.
    """
    try:
        present = set(list_files(folder)) - {MANIFEST, MANIFEST_SUM}
        for name in sorted(files.keys() - present):
            raise ArtifactError(f"{tag}: {name} is missing; {WAYS_ON}.")
        for name in sorted(present - files.keys()):
            raise ArtifactError(f"{tag}: {name} does not belong to it; remove that file, or {WAYS_ON}.")
        digest = sha256_once if remember else sha256
        for name, expected in sorted(files.items()):
            if digest(folder / name) != expected:
                raise ArtifactError(f"{tag}: {name} is damaged (its SHA-256 is another); {WAYS_ON}.")
        described = yaml.safe_load((folder / MODEL_YAML).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ArtifactError(f"{tag}: a file cannot be read ({error}); {WAYS_ON}.") from error
    if not isinstance(described, dict) or (described.get("name"), described.get("version")) != (tag.name, tag.version):
        raise ArtifactError(f"{tag}: {MODEL_YAML} is that of another model; {WAYS_ON}.")


def verify_folder(folder: Path, tag: Tag, kind: type[AnyManifest], *, remember: bool = False) -> AnyManifest:
    """`read_manifest` and `verify_files` in one; a backbone's tag must be that of its content, too."""
    manifest = read_manifest(folder, tag, kind)
    verify_files(folder, tag, manifest.files, remember=remember)
    if isinstance(manifest, BackboneManifest) and content_version(manifest.files) != tag.version:
        raise ArtifactError(f"{tag}: its files are not those that its tag was made from; {WAYS_ON}.")
    return manifest


def open_backbone(entry: BackboneEntry, needed_by: str, *, verify: bool = True) -> Path:
    """The folder of a backbone that the version `needed_by` was fitted on.

    Raises
    ------
    ArtifactError
        The backbone is missing, damaged, or holds other weights than those of the fit.
    """
    tag = Tag.from_str(entry.tag)
    folder = folder_of(tag)
    if not folder.is_dir():
        raise ArtifactError(
            f"{needed_by} needs the backbone {tag}, which is not in the store; import the version again from a file "
            "that `export` made, or fit again."
        )
    if verify:
        found = verify_folder(folder, tag, BackboneManifest, remember=True)
    else:
        found = read_manifest(folder, tag, BackboneManifest)
    if found.sha256 != entry.sha256:
        raise ArtifactError(f"{needed_by}: its backbone {tag} holds other weights than it was fitted on; {WAYS_ON}.")
    return folder
