"""Promote and roll back: which version a product's service answers with."""

from __future__ import annotations

import getpass
import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Literal

from bentoml import Tag

from ood_runners.artifacts.catalogue import resolve
from ood_runners.artifacts.names import parse
from ood_runners.artifacts.record import Change, Record, locked, read_record, write_record
from ood_runners.artifacts.store import Stored, read_version
from ood_runners.errors import BadParameter, NotFound

Check = Callable[[Stored], None]


def promote(tag: str | Tag, *, who: str | None = None, why: str = "", check: Check | None = None) -> Change:
    """Put a version into production, after checking it: its hashes always, and then `check`, which may raise.

    Promoting what is in production already changes nothing (the Change then has `came_from` equal to `to`).

    Raises
    ------
    BadParameter
        No version is named.
    NotFound, ArtifactError
        There is no such version, or it is not sound; production stays as it was.
    Overloaded
        Another process is at it.
    """
    product, version = parse(tag)
    if version is None:
        raise BadParameter(f"Name the version to promote, as {product}:VERSION; `list --product {product}` shows them.")
    with locked(product):
        return _move("promote", resolve(product, version), product, read_record(product), who, why, check)


def rollback(
    product: str, to: str | None = None, *, who: str | None = None, why: str = "", check: Check | None = None
) -> Change:
    """Go back to the version that was in production before the current one, or to the version `to`.

    Promotions pile up, and a rollback takes the current version off the pile: after A, B, C a first rollback gives
    B, a second A (never C again, which somebody fled from), a third says that there is nowhere left to go. With `to`,
    the pile is cut down to that version; one that is not on it takes the place of the current one. Versions that
    were deleted since are passed over.

    Raises
    ------
    NotFound
        There is nowhere to go back to, or no such version.
    ArtifactError
        The version is not sound (name another with `to`); production stays as it was.
    Overloaded
        Another process is at it.
    """
    product, version = parse(product)
    if version is not None:
        raise BadParameter(f"Name the product alone; roll it back to a version of your choice with --to {version}.")
    if to is not None:
        other, version = parse(to if ":" in to else f"{product}:{to}")
        if other != product or version is None:
            raise BadParameter(f"{to!r} is no version of {product!r}; `list --product {product}` shows them.")
    with locked(product):
        record = read_record(product)
        if record is None:
            resolve(product)  # an unknown product, or one that never had a version in production
            raise NotFound(f"No version of {product!r} was ever in production; promote one first.")
        tag = resolve(product, version) if version else _earlier(product, record)
        return _move("rollback", tag, product, record, who, why, check)


def pile(history: Sequence[Change]) -> list[str]:
    """The versions that rollbacks go back through: the current one last."""
    versions: list[str] = []
    for change in history:
        if not versions and change.came_from:
            versions.append(change.came_from)  # older entries were dropped
        if change.action == "promote":
            versions.append(change.to)
            continue
        del versions[-1:]
        if change.to in versions:
            del versions[len(versions) - versions[::-1].index(change.to) :]
        else:
            versions.append(change.to)
    return versions


def _earlier(product: str, record: Record) -> Tag:
    """The nearest version down the pile that still exists."""
    for version in reversed(pile(record.history)[:-1]):
        try:
            tag = resolve(product, version)
        except NotFound:
            continue
        if version != record.production:
            return tag
    raise NotFound(
        f"{product!r} has no earlier production version to roll back to from {record.production}; name one with --to, "
        f"`list --product {product}` shows them."
    )


def _move(
    action: Literal["promote", "rollback"],
    tag: Tag,
    product: str,
    record: Record | None,
    who: str | None,
    why: str,
    check: Check | None,
) -> Change:
    stored = read_version(tag)
    if check is not None:
        check(stored)
    change = Change(
        when=datetime.now(UTC),
        who=who or _somebody(),
        why=why,
        action=action,
        product=product,
        came_from=record.production if record else None,
        to=stored.version,
    )
    if change.came_from != change.to:
        history = [*(record.history if record else []), change]
        write_record(Record(product=product, production=change.to, history=history))
    return change


def _somebody() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return f"uid {os.getuid()}"
