"""The network that runs: pictures in, Features out; OpenVINO on a CPU, torch on a GPU."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from ood_runners.backbones.projection import Projection
from ood_runners.backbones.spec import GRAPH_FILE, BackboneInfo
from ood_runners.errors import BadParameter, WeightsError
from ood_runners.features import Features

PATCHES = "patches"
_NVIDIA_DEVICES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/nvhost-ctrl", "/dev/dxg")


@dataclass(frozen=True)
class Tapping:
    """What to take from a backbone: see `FeatureNetwork.load`."""

    size: tuple[int, int]
    patch_layers: tuple[str, ...]
    pooled_layers: tuple[str, ...]
    logits: bool
    projection: Projection | None
    neighbourhood: int

    def parts(self, info: BackboneInfo) -> list[tuple[str, NDArray[np.float32] | None]]:
        """Each patch layer with its rows of the projection's matrix, float32 (c, d)."""
        if self.projection is None:
            return [(layer, None) for layer in self.patch_layers]
        ends = np.cumsum([info.spec.layers[layer].channels for layer in self.patch_layers])
        blocks = np.split(self.projection.matrix, ends[:-1])
        return list(zip(self.patch_layers, blocks, strict=True))

    def finest(self, info: BackboneInfo) -> str:
        """The patch layer with the finest grid, which the others are brought to."""
        return min(self.patch_layers, key=lambda layer: info.spec.layers[layer].stride)

    def check(self, info: BackboneInfo) -> None:
        """WeightsError where the weights do not reach what is asked for."""
        absent = [layer for layer in (*self.patch_layers, *self.pooled_layers) if layer not in info.layers]
        if absent:
            raise WeightsError(
                f"These weights of {info.name} have no {', '.join(absent)}; they reach {', '.join(info.layers)}."
            )
        if self.logits and not info.has_logits:
            raise WeightsError(f"These weights of {info.name} have no classification head.")
        if self.projection is not None:
            channels = sum(info.spec.layers[layer].channels for layer in self.patch_layers)
            if len(self.projection.matrix) != channels:
                raise WeightsError(
                    f"The projection is for {len(self.projection.matrix)} channels, but "
                    f"{', '.join(self.patch_layers)} of {info.name} have {channels}; fit the product again."
                )
        if not (self.patch_layers or self.pooled_layers or self.logits):
            raise BadParameter("Nothing is asked of the backbone: give patch layers, pooled layers or logits.")
        if min(self.size) < 32 or self.neighbourhood < 1 or self.neighbourhood % 2 == 0:
            raise BadParameter(
                f"Pictures of {self.size} with neighbourhood {self.neighbourhood}: sides must be 32 or more and the "
                "neighbourhood odd."
            )


class Engine(Protocol):
    """One device's way to run a tapped backbone; safe to call from several threads."""

    def __call__(self, pictures: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """uint8 (n, h, w, 3) to ``patches``, ``logits`` and ``pooled.<layer>`` as in Features; n may be 0."""
        ...


class FeatureNetwork:
    """A backbone opened for one product; the same object serves fitting and serving.

    Patch features are those of PatchCore (Roth et al. 2022, https://arxiv.org/abs/2106.08265): each layer averaged
    over a small neighbourhood, coarser layers brought to the finest grid bilinearly, all joined by channel. The
    average at the border is over the cells that exist, so that a border patch is as bright as any other (the paper
    counts zeros outside). Averaging, interpolation (their weights sum to one) and projection are all linear and
    commute, so each layer is projected first, on its own grid: the costly steps see d channels, not c.

    Attributes
    ----------
    device : "cpu" or "cuda"
    info : what the weights are
    size : (h, w) that pictures must have
    """

    def __init__(self, info: BackboneInfo, tapping: Tapping, engine: Engine, device: str) -> None:
        self.info = info
        self.size = tapping.size
        self.device = device
        self._engine = engine

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        size: tuple[int, int],
        patch_layers: Sequence[str] = (),
        pooled_layers: Sequence[str] = (),
        logits: bool = False,
        projection: Projection | None = None,
        neighbourhood: int = 3,
        device: str = "auto",
        threads: int | None = None,
        graph: Path | None = None,
        kept: Path | None = None,
        lone: bool = True,
    ) -> Self:
        """Open what `export_backbone` wrote.

        Parameters
        ----------
        size : (h, w) of the pictures
        patch_layers, pooled_layers, logits : what to compute; what nobody asks for is pruned
        projection : of the joined patch channels, in the order of `patch_layers`
        neighbourhood : side of the square that patch features are averaged over, in cells; odd, 1 for none
        device : "cpu", "cuda", or "auto": cuda where torch and a GPU are there
        threads : CPU threads; all cores if None
        graph : another graph of the same layers than the folder's own, such as one in int8; it runs on the CPU
        kept : a folder where such a network is kept as it was compiled, which takes longer than with the folder's own
        lone : whether pictures come alone as well, and not in batches only, which on a CPU needs less
        """
        folder = Path(folder)
        info = BackboneInfo.load(folder)
        tapping = Tapping(
            (int(size[0]), int(size[1])),
            tuple(patch_layers),
            tuple(pooled_layers),
            logits,
            projection if patch_layers else None,
            neighbourhood,
        )
        tapping.check(info)
        chosen = "cpu" if graph is not None and device == "auto" else choose_device(device)
        if graph is not None and chosen != "cpu":
            raise BadParameter(
                "This version was fitted in int8, which runs on the CPU; use device auto or cpu, or fit it again with "
                "--precision float32."
            )
        engine: Engine
        if chosen == "cuda":
            from ood_runners.backbones.torch_engine import TorchEngine

            engine = TorchEngine(folder, info, tapping, chosen)
        else:
            from ood_runners.backbones.openvino_engine import OpenVINOEngine

            engine = OpenVINOEngine(
                graph or folder / GRAPH_FILE, info, tapping, threads, kept=kept if graph else None, lone=lone
            )
        return cls(info, tapping, engine, chosen)

    def __call__(self, pictures: NDArray[np.uint8]) -> Features:
        """Features of uint8 (n, h, w, 3) RGB pictures.

        patches float16 (n, gh, gw, d), pooled float32 (n, c) a layer, logits float32 (n, k); pictures is not set.
        """
        if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[1:] != (*self.size, 3):
            raise ValueError(
                f"pictures must be uint8 (n, {self.size[0]}, {self.size[1]}, 3), not {pictures.dtype} {pictures.shape}"
            )
        return Features.from_arrays(self._engine(np.ascontiguousarray(pictures)))


def choose_device(device: str) -> str:
    """Resolve "auto", "cpu" or "cuda" to "cpu" or "cuda"; torch is not imported where there is no NVIDIA device."""
    if device not in ("auto", "cpu", "cuda"):
        raise BadParameter(f"There is no device {device!r}; choose auto, cpu or cuda.")
    if device == "cpu":
        return "cpu"
    found = _nvidia_device() and _torch_sees_gpu()
    if device == "cuda" and not found:
        raise BadParameter(
            "The device cuda was asked for, but torch finds no NVIDIA GPU here; use device auto or cpu, or install "
            "torch and the driver."
        )
    return "cuda" if found else "cpu"


def _nvidia_device() -> bool:
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return any(os.path.exists(path) for path in _NVIDIA_DEVICES) or shutil.which("nvidia-smi") is not None


def _torch_sees_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    with warnings.catch_warnings():  # an old driver is a warning to torch and a CPU to us
        warnings.simplefilter("ignore")
        return bool(torch.cuda.is_available())
