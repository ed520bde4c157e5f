from __future__ import annotations

import json
from pathlib import Path

import pytest

from ood_runners.backbones import BACKBONES, BackboneInfo, get_spec
from ood_runners.errors import ArtifactError, BadParameter

INFO = BackboneInfo("resnet18", "ab" * 32, "file x", ("layer1", "layer2"), False)


@pytest.mark.parametrize("name", BACKBONES)
def test_default_layers_exist_and_the_embedding_is_the_last(name: str) -> None:
    spec = get_spec(name)
    assert set(spec.patch_layers) | set(spec.pooled_layers) <= set(spec.layers)
    assert list(spec.layers)[-1] == spec.embedding


def test_an_unknown_name_lists_those_that_exist() -> None:
    with pytest.raises(BadParameter, match=r"'resnet51'.*resnet50, resnet50_v1, wide_resnet50_2"):
        get_spec("resnet51")


def test_info_survives_the_file(tmp_path: Path) -> None:
    info = BackboneInfo("resnet50", "cd" * 32, "torchvision", ("layer1",), True, 2, ("cat", "dog"))
    for case in (INFO, info):
        case.save(tmp_path)
        assert BackboneInfo.load(tmp_path) == case


def test_usable_layers_keep_their_order() -> None:
    assert INFO.usable(("layer3", "layer2", "layer1")) == ("layer2", "layer1")


def test_a_missing_or_damaged_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"backbone\.json"):
        BackboneInfo.load(tmp_path)
    for text in ("{", "[]", "{}", '{"transform": 1}'):
        (tmp_path / "backbone.json").write_text(text)
        with pytest.raises(ArtifactError, match="holds no readable backbone"):
            BackboneInfo.load(tmp_path)


def test_another_transform_is_refused(tmp_path: Path) -> None:
    INFO.save(tmp_path)
    path = tmp_path / "backbone.json"
    data = json.loads(path.read_text())
    data["transform"]["mean"][0] = 0.5
    path.write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="another input transform"):
        BackboneInfo.load(tmp_path)
