from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bentoml
import pytest
from bentoml import Tag

from ood_runners import artifacts
from ood_runners.artifacts import export_version, import_version, names, read_version, transfer
from ood_runners.errors import ArtifactError, BadParameter, NotFound
from tests.artifacts.samples import TinyBackbone, backbone_folder, describe, mounted, snapshot

Fit = Callable[..., Tag]
Members = list[tuple[tarfile.TarInfo, bytes]]


def _empty(home: Path) -> None:
    for name in ("models", "ood-production"):
        shutil.rmtree(home / name, ignore_errors=True)
    (home / "models").mkdir()


def _rewrite(source: Path, target: Path, edit: Callable[[Members], Any]) -> Path:
    """A copy of an exported file with other members."""
    with tarfile.open(source) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    edit(members)
    with tarfile.open(target, "w") as tar:
        for member, content in members:
            tar.addfile(member, io.BytesIO(content))
    return target


@pytest.fixture
def exported(fit: Fit, tmp_path: Path) -> Path:
    return export_version(fit(), tmp_path / "bolts.tar")


def _tag() -> Tag:
    return artifacts.list_versions("bolts")[0].tag


def test_a_version_travels_with_its_backbone(fit: Fit, bento_home: Path, exported: Path) -> None:
    tag = _tag()
    before = snapshot(bento_home)
    _empty(bento_home)
    assert import_version(exported) == tag
    assert snapshot(bento_home) == before
    assert read_version(tag).arrays("memory_bank")["bank"].shape == (10, 8)
    with pytest.raises(NotFound, match="No version of 'bolts' is in production"):
        read_version("bolts")


def test_relative_paths_and_the_production_version(fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tag, _ = fit(), fit(seed=1)
    with pytest.raises(NotFound, match="in production"):
        export_version("bolts", Path("bolts.tar"))
    artifacts.promote(tag)
    assert export_version("bolts", Path("bolts.tar")) == tmp_path / "bolts.tar"
    first = (tmp_path / "bolts.tar").read_bytes()
    export_version("bolts", Path("./bolts.tar"))
    assert (tmp_path / "bolts.tar").read_bytes() == first
    assert import_version(Path("bolts.tar")) == tag
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["bolts.tar"]


def test_a_version_that_is_there_already_stays(bento_home: Path, exported: Path) -> None:
    before = {path: path.stat().st_ino for path in names.folder_of(_tag()).rglob("*")}
    assert import_version(exported) == _tag()
    assert {path: path.stat().st_ino for path in names.folder_of(_tag()).rglob("*")} == before


def test_other_content_under_the_same_tag_is_refused(
    fit: Fit, tmp_path: Path, bento_home: Path, exported: Path
) -> None:
    tag = _tag()
    bentoml.models.delete(tag)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifacts.store, "new_version", lambda: tag.version)
        assert fit(seed=9) == tag
    before = snapshot(bento_home)
    with pytest.raises(ArtifactError, match=f"holds {tag} already, with other content"):
        import_version(exported)
    assert snapshot(bento_home) == before


@pytest.mark.parametrize("name", ["memory_bank.safetensors", "manifest.json", "model.yaml"])
def test_importing_again_heals_a_damaged_version(bento_home: Path, exported: Path, name: str) -> None:
    before = snapshot(bento_home)
    (names.folder_of(_tag()) / name).write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match="import it again"):
        read_version(_tag())
    import_version(exported)
    assert snapshot(bento_home) == before


