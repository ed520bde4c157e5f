"""Product names, tags and the folders they stand for in the running process's BentoML store."""

from __future__ import annotations

import re
import secrets
from datetime import UTC, datetime
from pathlib import Path

from bentoml import Tag
from bentoml._internal.configuration.containers import BentoMLContainer
from bentoml.exceptions import BentoMLException

from ood_runners.errors import ArtifactError, BadParameter

PRODUCT_PREFIX = "ood-"
BACKBONE_PREFIX = "ood-backbone-"
RECORDS = "ood-production"
STAGING = "ood-staging"
CACHE = "ood-cache"  # may be lost at any time

# BentoML allows 63 characters for a tag's name, and it must end with a letter or digit.
MAX_PRODUCT = 63 - len(PRODUCT_PREFIX)
_VERSION = re.compile(r"[a-z0-9](?:[-._a-z0-9]{0,61}[a-z0-9])?")
_PRODUCT = re.compile(r"[a-z0-9](?:[a-z0-9_-]*[a-z0-9])?")


def home() -> Path:
    """BentoML's home folder, as the running process sees it.

    Raises
    ------
    ArtifactError
        BentoML cannot make or use its folders.
    """
    try:
        return Path(BentoMLContainer.bentoml_home.get())
    except OSError as error:
        raise ArtifactError(
            f"BentoML's home folder cannot be used ({error}); set BENTOML_HOME to a folder that holds a model store, "
            "or to a writable one."
        ) from error


def kept_networks() -> Path:
    """The folder of networks as they were compiled (see `ood_runners.compiled`)."""
    return home() / CACHE / "networks"


def models_folder() -> Path:
    """The folder of the running process's model store."""
    home()  # the store is made beside it, and this one says what is wrong
    return Path(BentoMLContainer.model_store.get()._path)


def check_product(product: str) -> str:
    """Return `product` if it is a usable name.

    Raises
    ------
    BadParameter
        The name breaks the rules; the message says which name would do.
    """
    if not _PRODUCT.fullmatch(product) or len(product) > MAX_PRODUCT:
        raise BadParameter(
            f"{product[:80]!r} is no product name: use 1 to {MAX_PRODUCT} lowercase letters, digits, '-' and '_', "
            "with a letter or digit first and last, for example 'ball-screws'."
        )
    if product.startswith((PRODUCT_PREFIX, "backbone-")):
        raise BadParameter(
            f"{product!r} is no product name: names that begin with 'ood-' or 'backbone-' are the store's own."
        )
    return product


def new_version() -> str:
    """A fresh version name: ordered by time (UTC, to the millisecond), unique for two fits at once."""
    now = datetime.now(UTC)
    return f"{now:%Y%m%d-%H%M%S}-{now.microsecond // 1000:03d}{secrets.token_hex(3)}"


def product_tag(product: str, version: str | None = None) -> Tag:
    """The BentoML tag of a product, or of one of its versions."""
    check_product(product)
    try:
        return Tag(PRODUCT_PREFIX + product, version)
    except (ValueError, BentoMLException) as error:
        raise BadParameter(
            f"{version!r} is no version name; `list --product {product}` shows those that exist."
        ) from error


def parse(text: str | Tag) -> tuple[str, str | None]:
    """Split ``product``, ``product:version``, ``ood-product:version`` or a Tag into product and version.

    Raises
    ------
    BadParameter
        It is none of these.
    """
    name, _, version = str(text).partition(":")
    if name.startswith(PRODUCT_PREFIX) and not name.startswith(BACKBONE_PREFIX):
        name = name.removeprefix(PRODUCT_PREFIX)
    product_tag(name, version or None)
    return name, version or None


def folder_of(tag: Tag) -> Path:
    """The folder of a version in the model store (it need not exist)."""
    return models_folder() / tag.path()


def versions_in(name: str) -> list[str]:
    """Versions of a BentoML model name in the store, oldest name first; empty if there are none."""
    folder = models_folder() / name
    try:
        return sorted(entry.name for entry in folder.iterdir() if _VERSION.fullmatch(entry.name) and entry.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def products() -> list[str]:
    """Names of the products that have at least one version, in order."""
    names = [entry.name for entry in models_folder().glob(f"{PRODUCT_PREFIX}*") if versions_in(entry.name)]
    found = [name.removeprefix(PRODUCT_PREFIX) for name in names if not name.startswith(BACKBONE_PREFIX)]
    return sorted(name for name in found if _PRODUCT.fullmatch(name))
