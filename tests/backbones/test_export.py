from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import safetensors
import safetensors.torch
import torch
import torchvision
from numpy.typing import NDArray
from torch import Tensor

from ood_runners.backbones import BackboneInfo, export_backbone
from ood_runners.backbones.networks import TapNetwork
from ood_runners.backbones.weights import fit_state, hash_state


def test_the_folder_holds_graph_weights_and_info(resnet18_folder: Path, resnet18_state: dict[str, Tensor]) -> None:
    assert sorted(path.name for path in resnet18_folder.iterdir()) == [
        "backbone.json",
        "network.bin",
        "network.xml",
        "weights.safetensors",
    ]
    info = BackboneInfo.load(resnet18_folder)
    assert (info.layers, info.has_logits, info.n_classes, info.classes) == (
        ("layer1", "layer2", "layer3", "layer4"),
        True,
        7,
        None,
    )
    assert info.sha256 == hash_state(fit_state("resnet18", resnet18_state, "x"))


@pytest.mark.parametrize("size", [(96, 128), (65, 33)])
def test_the_graph_equals_torch_at_any_size(
    size: tuple[int, int], resnet18_folder: Path, resnet18_state: dict[str, Tensor], pictures: NDArray[np.uint8]
) -> None:
    part = np.ascontiguousarray(pictures[:2, : size[0], : size[1]])
    network = TapNetwork("resnet18", fit_state("resnet18", resnet18_state, "x"))
    compiled = ov.compile_model(resnet18_folder / "network.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    results = compiled(part)
    for name, expected in zip(network.names, network(torch.from_numpy(part)), strict=True):
        found = results[name]
        assert found.dtype == np.float32
        assert np.abs(found - expected.numpy()).max() <= 1e-4 * np.abs(expected.numpy()).max()


def test_exported_weights_can_be_given_again(resnet18_folder: Path, tmp_path: Path) -> None:
    with safetensors.safe_open(resnet18_folder / "weights.safetensors", "np") as file:
        assert file.metadata()["arch"] == "resnet18"
    again = export_backbone("resnet18", resnet18_folder / "weights.safetensors", tmp_path / "again")
    assert again.sha256 == BackboneInfo.load(resnet18_folder).sha256


def test_a_network_without_its_end(resnet18_state: dict[str, Tensor], tmp_path: Path) -> None:
    state = {k: v for k, v in resnet18_state.items() if not k.startswith(("layer4", "fc"))}
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    info = export_backbone("resnet18", tmp_path / "w.safetensors", tmp_path / "out")
    assert (info.layers, info.has_logits, info.n_classes) == (("layer1", "layer2", "layer3"), False, None)
    outputs = ov.Core().read_model(tmp_path / "out" / "network.xml").outputs
    assert [output.any_name for output in outputs] == ["layer1", "layer2", "layer3"]


def test_imagenet_heads_know_their_classes(lite0_folder: Path) -> None:
    info = BackboneInfo.load(lite0_folder)
    assert info.classes is not None
    assert len(info.classes) == info.n_classes == 1000
    assert info.classes == tuple(torchvision.models.ResNet50_Weights.IMAGENET1K_V1.meta["categories"])


def test_safetensors_are_exported_without_torch(resnet18_file: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from ood_runners.backbones import export_backbone\n"
        "export_backbone('resnet18', *map(Path, sys.argv[1:])); print('torch' in sys.modules)"
    )
    given = [sys.executable, "-c", code, str(resnet18_file), str(tmp_path)]
    assert subprocess.run(given, capture_output=True, text=True, check=True).stdout == "False\n"
