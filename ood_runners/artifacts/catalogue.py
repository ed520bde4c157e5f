"""What is in the store, and which version a name stands for."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from bentoml import Tag

from ood_runners.artifacts.files import explained, list_files
from ood_runners.artifacts.manifest import Manifest
from ood_runners.artifacts.names import check_product, folder_of, home, parse, product_tag, products, versions_in
from ood_runners.artifacts.record import locked, production
from ood_runners.artifacts.staging import discard
from ood_runners.artifacts.verify import read_manifest
from ood_runners.errors import ArtifactError, BadParameter, NotFound

SHOWN = 8


@dataclass(frozen=True)
class VersionInfo:
    """A line of a listing; `problem` says why a version cannot be read (then the rest is unknown).

    `size` is in bytes, without the backbone, which products share.
    """

    tag: Tag
    product: str
    version: str
    size: int
    in_production: bool
    created: datetime | None = None
    alpha: float | None = None
    backbone: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


def _shorten(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[-SHOWN:]) + more


def _versions(product: str) -> list[str]:
    return versions_in(product_tag(product).name)


def resolve(product: str | Tag, version: str | None = None) -> Tag:
    """The exact tag that a name stands for: the version given (also as ``product:version``), or the one in production.

    BentoML's `latest` is never used.

    Raises
    ------
    NotFound
        No such product or version, or none in production; the message names those that exist.
    ArtifactError
        The production record is damaged, or names a version that is gone.
    """
    name, own = parse(product)
    version = version or own
    existing = _versions(name)
    chosen = version or production(name)
    if chosen in existing:
        return product_tag(name, chosen)
    if version is None and chosen is not None:
        raise ArtifactError(
            f"Version {chosen} of {name!r} is in production but not in the store; import it again, or roll back."
        )
    if not existing:
        known = products()
        there = f"the store has: {_shorten(known)}" if known else "the store is empty, fit one first"
        raise NotFound(f"There is no product {name!r}; {there}.")
    if version is None:
        raise NotFound(f"No version of {name!r} is in production; promote one of: {_shorten(existing)}.")
    raise NotFound(f"There is no version {version!r} of {name!r}; it has: {_shorten(existing)}.")


def list_versions(product: str | None = None) -> list[VersionInfo]:
    """The versions of a product, or of all, by product and age; one that cannot be read is listed with its problem.

    Raises
    ------
    NotFound
        There is no such product.
    """
    if product is not None and not _versions(check_product(product)):
        resolve(product, "any")  # says which products there are
    return [_info(name, version) for name in ([product] if product else products()) for version in _versions(name)]


def _info(product: str, version: str) -> VersionInfo:
    tag = product_tag(product, version)
    folder = folder_of(tag)
    size = 0
    try:
        size = sum((folder / name).stat().st_size for name in list_files(folder))
        in_production = production(product) == version
        manifest = read_manifest(folder, tag, Manifest)
    except ArtifactError as error:
        return VersionInfo(tag, product, version, size, False, problem=error.message)
    return VersionInfo(
        tag=tag,
        product=product,
        version=version,
        size=size,
        in_production=in_production,
        created=manifest.created,
        alpha=manifest.calibration.alpha,
        backbone=manifest.backbone.tag,
        metrics=manifest.metrics,
    )


def delete_version(tag: str | Tag) -> Tag:
    """Remove one version, exactly named, from the store; its backbone stays.

    Raises
    ------
    BadParameter
        It is the one in production, or no version is named.
    NotFound
        There is no such version.
    """
    product, version = parse(tag)
    if version is None:
        raise BadParameter(f"Name the version to delete, as {product}:VERSION; `list` shows them.")
    with locked(product):
        if production(product) == version:
            raise BadParameter(f"{product}:{version} is in production; promote another version, then delete this one.")
        found = resolve(product, version)
        with explained(home(), f"delete {found}"):
            discard(found)
    return found
