"""Listing, showing and carrying versions; the store's own behaviour is tested in tests/artifacts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bentoml import Tag
from typer.testing import CliRunner, Result

from ood_runners import artifacts
from ood_runners.artifacts import write_backbone, write_version
from ood_runners.cli import app
from tests.artifacts.samples import TinyBackbone, backbone_folder, describe, fill, snapshot

Store = Callable[..., str]


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture
def store(bento_home: Path, tmp_path: Path) -> Store:
    """Put a version of `product` into the store; its name as ``product:version``."""
    backbone: Tag = write_backbone(TinyBackbone(), backbone_folder(tmp_path / "exported"))

    def put(product: str, **changes: Any) -> str:
        tag = write_version(describe(product, backbone, **changes), fill)
        return f"{product}:{tag.version}"

    return put


def test_list_marks_what_is_in_production(store: Store) -> None:
    first, second, other = store("bolts"), store("bolts"), store("nuts")
    artifacts.promote(first)
    lines = run("list").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [first, second, other]
    assert ["production" in line for line in lines[1:]] == [True, False, False]
    assert "ood-backbone-resnet18:" in lines[1]
    only = run("list", "--product", "nuts").stdout
    assert other in only
    assert first not in only


def test_list_says_what_is_wrong_with_a_damaged_version(store: Store, bento_home: Path) -> None:
    name = store("bolts")
    product, version = name.split(":")
    (bento_home / "models" / f"ood-{product}" / version / "manifest.json").write_text("{")
    result = run("list")
    assert result.exit_code == 0
    assert "manifest.json" in result.stdout


def test_show_tells_origin_alpha_and_history(store: Store) -> None:
    calibration = {"method": "cross-fitted", "n": 50, "folds": 5, "alpha_requested": 0.01, "alpha": 1 / 51}
    skipped = [{"path": "a/broken.png", "reason": "it is empty"}]
    data = {"layout": "folder", "fingerprint": "f", "train_count": 50, "skipped": skipped}
    name = store("bolts", calibration=calibration, data=data)
    artifacts.promote(name, who="ada", why="first light")
    shown = run("show", "bolts").stdout
    for fact in (
        name,
        "0.0196 (0.01 asked for)",
        "a/broken.png (it is empty)",
        "50 scores, 5 folds",
        "ada",
        "first light",
    ):
        assert fact in shown


def test_a_version_is_carried_to_another_store(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = store("bolts")
    file = tmp_path / "bolts.oodmodel"
    exported = run("export", name, file)
    assert (exported.exit_code, exported.stdout) == (0, f"{file}\n")
    artifacts.delete_version(name)
    assert run("show", name).exit_code == 1
    imported = run("import", file)
    assert (imported.exit_code, imported.stdout) == (0, f"{name}\n")
    assert name in run("show", name).stdout


def test_what_is_no_export_leaves_the_store_as_it_was(store: Store, tmp_path: Path, bento_home: Path) -> None:
    store("bolts")
    before = snapshot(bento_home)
    file = tmp_path / "notes.txt"
    file.write_text("not a version")
    result = run("import", file)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert snapshot(bento_home) == before
