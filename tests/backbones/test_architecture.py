from __future__ import annotations

import numpy as np
import openvino as ov
import pytest
import torch
import torchvision

from ood_runners.backbones import BACKBONES, get_spec
from ood_runners.backbones.architecture import Convolution, Network, Stage, network_of
from ood_runners.backbones.graph import graph_of

RESNETS = [name for name in BACKBONES if "resnet" in name]


def stages(name: str) -> dict[str, Stage]:
    return {stage.name: stage for stage in network_of(name).stages}


@pytest.mark.parametrize("name", RESNETS)
def test_tensors_are_torchvisions(name: str) -> None:
    with torch.device("meta"):
        reference = getattr(torchvision.models, name.removesuffix("_v1"))(weights=None, num_classes=7)
    wanted = {key: tuple(value.shape) for key, value in reference.state_dict().items() if "num_batches" not in key}
    network = network_of(name)
    found = {key: shape for stage in network.stages for key, shape in stage.shapes().items()}
    assert found | network.head_shapes(7) == wanted
    assert len(found) == sum(len(stage.shapes()) for stage in network.stages)  # each belongs to one stage


@pytest.mark.parametrize("name", BACKBONES)
def test_layers_have_the_stride_and_channels_of_the_spec(name: str) -> None:
    network = network_of(name)
    assert [stage.name for stage in network.stages] == ["stem", *get_spec(name).layers]
    graph = graph_of(network, zeros(network, 5))
    graph.reshape(ov.PartialShape([1, 192, 256, 3]))
    found = {output.any_name: tuple(output.shape) for output in graph.outputs}
    assert found.pop("logits") == (1, 5)
    assert found == {
        layer: (1, spec.channels, 192 // spec.stride, 256 // spec.stride)
        for layer, spec in get_spec(name).layers.items()
    }


def zeros(network: Network, classes: int) -> dict[str, np.ndarray]:
    shapes = {key: shape for stage in network.stages for key, shape in stage.shapes().items()}
    return {key: np.zeros(shape, np.float32) for key, shape in (shapes | network.head_shapes(classes)).items()}


def test_the_two_resnet50_differ_in_where_they_stride() -> None:
    for name, expected in (("resnet50", [1, 2, 1]), ("resnet50_v1", [2, 1, 1])):
        for layer in ("layer2", "layer3", "layer4"):
            first, *others = stages(name)[layer].blocks
            assert [one.stride for one in first.chain] == expected
            assert {one.stride for block in others for one in block.chain} == {1}


def test_lite0_pads_as_tensorflow_does() -> None:
    found = {
        (one.kernel, one.stride): one.pads
        for stage in network_of("efficientnet_lite0").stages
        for one in stage.convolutions()
    }
    assert found == {(1, 1): (0, 0), (3, 1): (1, 1), (5, 1): (2, 2), (3, 2): (0, 1), (5, 2): (1, 2)}


def test_a_state_dict_reaches_as_far_as_it_has_something() -> None:
    network = network_of("resnet18")
    state = zeros(network, 7)
    assert network.names(state) == ("layer1", "layer2", "layer3", "layer4", "logits")
    begun = {key: array for key, array in state.items() if not key.startswith(("layer3.1", "layer4", "fc"))}
    assert network.names(begun) == ("layer1", "layer2", "layer3")
    assert [stage.name for stage in network.reached({})] == ["stem"]


def test_a_folded_normalisation_is_the_normalisation() -> None:
    rng = np.random.default_rng(0)
    one = Convolution("conv", "bn", 6, 8, 3, 1, (1, 1), eps=1e-3, groups=2)
    state = {key: rng.uniform(0.5, 2, shape).astype(np.float32) for key, shape in one.shapes().items()}
    weight, bias = one.folded(state)
    assert weight.dtype == bias.dtype == np.float32
    x = torch.from_numpy(rng.normal(size=(2, 6, 9, 9)).astype(np.float32))
    tensors = {key: torch.from_numpy(array) for key, array in state.items()}
    plain = torch.nn.functional.conv2d(x, tensors["conv.weight"], padding=1, groups=2)
    names = ("running_mean", "running_var", "weight", "bias")
    expected = torch.nn.functional.batch_norm(plain, *(tensors[f"bn.{name}"] for name in names), eps=1e-3)
    found = torch.nn.functional.conv2d(x, torch.from_numpy(weight), torch.from_numpy(bias), padding=1, groups=2)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-4)
