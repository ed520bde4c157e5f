from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from bentoml import Tag

from ood_runners import artifacts
from ood_runners.artifacts import list_versions, names, prune, write_backbone, write_version
from ood_runners.artifacts.prune import RECENTLY_S
from ood_runners.errors import BadParameter, NotFound
from tests.artifacts.samples import TinyBackbone, backbone_folder, describe, fill, snapshot

Fit = Callable[..., Tag]


def tags(product: str = "bolts") -> list[Tag]:
    return [info.tag for info in list_versions(product)]


def age(tag: Tag) -> None:
    """As if it had been stored two days ago."""
    folder = names.folder_of(tag)
    then = folder.stat().st_mtime - 2 * RECENTLY_S
    os.utime(folder, (then, then))


def test_the_last_ones_stay(fit: Fit) -> None:
    made = [fit(seed=seed) for seed in range(5)]
    other = fit("nuts")
    size = sum(info.size for info in list_versions("bolts")[:3])
    pruned = prune(keep=2)
    assert (pruned.versions, pruned.backbones, pruned.size) == (made[:3], [], size)
    assert tags() == made[3:]
    assert tags("nuts") == [other]
    assert prune(keep=2).versions == []


def test_production_and_one_rollback_stay(fit: Fit) -> None:
    made = [fit(seed=seed) for seed in range(6)]
    for tag in (made[0], made[1], made[2]):
        artifacts.promote(tag)
    pruned = prune("bolts", 1)
    assert pruned.versions == [made[0], made[3], made[4]]
    assert [line.split(" ", 1)[1] for line in pruned.kept[:2]] == ["(in production)", "(a rollback goes there)"]
    assert tags() == [made[1], made[2], made[5]]
    assert artifacts.rollback("bolts").to == made[1].version


def test_after_a_rollback_the_version_that_was_fled_from_is_not_kept(fit: Fit) -> None:
    made = [fit(seed=seed) for seed in range(4)]
    for tag in made[:3]:
        artifacts.promote(tag)
    artifacts.rollback("bolts")
    assert prune(keep=1).versions == [made[2]]
    assert artifacts.rollback("bolts").to == made[0].version


def test_a_dry_run_changes_nothing(fit: Fit, bento_home: Path) -> None:
    made = [fit(seed=seed) for seed in range(3)]
    before = snapshot(bento_home)
    assert prune(keep=1, dry_run=True).versions == made[:2]
    assert snapshot(bento_home) == before


@pytest.fixture
def second_backbone(bento_home: Path, tmp_path: Path) -> Tag:
    return write_backbone(TinyBackbone(), backbone_folder(tmp_path / "second", b"other weights"))


def test_a_backbone_goes_with_the_last_version_that_needs_it(
    fit: Fit, backbone: Tag, second_backbone: Tag, tmp_path: Path
) -> None:
    old = write_version(describe("bolts", second_backbone), fill)
    also = write_version(describe("nuts", second_backbone), fill)
    newer = fit()
    age(backbone)
    age(second_backbone)
    pruned = prune("bolts", 1)
    assert (pruned.versions, pruned.backbones) == ([old], [])
    newest = fit("nuts")
    dry = prune(keep=1, dry_run=True)
    assert (dry.versions, dry.backbones) == ([also], [second_backbone])
    size = sum(path.stat().st_size for path in names.folder_of(second_backbone).rglob("*"))
    assert dry.size > size
    assert prune(keep=1) == dry
    assert not names.folder_of(second_backbone).exists()
    for tag in (newer, newest):
        artifacts.read_version(tag)


def test_a_backbone_that_a_fit_may_be_about_to_need_stays(fit: Fit, second_backbone: Tag) -> None:
    fit()
    assert "a fit may need it" in prune().kept[0]
    age(second_backbone)
    artifacts.find_backbone("resnet18", TinyBackbone.sha256)  # as a fit does, which has taken one of the two
    pruned = prune()
    assert len(pruned.backbones) + len(pruned.kept) == 1
    assert names.folder_of(second_backbone).exists() == (not pruned.backbones)


def test_writing_a_backbone_that_is_there_already_keeps_it(second_backbone: Tag, tmp_path: Path) -> None:
    age(second_backbone)
    assert write_backbone(TinyBackbone(), tmp_path / "second") == second_backbone
    assert prune().backbones == []


def test_a_damaged_version_keeps_all_backbones(fit: Fit, second_backbone: Tag) -> None:
    tag = fit()
    age(second_backbone)
    (names.folder_of(tag) / "manifest.json").write_text("{")
    pruned = prune()
    assert pruned.backbones == []
    assert f"{tag} is damaged" in pruned.kept[0]


def test_what_cannot_be_meant(fit: Fit) -> None:
    fit()
    with pytest.raises(BadParameter, match="At least one"):
        prune(keep=0)
    with pytest.raises(NotFound, match="no product 'nuts'; the store has: bolts"):
        prune("nuts")
