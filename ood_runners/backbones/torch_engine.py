"""The GPU's engine: the same network and the same steps in torch."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import Tensor, nn
from torch.nn import functional

from ood_runners.backbones.networks import TapNetwork
from ood_runners.backbones.runtime import PATCHES, Tapping
from ood_runners.backbones.spec import LOGITS, WEIGHTS_FILE, BackboneInfo
from ood_runners.errors import ArtifactError
from ood_runners.features import POOLED_PREFIX
from ood_runners.torch_inference import Buckets

logger = logging.getLogger(f"bentoml.{__name__}")  # configured by BentoML when it serves

# Where float16 will do: on the probes no layer is off by more than this part of its root mean square (at 0.004 scores
# move by up to 0.3 %, at 0.008 by 0.9, where the golden picture's may by 1), and no value is beyond this part of
# float16's range (65,504), so that none of any picture comes near its end.
MOST_OFF = 0.005
ROOM = 1 / 16


class TorchEngine:
    """See `runtime.Engine`.

    The network and the projection compute in float16 with sums in float32, on the GPU's matrix units; averages and
    the final layer in float32. A version fitted in float32 on a CPU then scores alike here, and the other way round: of
    a ResNet50 the layers differ by one or two thousandths. bfloat16, no faster and of seven bits instead of ten, is off
    by one to six hundredths (docs/performance.md). Where float16 is further off than it should be, which depends on
    the weights alone (`half_will_do`), everything is float32: a network of depthwise convolutions, say, which is small.

    Parameters
    ----------
    device : a torch device
    dtype : what the network computes in; by default as above

    Attributes
    ----------
    buckets : runs it
    """

    def __init__(
        self, folder: Path, info: BackboneInfo, tapping: Tapping, device: str, dtype: torch.dtype | None = None
    ) -> None:
        try:
            state = load_file(folder / WEIGHTS_FILE)
        except (OSError, safetensors.SafetensorError) as error:
            raise ArtifactError(f"{folder / WEIGHTS_FILE} is missing or damaged; fit the product again.") from error
        where = torch.device(device)
        if where.type == "cuda":
            # What is float32 is to be that, not the ten bits of TF32.
            torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
        wanted = {*tapping.patch_layers, *tapping.pooled_layers, *([LOGITS] if tapping.logits else [])}

        def build(dtype: torch.dtype) -> TapNetwork:
            network = TapNetwork(info.name, state)
            network.cut_after(wanted)
            network.compute_in(dtype)
            return network.to(where, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

        network = build(dtype or torch.float16)
        if dtype is None and not half_will_do(build(torch.float32), network, where):
            network = build(torch.float32)
        self.dtype = network.dtype
        # Not a method of this object: without a cycle, a GPU's memory is free as soon as a version is let go.
        self.buckets = Buckets(_Pass(network, info, tapping, where), (*tapping.size, 3), where)

    def __call__(self, pictures: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """uint8 (n, h, w, 3) to the named outputs."""
        return self.buckets(pictures)


class _Pass:
    """Pictures uint8 (n, h, w, 3) to the engine's outputs, tensors on the same device."""

    def __init__(self, network: TapNetwork, info: BackboneInfo, tapping: Tapping, device: torch.device) -> None:
        self._network = network
        self._tapping = tapping
        self._finest = tapping.finest(info) if tapping.patch_layers else None
        self._parts: list[tuple[str, Tensor | None, Tensor | None]] = []
        self._bias: Tensor | None = None
        if tapping.projection is None:
            self._parts = [(layer, None, None) for layer in tapping.patch_layers]
            return
        # Around the mean, in the network's precision, so that products are not small differences of large ones. What
        # the mean loses to that precision is made up for in the bias.
        mean = torch.from_numpy(tapping.projection.mean)
        rounded = mean.to(network.dtype)
        matrix = torch.from_numpy(tapping.projection.matrix)
        self._bias = ((rounded.float() - mean) @ matrix).view(1, -1, 1, 1).to(device)
        ends = np.cumsum([info.spec.layers[layer].channels for layer in tapping.patch_layers])
        for layer, rows in zip(tapping.patch_layers, np.split(np.arange(ends[-1]), ends[:-1]), strict=True):
            kernel = matrix[rows].T.contiguous()[:, :, None, None]
            middle = rounded[rows].view(1, -1, 1, 1)
            self._parts.append((layer, middle.to(device), kernel.to(device, network.dtype)))

    def __call__(self, pictures: Tensor) -> dict[str, Tensor]:
        taps = dict(zip(self._network.names, self._network(pictures), strict=True))
        outputs = {}
        if self._finest is not None:
            outputs[PATCHES] = self._patches(taps, self._finest)
        for layer in self._tapping.pooled_layers:
            outputs[POOLED_PREFIX + layer] = taps[layer].mean((2, 3), dtype=torch.float32)
        if self._tapping.logits:
            outputs[LOGITS] = taps[LOGITS]
        return outputs

    def _patches(self, taps: dict[str, Tensor], finest: str) -> Tensor:
        """float16 (n, h, w, d), as they travel, from the layers' outputs."""
        side = self._tapping.neighbourhood
        grid = taps[finest].shape[2:]
        parts = []
        for layer, middle, kernel in self._parts:
            x = taps[layer]
            if middle is not None and kernel is not None:
                x = functional.conv2d(x - middle, kernel)
            x = x.float()
            if side > 1:
                x = functional.avg_pool2d(x, side, 1, side // 2, count_include_pad=False)
            if x.shape[2:] != grid:
                x = functional.interpolate(x, size=grid, mode="bilinear", align_corners=False)
            parts.append(x)
        joined = torch.cat(parts, 1) if self._bias is None else sum(parts, start=self._bias)
        return joined.permute(0, 2, 3, 1).half().contiguous()


@torch.inference_mode()
def half_will_do(plain: TapNetwork, half: TapNetwork, device: torch.device) -> bool:
    """Whether a network in float16, `half`, gives on probe pictures what it gives in float32, `plain`, with room left.

    The probes are black, white, and noise of several grains: contrasts as high as any picture's.
    """
    peaks: list[Tensor] = []

    def note(module: nn.Module, given: Any, output: Tensor) -> None:
        peaks.append(output.abs().amax())

    hooks = [one.register_forward_hook(note) for one in plain.modules() if isinstance(one, nn.Conv2d)]
    probes = torch.from_numpy(_probes()).to(device)
    expected = dict(zip(plain.names, plain(probes), strict=True))
    for hook in hooks:
        hook.remove()
    largest = float(
        torch.stack([*peaks, *(one.abs().amax() for name, one in expected.items() if name != LOGITS)]).amax()
    )
    off = max(
        float(torch.linalg.vector_norm(found.float() - wanted) / torch.linalg.vector_norm(wanted))
        for found, wanted in zip(half(probes), expected.values(), strict=True)
    )
    fits = off <= MOST_OFF and largest <= ROOM * torch.finfo(torch.float16).max  # which not-a-number is not
    logger.info(
        "%s: float16 is %.2g off and values reach %.3g, so the network computes in %s.",
        plain.name,
        off,
        largest,
        "float16" if fits else "float32",
    )
    return fits


def _probes(side: int = 224) -> NDArray[np.uint8]:
    """uint8 (n, side, side, 3), always the same."""
    rng = np.random.default_rng(0)
    pictures = [np.zeros((side, side, 3), np.uint8), np.full((side, side, 3), 255, np.uint8)]
    for grain in (1, 8, 32):
        cells = side // grain
        noise = rng.integers(0, 2, (cells, cells, 3), np.uint8) * np.uint8(255)
        pictures.append(noise.repeat(grain, axis=0).repeat(grain, axis=1))
    return np.stack(pictures)
