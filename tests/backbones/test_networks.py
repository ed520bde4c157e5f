from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
import torchvision
from numpy.typing import NDArray
from torch import Tensor

from ood_runners.backbones.architecture import State, network_of
from ood_runners.backbones.graph import graph_of
from ood_runners.backbones.networks import TapNetwork
from ood_runners.backbones.weights import fit_state, load_weights
from ood_runners.images import read, resize


def normalised(pictures: NDArray[np.uint8]) -> Tensor:
    preset = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.transforms()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preset.mean, preset.std))
    return (torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255 - mean) / std


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "wide_resnet50_2"])
def test_layers_are_torchvisions(name: str, pictures: NDArray[np.uint8]) -> None:
    torch.manual_seed(0)
    reference = getattr(torchvision.models, name)(weights=None, num_classes=7)
    x = normalised(pictures)
    with torch.no_grad():
        reference.train()
        reference(x)  # statistics that are not 0 and 1
        reference.eval()
        y = reference.maxpool(reference.relu(reference.bn1(reference.conv1(x))))
        expected = {"logits": reference(x).numpy()}
        for layer in ("layer1", "layer2", "layer3", "layer4"):
            y = getattr(reference, layer)(y)
            expected[layer] = y.numpy()
    state = fit_state(name, reference.state_dict(), "x")
    network = TapNetwork(name, state)
    in_torch = dict(zip(network.names, network(torch.from_numpy(pictures)), strict=True))
    in_openvino = ov.compile_model(graph_of(network_of(name), state), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(
        pictures
    )
    for layer, array in expected.items():
        for found in (in_torch[layer].numpy(), in_openvino[layer]):
            assert np.abs(found - array).max() < 1e-4 * np.abs(array).max(), layer


def test_all_but_the_logits_are_computed_in_what_is_asked_for(
    resnet18_state: dict[str, Tensor], pictures: NDArray[np.uint8]
) -> None:
    network = TapNetwork("resnet18", fit_state("resnet18", resnet18_state, "x"))
    before = network(torch.from_numpy(pictures))
    network.compute_in(torch.bfloat16)
    found = network(torch.from_numpy(pictures))
    assert [one.dtype for one in found] == [torch.bfloat16] * 4 + [torch.float32]
    for plain, rough in zip(before, found, strict=True):
        assert 1e-4 < float((plain - rough).abs().max() / plain.abs().max()) < 0.05


def test_cut_networks_stop_at_their_last_layer(resnet18_state: dict[str, Tensor], pictures: NDArray[np.uint8]) -> None:
    state = {k: v for k, v in resnet18_state.items() if not k.startswith(("layer3", "layer4", "fc"))}
    network = TapNetwork("resnet18", fit_state("resnet18", state, "x"))
    assert network.names == ["layer1", "layer2"]
    assert len(network(torch.from_numpy(pictures))) == 2
    network.cut_after({"layer1"})
    assert network.names == ["layer1"]
    assert len(network(torch.from_numpy(pictures))) == 1
    assert len(network.convolutions) == 1 + 4
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


def _top_1(name: str, state: State, photographs: tuple[Tensor, NDArray[np.int64]]) -> float:
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
