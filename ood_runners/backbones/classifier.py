"""The final layer of an exported backbone, read without torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ood_runners.backbones.spec import WEIGHTS_FILE, BackboneInfo, head_weight
from ood_runners.errors import ArtifactError


def read_classifier(folder: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """Weight float32 (k, d) and bias float32 (k,) of the classification head; None for weights without one.

    Raises
    ------
    ArtifactError
        The folder's weights cannot be read.
    """
    info = BackboneInfo.load(folder)
    if not info.has_logits:
        return None
    key = head_weight(info.name)
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="numpy") as weights:
            matrix = weights.get_tensor(key).astype(np.float32)
            name = key.removesuffix("weight") + "bias"
            bias = weights.get_tensor(name) if name in weights.keys() else np.zeros(len(matrix))  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"The classification head in {folder} cannot be read ({error}); fit the product again."
        ) from error
    return matrix, bias.astype(np.float32)
