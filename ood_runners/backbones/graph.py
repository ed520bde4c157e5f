"""A network and its weights -> the OpenVINO graph that is stored."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops

from ood_runners.backbones.architecture import Block, Convolution, Network, State
from ood_runners.backbones.spec import LOGITS, get_spec, head_weight

PICTURES = "pictures"  # the input


def graph_of(network: Network, state: State) -> ov.Model:
    """uint8 (n, h, w, 3) RGB pictures of any n, h, w to every layer, float32 (n, c, gh, gw), and float32 (n, k) logits.

    Outputs are named by `Network.names`. The state dict fits the network, which it may leave before its end.
    """
    spec = get_spec(network.name)
    pictures = ops.parameter([-1, -1, -1, 3], ov.Type.u8, PICTURES)
    pictures.output(0).get_tensor().set_names({PICTURES})
    x = ops.convert(ops.transpose(pictures, np.array([0, 3, 1, 2])), "f32")
    x = ops.subtract(x, _each_channel(np.float32(255) * np.array(spec.mean, np.float32)))
    x = ops.divide(x, _each_channel(np.float32(255) * np.array(spec.std, np.float32)))
    found = {}
    for stage in network.reached(state):
        for block in stage.blocks:
            x = _block(block, x, network.limit, state)
        if stage.pooled:
            x = ops.max_pool(x, [2, 2], [1, 1], [1, 1], [1, 1], [3, 3]).output(0)
        found[stage.name] = x
    names = network.names(state)
    if LOGITS in names:
        key = head_weight(network.name)
        mean = ops.reduce_mean(x, np.array([2, 3]))
        product = ops.matmul(mean, ops.constant(state[key]), False, True)
        found[LOGITS] = ops.add(product, ops.constant(state[key.replace("weight", "bias")][np.newaxis]))
    results = []
    for name in names:
        result = ops.result(found[name])
        result.output(0).get_tensor().set_names({name})
        results.append(result)
    return ov.Model(results, [pictures], network.name)


def _block(block: Block, given: Any, limit: float | None, state: State) -> Any:
    x = given
    for i, convolution in enumerate(block.chain):
        x = _convolution(convolution, x if i == 0 else _rectified(x, limit), state)
    if block.residual:
        x = ops.add(x, given if block.shortcut is None else _convolution(block.shortcut, given, state))
    return _rectified(x, limit) if block.rectified else x


def _convolution(one: Convolution, x: Any, state: State) -> Any:
    weight, bias = one.folded(state)
    strides, dilations, (before, after) = [one.stride] * 2, [1, 1], one.pads
    if one.groups > 1:
        weight = weight.reshape(one.groups, one.outputs // one.groups, *weight.shape[1:])
        x = ops.group_convolution(x, ops.constant(weight), strides, [before] * 2, [after] * 2, dilations)
    else:
        x = ops.convolution(x, ops.constant(weight), strides, [before] * 2, [after] * 2, dilations)
    return ops.add(x, _each_channel(bias))


def _rectified(x: Any, limit: float | None) -> Any:
    return ops.relu(x) if limit is None else ops.clamp(x, 0.0, limit)


def _each_channel(values: NDArray[np.float32]) -> Any:
    return ops.constant(values.reshape(1, -1, 1, 1))
