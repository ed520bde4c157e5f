"""Versions pushed to a folder and to an S3 server, and pulled from there."""

from __future__ import annotations

import logging
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from bentoml import Tag
from moto.server import ThreadedMotoServer

from ood_runners import artifacts
from ood_runners.artifacts import names, pull_version, push_version, read_version, remote
from ood_runners.errors import ArtifactError, BadParameter, NotFound
from tests.artifacts.samples import TinyBackbone, backbone_folder, mounted, snapshot

Fit = Callable[..., Tag]
SECRET = "not-for-any-log"


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    filesystem = fsspec.filesystem("s3", skip_instance_cache=True)
    filesystem.mkdir("models")
    yield "s3://models/line-3"
    filesystem.invalidate_cache()
    filesystem.rm("models", recursive=True)


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest) -> str:
    """A folder, and a bucket."""
    return str(request.getfixturevalue(request.param))


@pytest.fixture
def folder(tmp_path: Path) -> str:
    (tmp_path / "shared").mkdir()
    return str(tmp_path / "shared")


def objects(place: str) -> dict[str, bytes]:
    """What lies in a place, by its name there."""
    filesystem, root = fsspec.url_to_fs(place, skip_instance_cache=True)
    return {path.removeprefix(root + "/"): filesystem.cat_file(path) for path in filesystem.find(root)}


def put(place: str, name: str, content: bytes) -> None:
    filesystem, root = fsspec.url_to_fs(place, skip_instance_cache=True)
    filesystem.pipe_file(f"{root}/{name}", content)


def empty(home: Path) -> None:
    for name in ("models", "ood-production"):
        shutil.rmtree(home / name, ignore_errors=True)
    (home / "models").mkdir()


def test_a_version_comes_back_as_it_went(fit: Fit, bento_home: Path, place: str) -> None:
    tag = fit()
    before = snapshot(bento_home)
    address = push_version(tag, place)
    assert address == f"{place}/bolts/{tag.version}.oodmodel"
    assert set(objects(place)) == {f"bolts/{tag.version}.oodmodel", f"bolts/{tag.version}.oodmodel.sha256"}
    empty(bento_home)
    assert pull_version(f"bolts:{tag.version}", place) == tag
    assert snapshot(bento_home) == before
    assert pull_version("bolts", place) == tag  # it is there already


def test_the_newest_and_the_one_in_production(fit: Fit, bento_home: Path, place: str) -> None:
    first, second = fit(), fit(seed=1)
    artifacts.promote(first)
    assert str(first.version) in push_version("bolts", place)
    push_version(second, place)
    empty(bento_home)
    assert pull_version("bolts", place) == second
    assert pull_version(f"bolts:{first.version}", place) == first
    with pytest.raises(NotFound, match=f"no version 'v9' of 'bolts' in .*; it has: {first.version}, {second.version}"):
        pull_version("bolts:v9", place)
    with pytest.raises(NotFound, match="no version of 'nuts' in"):
        pull_version("nuts", place)


def test_pushing_again_changes_nothing(fit: Fit, folder: str) -> None:
    tag = fit()
    push_version(tag, folder)
    before = objects(folder)
    assert push_version(tag, folder).endswith(f"{tag.version}.oodmodel")
    assert objects(folder) == before


def test_pushing_from_another_machine_whose_backbone_was_exported_on_another_day(
    fit: Fit, bento_home: Path, tmp_path: Path, folder: str
) -> None:
    tag = fit()
    push_version(tag, folder)
    before = objects(folder)
    empty(bento_home)
    artifacts.write_backbone(TinyBackbone(origin="another day"), backbone_folder(tmp_path / "again"))
    pull_version("bolts", folder)
    push_version(tag, folder)
    assert objects(folder) == before


