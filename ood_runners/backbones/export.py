"""Weights -> the folder that a runner opens: an OpenVINO graph, the weights, and what they are.

Run as a module, ``NAME WEIGHTS FOLDER [SHA256 …]`` exports a backbone, unless the hash of its weights is among those
given, and prints as JSON that hash, or the error, or the module that is missing, or what failed; WEIGHTS may be empty.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import openvino as ov
from safetensors.numpy import save_file

from ood_runners.backbones.architecture import State, count_classes, network_of
from ood_runners.backbones.graph import graph_of
from ood_runners.backbones.spec import GRAPH_FILE, LOGITS, WEIGHTS_FILE, BackboneInfo
from ood_runners.backbones.weights import hash_state, load_weights
from ood_runners.errors import ArtifactError, OODError

IMAGENET = Path(__file__).with_name("imagenet_classes.txt")  # in torchvision's order


def export_backbone(name: str, weights: Path | None, folder: Path) -> BackboneInfo:
    """Write ``network.xml``, ``network.bin``, ``weights.safetensors`` and ``backbone.json`` into `folder`.

    The graph takes uint8 (n, h, w, 3) RGB pictures of any n, h, w and gives every layer, float32 (n, c, gh, gw)
    under the layer's name, and ``logits`` float32 (n, k) where the weights have a head. It is kept in float32, so
    that it equals torch.
    """
    return _export(name, *load_weights(name, weights), folder)


def _export(name: str, state: State, origin: str, folder: Path) -> BackboneInfo:
    network = network_of(name)
    n_classes = count_classes(name, state)
    categories = tuple(IMAGENET.read_text(encoding="utf-8").splitlines())
    info = BackboneInfo(
        name=name,
        sha256=hash_state(state),
        origin=origin,
        layers=tuple(n for n in network.names(state) if n != LOGITS),
        has_logits=n_classes is not None,
        n_classes=n_classes,
        classes=categories if n_classes == len(categories) else None,
    )
    folder.mkdir(parents=True, exist_ok=True)
    model = graph_of(network, state)
    try:
        ov.save_model(model, folder / GRAPH_FILE, compress_to_fp16=False)
    except RuntimeError as error:  # it does not say why, and takes the part away that there was room for
        raise ArtifactError(
            f"The network of {name} cannot be written to {folder}; the disk is full, most likely: free some space, or "
            "set TMPDIR to a folder with more."
        ) from error
    save_file({**state}, folder / WEIGHTS_FILE, metadata={"arch": name, "origin": origin})
    info.save(folder)
    return info


def _main(name: str, weights: str, folder: str, *known: str) -> dict[str, Any]:
    try:
        state, origin = load_weights(name, Path(weights) if weights else None)
        sha256 = hash_state(state)
        if sha256 not in known:
            _export(name, state, origin, Path(folder))
    except OODError as error:
        return {"error": error.to_dict()}
    except ModuleNotFoundError as error:
        return {"module": error.name}
    except Exception:  # a full disk, say: who asked can explain it
        return {"failed": traceback.format_exc()}
    return {"sha256": sha256}


if __name__ == "__main__":
    print(json.dumps(_main(*sys.argv[1:])))
