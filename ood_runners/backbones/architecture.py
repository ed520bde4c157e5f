"""The networks as lists of convolutions: what weights they need, and what `graph` and `networks` compute with them.

References
----------
He et al., "Deep Residual Learning for Image Recognition", CVPR 2016. Zagoruyko and Komodakis, "Wide Residual
Networks", BMVC 2016. Tan and Le, "EfficientNet", ICML 2019, and its Lite variant
(https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite), whose state dicts are named so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ood_runners.backbones.spec import LOGITS, get_spec, head_weight

STEM = "stem"
State = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Convolution:
    """A convolution without bias and the batch normalisation behind it.

    Attributes
    ----------
    key, norm : the state-dict prefixes of the two
    pads : pixels of zeros before (top, left) and after (bottom, right)
    eps : of the normalisation
    """

    key: str
    norm: str
    inputs: int
    outputs: int
    kernel: int
    stride: int
    pads: tuple[int, int]
    eps: float
    groups: int = 1

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of its tensors, by state-dict key."""
        tensors = ("weight", "bias", "running_mean", "running_var")
        weight = (self.outputs, self.inputs // self.groups, self.kernel, self.kernel)
        return {f"{self.key}.weight": weight} | {f"{self.norm}.{name}": (self.outputs,) for name in tensors}

    def folded(self, state: State) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Weight float32 (outputs, inputs / groups, k, k) and bias float32 (outputs,), the normalisation in them."""
        weight, gain, shift, mean, variance = (state[key].astype(np.float64) for key in self.shapes())
        scale = gain / np.sqrt(variance + self.eps)
        folded = weight * scale[:, np.newaxis, np.newaxis, np.newaxis]
        return folded.astype(np.float32), (shift - mean * scale).astype(np.float32)


@dataclass(frozen=True)
class Block:
    """Convolutions one after the other, a rectifier between any two.

    Attributes
    ----------
    residual : whether the input is added to what comes out
    shortcut : of the input first, where the two differ in shape
    rectified : whether a rectifier follows at the end
    """

    chain: tuple[Convolution, ...]
    residual: bool = False
    shortcut: Convolution | None = None
    rectified: bool = True

    def convolutions(self) -> tuple[Convolution, ...]:
        """All of them."""
        return (*self.chain, self.shortcut) if self.shortcut is not None else self.chain


@dataclass(frozen=True)
class Stage:
    """A link of the network's chain: a layer that can be tapped, or the ``stem``.

    Attributes
    ----------
    pooled : whether the maximum of 3 x 3 cells is taken at the end, in steps of two
    """

    name: str
    blocks: tuple[Block, ...]
    pooled: bool = False

    def convolutions(self) -> Iterator[Convolution]:
        """All of them, in order."""
        for block in self.blocks:
            yield from block.convolutions()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of its tensors, by state-dict key."""
        return {key: shape for one in self.convolutions() for key, shape in one.shapes().items()}


@dataclass(frozen=True)
class Network:
    """The stages, the first of which is the stem; the final layer comes behind the last one's average.

    Attributes
    ----------
    limit : what rectifiers cut off above, or None
    """

    name: str
    stages: tuple[Stage, ...]
    limit: float | None = None

    def head_shapes(self, classes: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the final layer's tensors, by state-dict key."""
        weight = head_weight(self.name)
        features = get_spec(self.name).layers[self.stages[-1].name].channels
        return {weight: (classes, features), weight.replace("weight", "bias"): (classes,)}

    def reached(self, state: Mapping[str, Any]) -> tuple[Stage, ...]:
        """The stages up to the last one that the state dict has something of; the stem is always among them."""
        last = max((i for i, stage in enumerate(self.stages) if stage.shapes().keys() & state.keys()), default=0)
        return self.stages[: last + 1]

    def names(self, state: Mapping[str, Any]) -> tuple[str, ...]:
        """What the network gives with these weights: layers, then ``logits`` where there is a head."""
        layers = tuple(stage.name for stage in self.reached(state)[1:])
        return (*layers, LOGITS) if head_weight(self.name) in state else layers


def network_of(name: str) -> Network:
    """The network of a backbone; BadParameter for an unknown one."""
    get_spec(name)
    return _lite0() if name == "efficientnet_lite0" else _resnet(name)


def count_classes(name: str, state: Mapping[str, Any]) -> int | None:
    """How many classes the head of a state dict has; None where it has none."""
    key = head_weight(name)
    return int(state[key].shape[0]) if key in state and state[key].ndim == 2 else None


# ---------------------------------------------------------------- residual networks, with torchvision's keys


def _resnet(name: str) -> Network:
    stem = _resnet_convolution("conv1", "bn1", 3, 64, 7, 2)
    stages = [Stage(STEM, (Block((stem,)),), pooled=True)]
    inputs = 64
    for number, blocks in enumerate((2, 2, 2, 2) if name == "resnet18" else (3, 4, 6, 3), start=1):
        layer = []
        for i in range(blocks):
            block = _residual(name, f"layer{number}.{i}.", inputs, 32 << number, 2 if i == 0 and number > 1 else 1)
            inputs = block.chain[-1].outputs
            layer.append(block)
        stages.append(Stage(f"layer{number}", tuple(layer)))
    return Network(name, tuple(stages))


def _residual(name: str, prefix: str, inputs: int, width: int, stride: int) -> Block:
    if name == "resnet18":
        outputs, links = width, [(width, 3, stride), (width, 3, 1)]
    else:
        outputs, inner = 4 * width, 2 * width if name.startswith("wide") else width
        # He et al. 2015 halve the grid in the first 1 x 1 convolution; torchvision's v1.5 in the 3 x 3.
        first, second = (stride, 1) if name == "resnet50_v1" else (1, stride)
        links = [(inner, 1, first), (inner, 3, second), (outputs, 1, 1)]
    chain, given = [], inputs
    for i, (channels, kernel, step) in enumerate(links, start=1):
        chain.append(_resnet_convolution(f"{prefix}conv{i}", f"{prefix}bn{i}", given, channels, kernel, step))
        given = channels
    shortcut = None
    if stride > 1 or inputs != outputs:
        key = f"{prefix}downsample."
        shortcut = _resnet_convolution(f"{key}0", f"{key}1", inputs, outputs, 1, stride)
    return Block(tuple(chain), residual=True, shortcut=shortcut)


def _resnet_convolution(key: str, norm: str, inputs: int, outputs: int, kernel: int, stride: int) -> Convolution:
    return Convolution(key, norm, inputs, outputs, kernel, stride, (kernel // 2, kernel // 2), eps=1e-5)


# ---------------------------------------------------------------- EfficientNet-Lite0

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


def _lite0() -> Network:
    """No squeeze-and-excitation, rectifiers cut off at 6, stem and head of fixed width; the stem takes in stage 2."""
    stages, blocks, inputs = [], [Block((_lite0_convolution("_conv_stem", "_bn0", 3, 32, 3, 2),))], 32
    number = 0
    for stage, (expansion, outputs, count, stride, kernel) in enumerate(_LITE0_BLOCKS, start=2):
        for i in range(count):
            prefix = f"_blocks.{number}."
            blocks.append(_inverted(prefix, inputs, outputs, kernel, stride if i == 0 else 1, expansion))
            inputs, number = outputs, number + 1
        stages.append(Stage(STEM if stage == 2 else f"stage{stage}", tuple(blocks)))
        blocks = []
    head = Block((_lite0_convolution("_conv_head", "_bn1", inputs, 1280, 1, 1),))
    return Network("efficientnet_lite0", (*stages, Stage("head", (head,))), limit=6.0)


def _inverted(prefix: str, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> Block:
    inner = inputs * expansion
    chain: tuple[Convolution, ...] = (
        _lite0_convolution(f"{prefix}_depthwise_conv", f"{prefix}_bn1", inner, inner, kernel, stride, groups=inner),
        _lite0_convolution(f"{prefix}_project_conv", f"{prefix}_bn2", inner, outputs, 1, 1),
    )
    if expansion > 1:
        chain = (_lite0_convolution(f"{prefix}_expand_conv", f"{prefix}_bn0", inputs, inner, 1, 1), *chain)
    return Block(chain, residual=stride == 1 and inputs == outputs, rectified=False)


def _lite0_convolution(
    key: str, norm: str, inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1
) -> Convolution:
    # TensorFlow's SAME padding for even sizes: a stride of 2 pads one pixel less at the top and left.
    before = (kernel - stride) // 2
    pads = (before, kernel - stride - before) if kernel > 1 else (0, 0)
    return Convolution(key, norm, inputs, outputs, kernel, stride, pads, eps=1e-3, groups=groups)
