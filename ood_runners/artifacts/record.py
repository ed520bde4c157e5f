"""The record of a product: which version is in production, and how that came to be.

One JSON file a product, ``<BENTOML_HOME>/ood-production/<product>.json``, replaced in one step, so that a reader
never meets half a record and a running service can poll it cheaply.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from filelock import FileLock, Timeout
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from ood_runners.artifacts.files import explained, write_atomically
from ood_runners.artifacts.names import RECORDS, check_product, home
from ood_runners.errors import ArtifactError, Overloaded

# A promotion holds the lock while it checks the version.
LOCK_SECONDS = 60.0
KEPT_ENTRIES = 500
Stamp = tuple[int, int, int]


class Change(BaseModel):
    """One move of a product from one production version to another; `came_from` is None for its first."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    when: AwareDatetime
    who: str
    why: str = ""
    action: Literal["promote", "rollback"]
    product: str
    came_from: Annotated[str | None, Field(alias="from")] = None
    to: str


class Record(BaseModel):
    """The version in production, and the moves that led there, oldest first."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    product: str
    production: str
    history: list[Change]


def record_path(product: str) -> Path:
    """Where a product's record lies (it need not exist)."""
    return home() / RECORDS / f"{check_product(product)}.json"


def read_record(product: str) -> Record | None:
    """The record of a product; None if it has none.

    Raises
    ------
    ArtifactError
        There is one and it cannot be read: that is never the same as none.
    """
    path = record_path(product)
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ArtifactError(f"The production record {path} cannot be read ({error.strerror}); mend that.") from error
    try:
        record = Record.model_validate_json(text)
    except ValidationError as error:
        raise ArtifactError(
            f"The production record {path} is damaged or from a later release ({error.errors()[0]['msg']}); restore it "
            "from a backup, or remove it and promote a version again."
        ) from error
    if record.product != product:
        raise ArtifactError(f"The production record {path} is that of {record.product!r}; remove it and promote again.")
    return record


def write_record(record: Record) -> None:
    """Replace the product's record; the caller holds `locked`."""
    path = record_path(record.product)
    kept = record.model_copy(update={"history": record.history[-KEPT_ENTRIES:]})
    with explained(path.parent, f"write the production record of {record.product!r}"):
        for leftover in path.parent.glob(f".{path.name}.*.tmp"):  # of a process killed while it wrote
            leftover.unlink(missing_ok=True)
        write_atomically(path, kept.model_dump_json(indent=1, by_alias=True) + "\n")


@contextmanager
def locked(product: str) -> Iterator[None]:
    """Let one process at a time move or delete versions of a product.

    Raises
    ------
    Overloaded
        Another one holds the lock for longer than `LOCK_SECONDS`.
    ArtifactError
        The store is read-only or full.
    """
    folder = record_path(product).parent
    lock = FileLock(folder / f"{product}.lock", timeout=LOCK_SECONDS)
    with explained(folder, f"lock the production record of {product!r}"):
        try:
            folder.mkdir(exist_ok=True)
            lock.acquire()
        except Timeout as error:
            raise Overloaded(
                f"Another process has been changing {product!r} for {LOCK_SECONDS:.0f} s (lock {lock.lock_file}); "
                "try again when it has ended."
            ) from error
    try:
        yield
    finally:
        lock.release()


def production(product: str) -> str | None:
    """The version of a product that is in production, None if there is none yet."""
    record = read_record(product)
    return None if record is None else record.production


def history(product: str) -> list[Change]:
    """The moves of a product's production version, oldest first."""
    record = read_record(product)
    return [] if record is None else record.history


def record_stamp(product: str) -> Stamp | None:
    """Something that changes whenever the record does (mtime in ns, inode, size); None without a record."""
    return _stamp(record_path(product))


def stamps() -> dict[str, Stamp]:
    """`record_stamp` of every product that has a record: one look at one folder, cheap enough for each second."""
    folder = home() / RECORDS
    found = {path.stem: _stamp(path) for path in folder.glob("[!.]*.json")} if folder.is_dir() else {}
    return {product: stamp for product, stamp in found.items() if stamp is not None}


def _stamp(path: Path) -> Stamp | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
