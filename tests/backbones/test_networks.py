from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from numpy.typing import NDArray
from torch import Tensor

from ood_runners.backbones import BACKBONES, get_spec
from ood_runners.backbones.networks import TapNetwork, build_network, fold_norms
from ood_runners.backbones.weights import load_weights
from ood_runners.images import read, resize


@pytest.mark.parametrize("name", BACKBONES)
def test_layers_have_the_stride_and_channels_of_the_spec(name: str) -> None:
    with torch.device("meta"):
        network, stages = build_network(name)
        network.eval()
        x = torch.zeros(1, 3, 192, 256)
    assert [stage.name for stage in stages] == ["stem", *get_spec(name).layers, "logits"]
    for stage in stages:
        x = stage.run(x)
        if stage.name in get_spec(name).layers:
            layer = get_spec(name).layers[stage.name]
            assert x.shape == (1, layer.channels, 192 // layer.stride, 256 // layer.stride)
    assert x.shape == (1, 1000)


@pytest.mark.parametrize("name", BACKBONES)
def test_every_key_belongs_to_one_stage(name: str) -> None:
    with torch.device("meta"):
        network, stages = build_network(name)
    for key in network.state_dict():
        assert sum(stage.owns(key) for stage in stages) == 1, key


def test_taps_are_torchvisions(resnet18_state: dict[str, Tensor], pictures: NDArray[np.uint8]) -> None:
    reference = torchvision.models.resnet18(weights=None, num_classes=7).eval()
    reference.load_state_dict(resnet18_state)
    preset = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    x = (torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255 - torch.tensor(preset.mean).view(3, 1, 1)) / torch.tensor(
        preset.std
    ).view(3, 1, 1)
    network = TapNetwork("resnet18", resnet18_state)
    outputs = dict(zip(network.names, network(torch.from_numpy(pictures)), strict=True))
    assert torch.allclose(outputs["logits"], reference(x), atol=1e-5)
    stem = reference.maxpool(reference.relu(reference.bn1(reference.conv1(x))))
    assert torch.allclose(outputs["layer2"], reference.layer2(reference.layer1(stem)), atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0"])
def test_folded_normalisations_change_nothing(
    name: str, resnet18_state: dict[str, Tensor], pictures: NDArray[np.uint8]
) -> None:
    network = TapNetwork(name, resnet18_state if name == "resnet18" else load_weights(name, None)[0])
    before = network(torch.from_numpy(pictures))
    fold_norms(network.network)
    for plain, folded in zip(before, network(torch.from_numpy(pictures)), strict=True):
        assert float((plain - folded).abs().max()) < 1e-5 * float(plain.abs().max())


@pytest.mark.parametrize("name", BACKBONES)
def test_every_normalisation_is_folded(name: str) -> None:
    with torch.device("meta"):
        network = build_network(name)[0]
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
    fold_norms(network)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())


def test_all_but_the_logits_are_computed_in_what_is_asked_for(
    resnet18_state: dict[str, Tensor], pictures: NDArray[np.uint8]
) -> None:
    network = TapNetwork("resnet18", resnet18_state)
    before = network(torch.from_numpy(pictures))
    fold_norms(network.network)
    network.compute_in(torch.bfloat16)
    found = network(torch.from_numpy(pictures))
    assert [one.dtype for one in found] == [torch.bfloat16] * 4 + [torch.float32]
    for plain, rough in zip(before, found, strict=True):
        assert 1e-4 < float((plain - rough).abs().max() / plain.abs().max()) < 0.05


def test_the_two_resnet50_differ_in_where_they_stride() -> None:
    for name, first, second in (("resnet50", (1, 1), (2, 2)), ("resnet50_v1", (2, 2), (1, 1))):
        network = build_network(name)[0]
        for layer in ("layer2", "layer3", "layer4"):
            block = network.get_submodule(f"{layer}.0")
            assert (block.conv1.stride, block.conv2.stride) == (first, second)


def test_cut_networks_stop_at_their_last_layer(resnet18_state: dict[str, Tensor], pictures: NDArray[np.uint8]) -> None:
    state = {k: v for k, v in resnet18_state.items() if not k.startswith(("layer3", "layer4", "fc"))}
    network = TapNetwork("resnet18", state)
    assert network.names == ["layer1", "layer2"]
    assert len(network(torch.from_numpy(pictures))) == 2
    network.cut_after({"layer1"})
    assert network.names == ["layer1"]
    network.to("cpu", torch.float64)  # nothing left behind on the meta device


def _centre(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Short side to 256, the middle 224: how classifiers are measured."""
    scale = 256 / min(picture.shape[:2])
    h, w = (max(256, round(side * scale)) for side in picture.shape[:2])
    return resize(picture, (h, w))[(h - 224) // 2 :, (w - 224) // 2 :][:224, :224]


@pytest.fixture(scope="module")
def photographs(shared_data: Path) -> tuple[Tensor, NDArray[np.int64]]:
    """Every tenth ImageNet picture, uint8 (50, 224, 224, 3), and its class; file names are ``<wnid>_<class>.jpg``."""
    names = [c.replace(" ", "_") for c in torchvision.models.ResNet50_Weights.IMAGENET1K_V1.meta["categories"]]
    files = sorted((shared_data / "ood_dev" / "id_imagenet").iterdir())[::10]
    classes = np.array([names.index(file.stem.split("_", 1)[1]) for file in files])
    return torch.from_numpy(np.stack([_centre(read(file)) for file in files])), classes


def _top_1(name: str, state: dict[str, Tensor], photographs: tuple[Tensor, NDArray[np.int64]]) -> float:
    network = TapNetwork(name, state)
    with torch.inference_mode():
        best = torch.cat([network(part)[-1].argmax(1) for part in photographs[0].split(20)])
    return float((best.numpy() == photographs[1]).mean())


def test_efficientnet_lite0_names_real_pictures(photographs: tuple[Tensor, NDArray[np.int64]]) -> None:
    assert _top_1("efficientnet_lite0", load_weights("efficientnet_lite0", None)[0], photographs) >= 0.8


def test_resnet50_v1_names_real_pictures(photographs: tuple[Tensor, NDArray[np.int64]], shared_weights: Path) -> None:
    # 0.862 on all 500 pictures of the set.
    state, _ = load_weights("resnet50_v1", shared_weights / "resnet50_v1_full_int8.safetensors")
    right = _top_1("resnet50_v1", state, photographs)
    assert right >= 0.8
    assert right > _top_1("resnet50", state, photographs) + 0.05  # the same weights with the stride elsewhere