def test_other_content_under_the_same_name_is_refused(
    fit: Fit, bento_home: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tag = fit()
    push_version(tag, folder)
    before = objects(folder)
    artifacts.delete_version(tag)
    monkeypatch.setattr(artifacts.store, "new_version", lambda: tag.version)
    assert fit(seed=9) == tag
    with pytest.raises(ArtifactError, match="already, with other content"):
        push_version(tag, folder)
    assert objects(folder) == before


@pytest.mark.parametrize("damage", ["cut", "changed", "checksum"])
def test_a_damaged_version_is_refused_and_pushing_heals_it(
    fit: Fit, bento_home: Path, folder: str, damage: str
) -> None:
    tag = fit()
    push_version(tag, folder)
    sound = objects(folder)
    name = f"bolts/{tag.version}.oodmodel"
    content = sound[name]
    if damage == "cut":
        put(folder, name, content[:-2000])
    elif damage == "changed":
        put(folder, name, content.replace(b"not really a picture", b"not really a pictura"))
    else:
        put(folder, name + ".sha256", b"0" * 64 + b"  x\n")
    stored = snapshot(bento_home)
    empty(bento_home)
    with pytest.raises(ArtifactError, match=f"{tag.version}.oodmodel does not match its checksum"):
        pull_version("bolts", folder)
    assert snapshot(bento_home) == {}
    for path, data in stored.items():
        (bento_home / path).parent.mkdir(parents=True, exist_ok=True)
        (bento_home / path).write_bytes(data)
    push_version(tag, folder)
    assert objects(folder) == sound


def test_a_version_under_another_name_is_refused(fit: Fit, folder: str) -> None:
    tag = fit()
    push_version(tag, folder)
    for ending in (".oodmodel", ".oodmodel.sha256"):
        put(folder, f"bolts/v2{ending}", objects(folder)[f"bolts/{tag.version}{ending}"])
    with pytest.raises(ArtifactError, match="under another name"):
        pull_version("bolts:v2", folder)


class Broken:
    """A stream that ends in the midst, as a network does."""

    def __init__(self, content: bytes) -> None:
        self.left = [content, content]

    def read(self, size: int = -1) -> bytes:
        if not self.left:
            raise ConnectionResetError("the network went away")
        return self.left.pop()


def test_what_was_interrupted_is_seen_by_nobody(fit: Fit, place: str) -> None:
    tag = fit()
    there = remote.Remote.open(place)
    name = f"bolts/{tag.version}.oodmodel"
    # Larger than the part that S3 takes at once, so that some of it has been sent.
    there.filesystem.default_block_size = 5 * 2**20
    broken: Any = Broken(bytes(6 * 2**20))
    with pytest.raises(ArtifactError, match=r"could not be written \(ConnectionResetError\)"):
        there.write(name, broken)
    assert objects(place) == {}
    # The version alone, without the checksum that is written last.
    put(place, name, b"x" * 100)
    assert there.versions("bolts") == []
    with pytest.raises(NotFound, match="no version of 'bolts'"):
        pull_version("bolts", place)
    push_version(tag, place)
    assert there.versions("bolts") == [tag.version]


def test_what_does_not_arrive_as_it_was_sent_is_not_marked_whole(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_write_file", lambda target, source: (target.parent.mkdir(), target.write_bytes(b"?")))
    with pytest.raises(ArtifactError, match="did not arrive as it was sent"):
        push_version(fit(), str(tmp_path))
    assert remote.Remote.open(str(tmp_path)).versions("bolts") == []


def test_places_that_are_none(fit: Fit, tmp_path: Path) -> None:
    tag = fit()
    with pytest.raises(BadParameter, match="no folder that exists"):
        push_version(tag, str(tmp_path / "none"))
    with pytest.raises(BadParameter, match="cannot be opened here"):
        push_version(tag, "nosuch://bucket")
    for place in ("", "memory://x", "http://127.0.0.1/x", "simplecache::s3://x"):
        with pytest.raises(BadParameter, match="no place for versions"):
            push_version(tag, place)


def test_a_bucket_that_is_not_there_and_a_server_that_is_away(
    fit: Fit, s3: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tag = fit()
    caplog.set_level(logging.INFO)
    with pytest.raises(NotFound, match="s3://nosuch/x could not be written: there is no such place"):
        push_version(tag, "s3://nosuch/x")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        with pytest.raises(ArtifactError, match=r"could not be listed \(EndpointConnectionError\)") as caught:
            pull_version("bolts", s3)
    assert SECRET not in str(caught.value) + caplog.text


def test_without_credentials(fit: Fit, s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ArtifactError, match="access is denied; see to the credentials"):
        push_version(fit(), s3)


def test_passwords_in_an_address_are_not_shown(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadParameter) as caught:
        push_version(fit(), f"nosuch://somebody:{SECRET}@host/models")
    assert "nosuch://host/models" in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_full_place(fit: Fit, tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    with mounted(place, "-t", "tmpfs", "-o", "size=4k", "tmpfs"):
        with pytest.raises(ArtifactError, match=r"could not be written \(No space left"):
            push_version(fit(), str(place))
        assert [path for path in place.rglob("*") if path.is_file()] == []


def test_a_pulled_version_can_be_read(fit: Fit, bento_home: Path, folder: str) -> None:
    push_version(fit(), folder)
    empty(bento_home)
    stored = read_version(pull_version("bolts", folder))
    assert stored.arrays("memory_bank")["bank"].shape == (10, 8)
    assert list((names.home() / names.STAGING).iterdir()) == []
