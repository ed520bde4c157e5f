"""The CPU's engine: the stored graph with averaging, joining, projection and pooling appended, compiled."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops

from ood_runners.backbones.runtime import PATCHES, Tapping
from ood_runners.backbones.spec import LOGITS, BackboneInfo
from ood_runners.compiled import file_of
from ood_runners.errors import ArtifactError
from ood_runners.features import POOLED_PREFIX
from ood_runners.inference import CPUNetwork

MOST_WHOLE = 63  # of a weight in int8


class OpenVINOEngine:
    """See `runtime.Engine`."""

    def __init__(
        self,
        graph: Path,
        info: BackboneInfo,
        tapping: Tapping,
        threads: int | None,
        *,
        kept: Path | None = None,
        lone: bool = True,
    ) -> None:
        def model() -> ov.Model:
            return build_graph(read_graph(graph, tapping.size), info, tapping)

        self._names = output_names(tapping)
        where = None if kept is None else _kept_file(kept, graph, info, tapping)
        self._network = CPUNetwork(model, threads=threads, lone=lone, kept=where)

    def __call__(self, pictures: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """uint8 (n, h, w, 3) to the named outputs."""
        return dict(zip(self._names, self._network(pictures), strict=True))


def _kept_file(folder: Path, graph: Path, info: BackboneInfo, tapping: Tapping) -> Path | None:
    """Where the network is kept, by all that it is made of, this file included; None where the graph is not there."""
    projection = tapping.projection
    arrays = {} if projection is None else projection.to_arrays()
    tapped = replace(tapping, projection=None)
    with suppress(OSError):
        files = [path.read_bytes() for path in (graph, graph.with_suffix(".bin"), Path(__file__))]
        settings = repr((info, tapped, sorted(arrays))).encode()
        return file_of(folder, [*files, settings, *(arrays[name].tobytes() for name in sorted(arrays))])
    return None


def read_graph(path: Path, size: tuple[int, int]) -> ov.Model:
    """A stored graph, for pictures of (h, w) `size` and any n; ArtifactError where it is missing or damaged."""
    try:
        stored = ov.Core().read_model(path)
    except RuntimeError as error:
        raise ArtifactError(f"{path} is missing or damaged; fit the product again.") from error
    stored.reshape(ov.PartialShape([-1, *size, 3]))
    return stored


def output_names(tapping: Tapping) -> list[str]:
    """What the engine gives, in order."""
    pooled = [POOLED_PREFIX + layer for layer in tapping.pooled_layers]
    return [PATCHES] * bool(tapping.patch_layers) + pooled + [LOGITS] * tapping.logits


def build_graph(stored: ov.Model, info: BackboneInfo, tapping: Tapping) -> ov.Model:
    """The stored graph cut to what is tapped, with the outputs of `output_names`, in that order."""
    taps = {output.any_name: _rounded(output.get_node().input_value(0)) for output in stored.outputs}
    outputs = {}
    if tapping.patch_layers:
        outputs[PATCHES] = _patches(taps, info, tapping)
    for layer in tapping.pooled_layers:
        outputs[POOLED_PREFIX + layer] = ops.reduce_mean(taps[layer], np.array([2, 3]))
    if tapping.logits:
        outputs[LOGITS] = taps[LOGITS]
    results = []
    for name in output_names(tapping):
        result = ops.result(outputs[name])
        result.output(0).get_tensor().set_names({name})
        results.append(result)
    return ov.Model(results, stored.get_parameters(), info.name)


def _patches(taps: dict[str, Any], info: BackboneInfo, tapping: Tapping) -> Any:
    grid = _grid(taps[tapping.finest(info)])
    pad = [tapping.neighbourhood // 2] * 2
    window = [tapping.neighbourhood] * 2
    parts = []
    for layer, matrix in tapping.parts(info):
        x = taps[layer]
        if matrix is not None:
            kernel = matrix.T[:, :, None, None].copy()
            weights = _rounded_weights(kernel) if _is_rounded(x) else kernel
            x = ops.convolution(x, weights, [1, 1], [0, 0], [0, 0], [1, 1])
        if tapping.neighbourhood > 1:
            x = ops.avg_pool(x, [1, 1], pad, pad, window, True)
        if _grid(taps[layer]) != grid:
            x = ops.interpolate(x, np.array(grid), "linear_onnx", "sizes", axes=np.array([2, 3]))
        parts.append(x)
    if tapping.projection is None:
        joined = parts[0] if len(parts) == 1 else ops.concat(parts, 1)
    else:
        joined = ops.constant(tapping.projection.bias[None, :, None, None].copy())
        for part in parts:
            joined = ops.add(part, joined)
    return ops.convert(ops.transpose(joined, np.array([0, 2, 3, 1])), "f16")


def _rounded(tap: Any) -> Any:
    """In an int8 graph the tap as the next layer sees it, which is there in int8 anyway; otherwise the tap itself."""
    readers = (reader.get_node() for reader in tap.get_target_inputs())
    return next((node.output(0) for node in readers if node.get_type_name() == "FakeQuantize"), tap)


def _is_rounded(tap: Any) -> bool:
    return bool(tap.get_node().get_type_name() == "FakeQuantize")


def _rounded_weights(kernel: NDArray[np.float32]) -> Any:
    """Weights (d, c, 1, 1) as int8 with a scale for each output: the convolution then runs in int8.

    Bank and pictures see the same rounded weights, so that what they differ by from the exact ones is no noise. They
    have seven bits, as those of the backbone (see `training/quantise.py`).
    """
    scale = np.maximum(np.abs(kernel).max(axis=(1, 2, 3), keepdims=True), 1e-12) / MOST_WHOLE
    whole = ops.constant(np.rint(kernel / scale).astype(np.int8))
    return ops.multiply(ops.convert(whole, "f32"), ops.constant(scale.astype(np.float32)))


def _grid(output: Any) -> list[int]:
    return [d.get_length() for d in list(output.partial_shape)[2:]]
