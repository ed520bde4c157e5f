"""Versions held in memory while they are used, within a budget of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar, cast

T = TypeVar("T")


class _Entry:
    def __init__(self) -> None:
        self.value: Any = None
        self.size = 0
        self.leases = 0
        self.error: BaseException | None = None
        self.done = threading.Event()


class LoadedVersions(Generic[T]):
    """Loads versions by tag when they are first asked for, and lets go of those unused for longest.

    For use from any number of threads. A tag is loaded once however many threads ask for it at the same time; the
    others wait, and get the loader's error if it fails. An error is not kept: the next request loads anew.

    Parameters
    ----------
    load
        Opens the version of a tag (``ood-bolts:…``).
    size
        What a loaded version takes, in bytes.
    budget
        Bytes that all of them may take together. What is leased, and the one leased last, stay even above it.
    """

    def __init__(self, load: Callable[[str], T], size: Callable[[T], int], budget: int) -> None:
        self._load = load
        self._size = size
        self._budget = budget
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # used longest ago first

    @contextmanager
    def lease(self, tag: str) -> Iterator[T]:
        """The loaded version, which stays loaded within the block."""
        entry = self._take(tag)
        try:
            yield cast(T, entry.value)
        finally:
            self._give_back(entry)

    def tags(self) -> list[str]:
        """Tags that are loaded, the one used longest ago first."""
        with self._lock:
            return [tag for tag, entry in self._entries.items() if entry.done.is_set()]

    @property
    def total(self) -> int:
        """Bytes that the loaded versions take together."""
        with self._lock:
            return sum(entry.size for entry in self._entries.values())

    def _take(self, tag: str) -> _Entry:
        while True:
            with self._lock:
                entry = self._entries.get(tag)
                first = entry is None
                if entry is None:
                    entry = self._entries[tag] = _Entry()
                entry.leases += 1
                self._entries.move_to_end(tag)
            if first:
                self._fill(tag, entry)
                return entry
            entry.done.wait()
            if entry.error is None:
                return entry
            if isinstance(entry.error, Exception):
                raise entry.error
            # The loading thread was interrupted, which is its own affair: load it here.

    def _fill(self, tag: str, entry: _Entry) -> None:
        try:
            value = self._load(tag)
            size = self._size(value)
        except BaseException as error:
            with self._lock:
                del self._entries[tag]
            entry.error = error
            entry.done.set()
            raise
        with self._lock:
            entry.value, entry.size = value, size
            entry.done.set()
            dropped = self._shrink()
        dropped.clear()  # freed outside the lock

    def _give_back(self, entry: _Entry) -> None:
        with self._lock:
            entry.leases -= 1
            dropped = self._shrink()
        dropped.clear()

    def _shrink(self) -> list[_Entry]:
        """Take out what is idle, longest unused first, until the rest fits; the caller holds the lock."""
        total = sum(entry.size for entry in self._entries.values())
        dropped: list[_Entry] = []
        for tag in list(self._entries)[:-1]:
            if total <= self._budget:
                break
            if self._entries[tag].leases == 0:
                dropped.append(self._entries.pop(tag))
                total -= dropped[-1].size
        return dropped
