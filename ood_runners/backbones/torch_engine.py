"""The GPU's engine: the same network and the same steps in torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ood_runners.backbones.networks import TapNetwork
from ood_runners.backbones.runtime import PATCHES, Tapping
from ood_runners.backbones.spec import LOGITS, WEIGHTS_FILE, BackboneInfo
from ood_runners.errors import ArtifactError
from ood_runners.features import POOLED_PREFIX


class TorchEngine:
    """See `runtime.Engine`; `device` is a torch device."""

    def __init__(self, folder: Path, info: BackboneInfo, tapping: Tapping, device: str) -> None:
        try:
            state = safetensors.torch.load_file(folder / WEIGHTS_FILE)
        except (OSError, safetensors.SafetensorError) as error:
            raise ArtifactError(f"{folder / WEIGHTS_FILE} is missing or damaged; fit the product again.") from error
        self._device = torch.device(device)
        wanted = {*tapping.patch_layers, *tapping.pooled_layers, *([LOGITS] if tapping.logits else [])}
        self._network = TapNetwork(info.name, state)
        self._network.cut_after(wanted)
        self._network.to(self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._tapping = tapping
        self._finest = tapping.finest(info) if tapping.patch_layers else None
        self._parts = [
            (layer, None if matrix is None else torch.from_numpy(matrix.T.copy())[:, :, None, None].to(self._device))
            for layer, matrix in tapping.parts(info)
        ]
        bias = None if tapping.projection is None else tapping.projection.bias
        self._bias = None if bias is None else torch.from_numpy(bias).view(1, -1, 1, 1).to(self._device)

    @torch.inference_mode()
    def __call__(self, pictures: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """uint8 (n, h, w, 3) to the named outputs."""
        taps = dict(zip(self._network.names, self._network(torch.from_numpy(pictures).to(self._device)), strict=True))
        outputs = {}
        if self._finest is not None:
            outputs[PATCHES] = self._patches(taps, self._finest)
        for layer in self._tapping.pooled_layers:
            outputs[POOLED_PREFIX + layer] = taps[layer].mean((2, 3))
        if self._tapping.logits:
            outputs[LOGITS] = taps[LOGITS]
        return {name: value.contiguous().cpu().numpy() for name, value in outputs.items()}

    def _patches(self, taps: dict[str, Tensor], finest: str) -> Tensor:
        side = self._tapping.neighbourhood
        grid = taps[finest].shape[2:]
        parts = []
        for layer, matrix in self._parts:
            x = taps[layer] if matrix is None else functional.conv2d(taps[layer], matrix)
            if side > 1:
                x = functional.avg_pool2d(x, side, 1, side // 2, count_include_pad=False)
            if x.shape[2:] != grid:
                x = functional.interpolate(x, size=grid, mode="bilinear", align_corners=False)
            parts.append(x)
        joined = torch.cat(parts, 1) if self._bias is None else torch.stack(parts).sum(0) + self._bias
        return joined.permute(0, 2, 3, 1).half()
