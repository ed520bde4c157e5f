"""Which backbones there are, what their weights expect and which layers can be tapped (no torch here)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ood_runners.errors import ArtifactError, BadParameter

INFO_FILE = "backbone.json"
GRAPH_FILE = "network.xml"
WEIGHTS_FILE = "weights.safetensors"
LOGITS = "logits"

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class LayerSpec:
    """A tapped layer: pixels of the input a cell, and channels."""

    stride: int
    channels: int


@dataclass(frozen=True)
class BackboneSpec:
    """One architecture and the input transform bound to its weights.

    Attributes
    ----------
    layers : mapping of layer name to LayerSpec, from the input to the output
    patch_layers : layers joined into patch features
    pooled_layers : layers whose global averages describe a whole picture
    embedding : the layer whose global average feeds the classification head
    mean, std : of the input's red, green and blue, for values in 0..1
    weights : the address of torchvision's default weights, where it has any
    """

    name: str
    layers: Mapping[str, LayerSpec]
    patch_layers: tuple[str, ...]
    pooled_layers: tuple[str, ...]
    embedding: str
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    weights: str | None = None
    default_size: tuple[int, int] = (224, 224)


def _resnet(name: str, widths: tuple[int, int, int, int], weights: str | None) -> BackboneSpec:
    strides = (4, 8, 16, 32)
    layers = {f"layer{i + 1}": LayerSpec(strides[i], widths[i]) for i in range(4)}
    return BackboneSpec(
        name, MappingProxyType(layers), ("layer2", "layer3"), ("layer2", "layer3", "layer4"), "layer4", weights=weights
    )


_DOWNLOADS = "https://download.pytorch.org/models"
_BOTTLENECK = (256, 512, 1024, 2048)
# The stages are numbered as in table 1 of Tan & Le 2019 (https://arxiv.org/abs/1905.11946).
_LITE0_LAYERS = {
    "stage3": LayerSpec(4, 24),
    "stage4": LayerSpec(8, 40),
    "stage5": LayerSpec(16, 80),
    "stage6": LayerSpec(16, 112),
    "stage7": LayerSpec(32, 192),
    "stage8": LayerSpec(32, 320),
    "head": LayerSpec(32, 1280),
}

# IMAGENET1K_V1 and not V2: the published figures of PatchCore, PaDiM and their successors were measured on V1
# features. V2 came from a longer recipe (label smoothing, mixup, CutMix) that makes the network classify better
# and its middle layers less telling of small local differences.
BACKBONES: Mapping[str, BackboneSpec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            _resnet("resnet50", _BOTTLENECK, f"{_DOWNLOADS}/resnet50-0676ba61.pth"),
            _resnet("resnet50_v1", _BOTTLENECK, None),
            _resnet("wide_resnet50_2", _BOTTLENECK, f"{_DOWNLOADS}/wide_resnet50_2-95faca4d.pth"),
            _resnet("resnet18", (64, 128, 256, 512), f"{_DOWNLOADS}/resnet18-f37072fd.pth"),
            BackboneSpec(
                "efficientnet_lite0",
                MappingProxyType(_LITE0_LAYERS),
                ("stage4", "stage6"),
                ("stage6", "stage7", "head"),
                "head",
                mean=(127 / 255,) * 3,  # (x - 127) / 128 on 0..255, as its TensorFlow original
                std=(128 / 255,) * 3,
            ),
        )
    }
)


def get_spec(name: str) -> BackboneSpec:
    """The backbone of that name; BadParameter names those that exist."""
    if name not in BACKBONES:
        raise BadParameter(f"There is no backbone {name!r}; choose one of {', '.join(BACKBONES)}.")
    return BACKBONES[name]


HEAD_WEIGHT = {"efficientnet_lite0": "_fc.weight"}


def head_weight(name: str) -> str:
    """The state-dict key of the classification head's matrix (k, c)."""
    return HEAD_WEIGHT.get(name, "fc.weight")


@dataclass(frozen=True)
class BackboneInfo:
    """What an exported backbone is.

    Attributes
    ----------
    sha256 : of the weights themselves (float32, by key), whatever file they came in
    origin : where the weights came from, for people
    layers : the layers that these weights reach, a beginning of the spec's
    classes : the ImageNet categories where the head has those 1,000, otherwise None
    """

    name: str
    sha256: str
    origin: str
    layers: tuple[str, ...]
    has_logits: bool
    n_classes: int | None = None
    classes: tuple[str, ...] | None = None

    @property
    def spec(self) -> BackboneSpec:
        return get_spec(self.name)

    def usable(self, layers: tuple[str, ...]) -> tuple[str, ...]:
        """Those of the given layers that these weights reach, in order."""
        return tuple(layer for layer in layers if layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, the transform included."""
        return asdict(self) | {"transform": {"mean": self.spec.mean, "std": self.spec.std, "channels": "RGB"}}

    def save(self, folder: Path) -> None:
        """Write ``backbone.json``."""
        text = json.dumps(self.to_dict(), indent=1)
        (folder / INFO_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> BackboneInfo:
        """Read ``backbone.json``; ArtifactError where it is absent, damaged or bound to another transform."""
        path = folder / INFO_FILE
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            transform = data.pop("transform")
            for key in ("layers", "classes"):
                data[key] = None if data[key] is None else tuple(data[key])
            info = cls(**data)
            spec = info.spec
        except (OSError, ValueError, TypeError, KeyError, AttributeError, BadParameter) as error:
            raise ArtifactError(
                f"{folder} holds no readable backbone ({INFO_FILE}: {error}); fit the product again."
            ) from error
        if tuple(transform["mean"]) != spec.mean or tuple(transform["std"]) != spec.std:
            raise ArtifactError(
                f"{path} was exported with another input transform than this release has for {info.name}; "
                "fit the product again."
            )
        return info
