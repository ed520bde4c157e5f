"""The networks in torch, each as a chain of stages that can be tapped or cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ood_runners.backbones.spec import LOGITS, get_spec, head_weight

STEM = "stem"


@dataclass(frozen=True)
class Stage:
    """A link of the chain: its name (a layer, ``stem`` or ``logits``), its state-dict prefixes, its function."""

    name: str
    prefixes: tuple[str, ...]
    run: Callable[[Tensor], Tensor]

    def owns(self, key: str) -> bool:
        """Whether this state-dict key belongs to the stage."""
        return key.startswith(self.prefixes)


def _build_resnet(name: str, n_classes: int) -> nn.Module:
    from torchvision import models

    builder: Callable[..., nn.Module] = getattr(models, "resnet50" if name == "resnet50_v1" else name)
    network = builder(weights=None, num_classes=n_classes)
    if name == "resnet50_v1":
        # He et al. 2015 halve the grid in the first 1x1 convolution; torchvision's v1.5 in the 3x3.
        for layer in (network.layer2, network.layer3, network.layer4):
            block: Any = layer[0]  # type: ignore[index]
            block.conv1.stride, block.conv2.stride = (2, 2), (1, 1)
    return network


def _resnet_stages(network: Any) -> list[Stage]:
    def stem(x: Tensor) -> Tensor:
        return network.maxpool(network.relu(network.bn1(network.conv1(x))))

    layers = [Stage(f"layer{i}", (f"layer{i}.",), getattr(network, f"layer{i}")) for i in range(1, 5)]
    head = Stage(LOGITS, ("fc.",), lambda x: network.fc(x.mean((2, 3))))
    return [Stage(STEM, ("conv1.", "bn1."), stem), *layers, head]


class _SameConv2d(nn.Conv2d):
    """TensorFlow's SAME padding for even sizes: a stride of 2 pads one pixel less at the top and left."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)
        before = (kernel - stride) // 2
        after = kernel - stride - before
        self.pads = (before, after, before, after) if kernel > 1 else (0, 0, 0, 0)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(input, self.pads) if any(self.pads) else input)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)  # TensorFlow's epsilon