@pytest.mark.parametrize("part", range(9))
def test_a_file_that_was_cut_off_or_changed_is_refused(
    bento_home: Path, tmp_path: Path, exported: Path, part: int
) -> None:
    content = exported.read_bytes()
    _empty(bento_home)
    cut = tmp_path / "cut.tar"
    with tarfile.open(exported) as tar:
        members = tar.getmembers()
    member, end = members[part], members[-1].offset_data + members[-1].size
    cut.write_bytes(content[: end * part // 9 + 1 if part < 8 else end - 1])
    with pytest.raises(ArtifactError, match=r"cut\.tar"):
        import_version(cut)
    changed = bytearray(content)
    changed[member.offset_data + member.size // 2] ^= 1
    cut.write_bytes(changed)
    with pytest.raises(ArtifactError):
        import_version(cut)
    assert snapshot(bento_home) == {}


def _add(name: str, **fields: Any) -> Callable[[Members], None]:
    def edit(members: Members) -> None:
        member = tarfile.TarInfo(name)
        for key, value in fields.items():
            setattr(member, key, value)
        members.append((member, b""))

    return edit


def _link(members: Members) -> None:
    position = next(i for i, (member, _) in enumerate(members) if member.name.endswith("memory_bank.safetensors"))
    members[position][0].type = tarfile.SYMTYPE
    members[position][0].linkname = "/etc/passwd"


def _index(old: bytes, new: bytes) -> Callable[[Members], None]:
    def edit(members: Members) -> None:
        member, content = members[0]
        assert old in content
        content = content.replace(old, new, 1)
        member.size = len(content)
        members[0] = (member, content)

    return edit


def test_the_same_members_in_another_tar_are_taken(bento_home: Path, tmp_path: Path, exported: Path) -> None:
    same = _rewrite(exported, tmp_path / "same.tar", lambda members: None)
    tag = _tag()
    _empty(bento_home)
    assert import_version(same) == tag


@pytest.mark.parametrize(
    "edit",
    [
        _add("../outside"),
        _add("/tmp/outside"),
        _add("product/../../outside"),
        _add("product/extra.pkl"),
        _add("product/manifest.json"),
        _add("product/link", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        _add("product/device", type=tarfile.CHRTYPE),
        _link,
        lambda members: members.pop(),
        lambda members: members.pop(0),
        lambda members: members.reverse(),
        lambda members: members.clear(),
        _index(b'"format": 1', b'"format": 2'),
        _index(b'"ood-bolts:', b'"ood-nuts:'),
        _index(b'"ood-bolts:', b'"ood-'),
        _index(b'"ood-bolts:', b'"ood-bolts", "x": "'),
        _index(b'"ood-backbone-resnet18:', b'"ood-backbone-../x:'),
        _index(b'"product/manifest.json"', b'"product/../../manifest.json"'),
        _index(b'"product/manifest.json": ', b'"product/manifest.json": 99999999999999'),
        _index(b'"product/manifest.json": ', b'"product/manifest.json": -'),
        _index(b'"backbone/network.bin"', b'"elsewhere/network.bin"'),
    ],
)
def test_hostile_files_are_refused_and_write_nothing(
    bento_home: Path, tmp_path: Path, exported: Path, edit: Callable[[Members], Any]
) -> None:
    hostile = _rewrite(exported, tmp_path / "hostile.tar", edit)
    _empty(bento_home)
    outside = {path for path in tmp_path.rglob("*") if "bentoml" not in path.parts}
    with pytest.raises(ArtifactError):
        import_version(hostile)
    assert snapshot(bento_home) == {}
    assert {path for path in tmp_path.rglob("*") if "bentoml" not in path.parts} == outside


def test_a_link_in_the_place_of_a_file_is_refused_before_anything_is_written(tmp_path: Path, exported: Path) -> None:
    with pytest.raises(ArtifactError, match=r"memory_bank\.safetensors', which its index does not allow"):
        import_version(_rewrite(exported, tmp_path / "hostile.tar", _link))


def test_what_says_that_it_is_too_large_is_refused(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "MAX_BYTES", 100)
    with pytest.raises(ArtifactError, match="no version is that large"):
        import_version(exported)


def test_another_backbone_than_the_versions_own_is_refused(
    fit: Fit, tmp_path: Path, bento_home: Path, exported: Path
) -> None:
    other = artifacts.write_backbone(TinyBackbone(), backbone_folder(tmp_path / "other", b"weightz"))
    stored = read_version(_tag())
    stream = io.BytesIO()
    entry = stored.manifest.backbone.model_copy(update={"tag": str(other)})
    swapped = stored.manifest.model_copy(update={"backbone": entry})
    transfer.pack(artifacts.Stored(stored.path, stored.tag, swapped, {str(other): names.folder_of(other)}), stream)
    _empty(bento_home)
    stream.seek(0)
    with pytest.raises(ArtifactError, match="another backbone"):
        transfer.unpack(stream, "stream")
    assert snapshot(bento_home) == {}


def test_places_that_are_none(fit: Fit, tmp_path: Path) -> None:
    tag = fit()
    with pytest.raises(BadParameter, match="name a file in a folder that exists"):
        export_version(tag, tmp_path)
    with pytest.raises(BadParameter, match="name a file in a folder that exists"):
        export_version(tag, tmp_path / "none" / "bolts.tar")
    for missing in (tmp_path, tmp_path / "none.tar"):
        with pytest.raises(NotFound, match="There is no file"):
            import_version(missing)
    (tmp_path / "text.tar").write_text("not a tar")
    with pytest.raises(ArtifactError, match=r"text\.tar is damaged, or no file that `export` wrote"):
        import_version(tmp_path / "text.tar")


def test_a_full_disk_leaves_nothing(fit: Fit, bento_home: Path, tmp_path: Path) -> None:
    def large(folder: Path) -> None:
        (folder / "large.bin").write_bytes(bytes(3 * 2**20))

    tag = artifacts.write_version(describe("bolts", _backbone()), large)
    small = tmp_path / "small"
    small.mkdir()
    with mounted(small, "-t", "tmpfs", "-o", "size=2m", "tmpfs"):
        with pytest.raises(ArtifactError, match=f"disk is full: could not write bolts.tar in {small}"):
            export_version(tag, small / "bolts.tar")
        assert list(small.iterdir()) == []
    exported = export_version(tag, tmp_path / "bolts.tar")
    _empty(bento_home)
    with mounted(bento_home, "-t", "tmpfs", "-o", "size=2m", "tmpfs"):
        (bento_home / "models").mkdir()
        with pytest.raises(ArtifactError, match=rf"disk is full: could not import bolts\.tar in {bento_home}"):
            import_version(exported)
        assert snapshot(bento_home) == {}
    assert import_version(exported) == tag


def _backbone() -> Tag:
    return bentoml.models.list("ood-backbone-resnet18")[0].tag
