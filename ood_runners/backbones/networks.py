"""The networks in torch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ood_runners.backbones.architecture import Block, Convolution, State, network_of
from ood_runners.backbones.spec import LOGITS, get_spec, head_weight


class TapNetwork(nn.Module):
    """uint8 NHWC pictures in; every layer, by name, and the logits out.

    Built from a state dict that fits (see `weights.fit_state`); the stages it does not reach are cut off, and
    normalisations are part of the convolutions.

    Attributes
    ----------
    names : the outputs' names: layers, then ``logits`` where there is a head
    dtype : what all but the logits is computed in; see `compute_in`
    """

    mean: Tensor
    std: Tensor
    dtype: torch.dtype = torch.float32

    def __init__(self, name: str, state: State) -> None:
        super().__init__()
        spec, network = get_spec(name), network_of(name)
        self.name, self.names, self._limit = name, list(network.names(state)), network.limit
        self._stages = network.reached(state)
        self.convolutions = nn.ModuleDict(
            {_key(one): _Convolution(one, state) for stage in self._stages for one in stage.convolutions()}
        )
        self.head = _linear(name, state) if LOGITS in self.names else None
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(spec.std).view(1, 3, 1, 1) * 255)
        self.eval().requires_grad_(False)

    def cut_after(self, names: set[str]) -> None:
        """Drop what is behind the last of the given outputs."""
        self.names = self.names[: max(i for i, name in enumerate(self.names) if name in names) + 1]
        if LOGITS in self.names:
            return
        self.head = None
        self._stages = self._stages[: len(self.names) + 1]  # the stem has no name
        kept = {_key(one) for stage in self._stages for one in stage.convolutions()}
        for key in self.convolutions.keys() - kept:
            del self.convolutions[key]

    def compute_in(self, dtype: torch.dtype) -> None:
        """Compute in float16, say, what is long to compute: all but the normalisation of pixels and the final layer."""
        self.dtype = dtype
        self.convolutions.to(dtype)

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        """uint8 (n, h, w, 3) to one (n, c, gh, gw) of `dtype` a layer and float32 (n, k) logits, in `names`' order."""
        x = ((pictures.permute(0, 3, 1, 2).float() - self.mean) / self.std).to(self.dtype)
        outputs = []
        for number, stage in enumerate(self._stages):
            for block in stage.blocks:
                x = self._block(block, x)
            if stage.pooled:
                x = functional.max_pool2d(x, 3, stride=2, padding=1)
            if number:
                outputs.append(x)
        if self.head is not None:
            outputs.append(self.head(x.float().mean((2, 3))))
        return tuple(outputs)

    def _block(self, block: Block, given: Tensor) -> Tensor:
        x = given
        for i, one in enumerate(block.chain):
            x = self.convolutions[_key(one)](x if i == 0 else self._rectified(x))
        if block.residual:
            x = x + (given if block.shortcut is None else self.convolutions[_key(block.shortcut)](given))
        return self._rectified(x) if block.rectified else x

    def _rectified(self, x: Tensor) -> Tensor:
        return functional.relu_(x) if self._limit is None else functional.hardtanh_(x, 0.0, self._limit)


class _Convolution(nn.Conv2d):
    """With the normalisation behind it, and padding that may differ between the sides."""

    def __init__(self, one: Convolution, state: State) -> None:
        before, after = one.pads
        super().__init__(
            *(one.inputs, one.outputs, one.kernel, one.stride),
            padding=before if before == after else 0,
            groups=one.groups,
            device="meta",  # no memory for values that are replaced at once
        )
        self._pads = None if before == after else (before, after, before, after)
        self.weight, self.bias = (nn.Parameter(torch.from_numpy(array)) for array in one.folded(state))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input if self._pads is None else functional.pad(input, self._pads))


def _linear(name: str, state: State) -> nn.Linear:
    key = head_weight(name)
    weight, bias = (torch.from_numpy(np.array(state[one])) for one in (key, key.replace("weight", "bias")))
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = nn.Parameter(weight), nn.Parameter(bias)
    return linear


def _key(one: Convolution) -> str:
    return one.key.replace(".", "/")  # a module's name has no dots
