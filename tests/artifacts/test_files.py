from __future__ import annotations

import errno
import hashlib
import os
import stat
import time
from pathlib import Path

import pytest

from ood_runners.artifacts import files
from ood_runners.errors import ArtifactError, NotFound


def test_a_hash_is_remembered_only_while_the_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "network.bin"
    path.write_bytes(b"old")
    hashed: list[Path] = []
    real = files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: hashed.append(path) or real(path))
    for _ in range(2):  # just written: a second write might bear the same time
        assert files.sha256_once(path) == hashlib.sha256(b"old").hexdigest()
    assert len(hashed) == 2
    long_ago = time.time() - 100
    os.utime(path, (long_ago, long_ago))
    for _ in range(3):
        files.sha256_once(path)
    assert len(hashed) == 3
    path.write_bytes(b"new")
    assert files.sha256_once(path) == hashlib.sha256(b"new").hexdigest()


def test_replacing_a_file_keeps_the_old_one_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    files.write_atomically(path, "old")
    assert stat.S_IMODE(path.stat().st_mode) == 0o644

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        files.write_atomically(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["record.json"]


@pytest.mark.parametrize("kind", ["link", "folder link", "pipe"])
def test_only_plain_files_are_listed(tmp_path: Path, kind: str) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c").touch()
    (tmp_path / "a").touch()
    assert files.list_files(tmp_path) == ["a", "b/c"]
    if kind == "pipe":
        os.mkfifo(tmp_path / "b" / "odd")
    else:
        (tmp_path / "b" / "odd").symlink_to(tmp_path / ("a" if kind == "link" else "b"))
    with pytest.raises(ArtifactError, match="odd is a link or a special file"):
        files.list_files(tmp_path)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, "x"), "The disk is full: could not write it in"),
        (OSError(errno.EROFS, "x"), r"cannot be written \(Read-only file system\)"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "The disk is full"),
    ],
)
def test_errors_of_the_disk_are_sentences(tmp_path: Path, error: Exception, sentence: str) -> None:
    with pytest.raises(ArtifactError, match=sentence), files.explained(tmp_path, "write it", disk_only=True):
        raise error


@pytest.mark.parametrize("error", [RuntimeError("a bug"), FileNotFoundError("a picture"), NotFound("no product")])
def test_errors_of_others_pass(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)), files.explained(tmp_path, "write it", disk_only=True):
        raise error