class _InvertedBottleneck(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self._expand_conv = _SameConv2d(inputs, inner, 1) if expansion > 1 else None
        self._bn0 = _norm(inner) if expansion > 1 else None
        self._depthwise_conv = _SameConv2d(inner, inner, kernel, stride, groups=inner)
        self._bn1 = _norm(inner)
        self._project_conv = _SameConv2d(inner, outputs, 1)
        self._bn2 = _norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        if self._expand_conv is not None and self._bn0 is not None:
            y = nn.functional.relu6(self._bn0(self._expand_conv(y)))
        y = nn.functional.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


# expansion, outputs, blocks, stride of the first, kernel; the paper's stages 2 to 8
_LITE0_BLOCKS = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0: no squeeze-and-excitation, ReLU6, stem and head of fixed width.

    The names are those of the published state dict
    (https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite).
    """

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        self._conv_stem = _SameConv2d(3, 32, 3, 2)
        self._bn0 = _norm(32)
        blocks: list[nn.Module] = []
        inputs = 32
        for expansion, outputs, repeats, stride, kernel in _LITE0_BLOCKS:
            for i in range(repeats):
                blocks.append(_InvertedBottleneck(inputs, outputs, kernel, stride if i == 0 else 1, expansion))
                inputs = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = _SameConv2d(inputs, 1280, 1)
        self._bn1 = _norm(1280)
        self._fc = nn.Linear(1280, n_classes)

    def stages(self) -> list[Stage]:
        """The chain; the stem takes in stage 2."""

        def stem(x: Tensor) -> Tensor:
            return self._blocks[0](nn.functional.relu6(self._bn0(self._conv_stem(x))))

        def head(x: Tensor) -> Tensor:
            return nn.functional.relu6(self._bn1(self._conv_head(x)))

        stages = [Stage(STEM, ("_conv_stem.", "_bn0.", "_blocks.0."), stem)]
        start = 1
        for number, (_, _, repeats, _, _) in enumerate(_LITE0_BLOCKS[1:], start=3):
            prefixes = tuple(f"_blocks.{i}." for i in range(start, start + repeats))
            stages.append(Stage(f"stage{number}", prefixes, nn.Sequential(*self._blocks[start : start + repeats])))
            start += repeats
        stages.append(Stage("head", ("_conv_head.", "_bn1."), head))
        stages.append(Stage(LOGITS, ("_fc.",), lambda x: self._fc(x.mean((2, 3)))))
        return stages


def build_network(name: str, n_classes: int = 1000) -> tuple[nn.Module, list[Stage]]:
    """The network and its chain, on the device of the context (``meta``: shapes without memory)."""
    if name == "efficientnet_lite0":
        lite = EfficientNetLite0(n_classes)
        return lite, lite.stages()
    network = _build_resnet(name, n_classes)
    return network, _resnet_stages(network)


def count_classes(name: str, state: Mapping[str, Tensor]) -> int | None:
    """How many classes the head of a state dict has; None where it has none."""
    key = head_weight(name)
    return int(state[key].shape[0]) if key in state and state[key].ndim == 2 else None


def fold_norms(network: nn.Module) -> None:
    """Put each batch normalisation's scale and shift into the convolution before it: the same function, one pass less.

    In all these networks a normalisation is registered right behind the convolution whose output it takes.
    """
    for module in list(network.modules()):
        before: nn.Module | None = None
        for name, child in list(module.named_children()):
            if isinstance(before, nn.Conv2d) and isinstance(child, nn.BatchNorm2d) and before.weight is not None:
                if child.running_mean is None or child.running_var is None:
                    raise ValueError(f"{name} has no statistics to fold")
                before.weight, before.bias = fuse_conv_bn_weights(
                    before.weight,
                    before.bias,
                    child.running_mean,
                    child.running_var,
                    child.eps,
                    child.weight,
                    child.bias,
                )
                setattr(module, name, nn.Identity())
            before = child


def _drop_unfilled(network: nn.Module) -> None:
    """Take away the parameters that no weights came for, so that the rest can be moved between devices."""
    for module in network.modules():
        for key, value in list(module.named_parameters(recurse=False)):
            if value.is_meta:
                module.register_parameter(key, None)
        for key, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                module.register_buffer(key, None)


class TapNetwork(nn.Module):
    """uint8 NHWC pictures in; every stage's output, by name, and the logits out.

    Built from a state dict that fits (see `weights.fit_state`); the stages it does not reach are cut off.

    Attributes
    ----------
    dtype : what all stages but the logits compute in; see `compute_in`
    """

    mean: Tensor
    std: Tensor
    dtype: torch.dtype = torch.float32

    def __init__(self, name: str, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.name = name
        spec = get_spec(name)
        with torch.device("meta"):
            self.network, stages = build_network(name, count_classes(name, state) or 1000)
        self.stages = [stage for stage in stages if any(stage.owns(key) for key in state)]
        counters = {key: torch.tensor(0) for key in self.network.state_dict() if key.endswith("num_batches_tracked")}
        self.network.load_state_dict(counters | dict(state), strict=False, assign=True)
        _drop_unfilled(self.network)
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(spec.std).view(1, 3, 1, 1) * 255)
        self.eval().requires_grad_(False)

    @property
    def names(self) -> list[str]:
        """The outputs' names: layers, then ``logits`` where there is a head."""
        return [stage.name for stage in self.stages if stage.name != STEM]

    def cut_after(self, names: set[str]) -> None:
        """Drop the stages behind the last of the given outputs."""
        last = max(i for i, stage in enumerate(self.stages) if stage.name in names)
        self.stages = self.stages[: last + 1]

    def compute_in(self, dtype: torch.dtype) -> None:
        """Compute in float16, say, what is long to compute: all but the normalisation of pixels and the final layer."""
        self.dtype = dtype
        for stage in self.stages:
            if stage.name != LOGITS:
                for key, value in self.network.named_parameters():
                    if stage.owns(key):
                        value.data = value.data.to(dtype)

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        """uint8 (n, h, w, 3) to one (n, c, gh, gw) of `dtype` a layer and float32 (n, k) logits, in `names`' order."""
        x = (pictures.permute(0, 3, 1, 2).float() - self.mean) / self.std
        outputs = []
        for stage in self.stages:
            x = stage.run(x.to(torch.float32 if stage.name == LOGITS else self.dtype))
            if stage.name != STEM:
                outputs.append(x)
        return tuple(outputs)
