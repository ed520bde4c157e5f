"""Compiled networks kept on disk: the same answers, and never a reason to fail."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from ood_runners import compiled
from ood_runners.inference import CPUNetwork


def doubling() -> ov.Model:
    given = ops.parameter([-1, 3], ov.Type.f32)
    return ov.Model([ops.result(ops.multiply(given, np.float32(2)))], [given], "doubling")


def never() -> ov.Model:
    raise AssertionError("compiled although it was kept")


def ask(model: Callable[[], ov.Model], kept: Path, threads: int = 1) -> None:
    given = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.testing.assert_array_equal(CPUNetwork(model, threads=threads, kept=kept)(given)[0], 2 * given)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return compiled.file_of(tmp_path / "networks", [b"doubling"])


def test_what_was_compiled_once_is_opened(kept: Path) -> None:
    ask(doubling, kept)
    ask(never, kept)
    ask(never, kept, threads=2)  # whatever the threads
    assert [file.name for file in kept.parent.iterdir()] == [kept.name]  # and nothing half-written beside it


@pytest.mark.parametrize("damage", ["cut", "changed", "emptied", "short"])
def test_what_is_damaged_is_compiled_again(kept: Path, damage: str) -> None:
    ask(doubling, kept)
    whole = kept.read_bytes()
    middle = len(whole) // 2
    changed = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    kept.write_bytes({"cut": whole[:middle], "changed": changed, "emptied": b"", "short": b"short"}[damage])
    ask(doubling, kept)
    ask(never, kept)


def test_what_openvino_cannot_read_is_compiled_again(kept: Path) -> None:
    import hashlib

    kept.parent.mkdir()
    kept.write_bytes(b"of another release" + hashlib.sha256(b"of another release").digest())
    ask(doubling, kept)
    ask(never, kept)


def test_a_folder_that_cannot_be_made_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    ask(doubling, compiled.file_of(tmp_path / "file" / "networks", [b"doubling"]))


def test_a_full_disk_is_no_failure(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    ask(doubling, kept)
    assert list(kept.parent.iterdir()) == []


def test_what_was_used_longest_ago_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = [compiled.file_of(tmp_path, [name]) for name in (b"a", b"b", b"c")]
    for age, one in zip((300, 200, 100), places, strict=True):
        ask(doubling, one)
        then = one.stat().st_mtime - age
        os.utime(one, (then, then))
    ask(never, places[0])  # which makes it the last used
    monkeypatch.setattr(compiled, "ALL_BYTES", 3 * places[0].stat().st_size)
    ask(doubling, compiled.file_of(tmp_path, [b"d"]))
    assert [one.exists() for one in places] == [True, False, True]


def test_a_file_stands_for_all_parts_in_their_order(tmp_path: Path) -> None:
    def name(*parts: bytes) -> str:
        return compiled.file_of(tmp_path, parts).name

    assert name(b"a", b"b") == name(b"a", b"b")
    assert len({name(b"a", b"b"), name(b"b", b"a"), name(b"ab"), name(b"a", b"b", b"")}) == 4
