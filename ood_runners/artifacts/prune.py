"""Old versions and unused backbones, found and removed."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from bentoml import Tag

from ood_runners.artifacts.catalogue import delete_version
from ood_runners.artifacts.files import explained, list_files
from ood_runners.artifacts.manifest import Manifest
from ood_runners.artifacts.names import (
    BACKBONE_PREFIX,
    folder_of,
    home,
    models_folder,
    product_tag,
    products,
    versions_in,
)
from ood_runners.artifacts.record import read_record
from ood_runners.artifacts.staging import discard
from ood_runners.artifacts.verify import read_manifest
from ood_runners.artifacts.versions import pile
from ood_runners.errors import ArtifactError, BadParameter, NotFound

# A fit names its backbone long before the version that needs it is in the store.
RECENTLY_S = 24 * 3600.0


@dataclass(frozen=True)
class Pruned:
    """What was removed, or would be, and its bytes; `kept` says what else is old and stays, and why."""

    versions: list[Tag]
    backbones: list[Tag]
    size: int
    kept: list[str]


def prune(product: str | None = None, keep: int = 3, *, dry_run: bool = False) -> Pruned:
    """Remove all but the last `keep` versions of a product, or of each, and the backbones that no version needs.

    The version in production and the one that a rollback would go to are kept whatever their age. A backbone that was
    stored or used within the last day is kept, since a fit may be about to need it; so are all, while a version is so
    damaged that nobody knows which one it needs.

    Raises
    ------
    BadParameter
        `keep` is less than 1.
    NotFound
        There is no such product.
    ArtifactError
        A production record is damaged, or the store is read-only.
    """
    if keep < 1:
        raise BadParameter(f"At least one version is kept, not {keep}.")
    if product is not None and product not in products():
        raise NotFound(f"There is no product {product!r}; the store has: {', '.join(products()) or 'none'}.")
    kept: list[str] = []
    old = [tag for name in ([product] if product else products()) for tag in _old_versions(name, keep, kept)]
    backbones = _unused_backbones(set(old), kept)
    size = sum(_size(tag) for tag in (*old, *backbones))
    if not dry_run:
        for tag in old:
            delete_version(tag)
        for tag in backbones:
            with explained(home(), f"delete {tag}"):
                discard(tag)
    return Pruned(old, backbones, size, kept)


def _old_versions(product: str, keep: int, kept: list[str]) -> list[Tag]:
    versions = versions_in(product_tag(product).name)
    record = read_record(product)
    if record is None:
        return [product_tag(product, version) for version in versions[:-keep]]
    earlier = [version for version in pile(record.history)[:-1] if version in versions and version != record.production]
    wanted = {record.production: "in production"} | {version: "a rollback goes there" for version in earlier[-1:]}
    old = versions[:-keep]
    kept += [f"{product}:{version} ({why})" for version, why in wanted.items() if version in old]
    return [product_tag(product, version) for version in old if version not in wanted]


def _unused_backbones(without: set[Tag], kept: list[str]) -> list[Tag]:
    """Backbones that no version needs once those of `without` are gone."""
    needed: set[str] = set()
    for name in products():
        for tag in (product_tag(name, version) for version in versions_in(product_tag(name).name)):
            if tag in without:
                continue
            try:
                needed.update(entry.tag for entry in read_manifest(folder_of(tag), tag, Manifest).backbones)
            except ArtifactError:
                kept.append(f"all backbones ({tag} is damaged, so that nobody knows which one it needs)")
                return []
    names = sorted(entry.name for entry in models_folder().glob(f"{BACKBONE_PREFIX}*"))
    unused = [tag for name in names for version in versions_in(name) if str(tag := Tag(name, version)) not in needed]
    recent = [tag for tag in unused if time.time() - folder_of(tag).stat().st_mtime < RECENTLY_S]
    kept += [f"{tag} (used within the last day; a fit may need it)" for tag in recent]
    return [tag for tag in unused if tag not in recent]


def _size(tag: Tag) -> int:
    folder = folder_of(tag)
    return sum(os.stat(folder / name).st_size for name in list_files(folder))
