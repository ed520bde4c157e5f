"""anomalib's PatchCore, or its PaDiM, on the same pictures, run by an interpreter that has anomalib.

    python benchmarks/anomalib_peer.py fit '{"folder": "DATA", "weights": "FILE", "out": "FOLDER"}'
    python benchmarks/anomalib_peer.py rate '{"pictures": "JPEGS", "out": "FOLDER", "seconds": 10}'
    python benchmarks/anomalib_peer.py judge '{"files": ["FILE"], "out": "FOLDER", "to": "FILE.npz"}'
    python benchmarks/anomalib_peer.py rank '{"normal": ["FILE"], "strange": ["FILE"], "out": "FOLDER"}'

It imports nothing of this project, whose libraries may be others. The network is timm's ResNet50 with the file's
weights; a file whose metadata says so gets its strides where the original of He et al. (2015) has them. Each command's
last line is JSON. anomalib stores its models with pickle: only what `fit` has just written is opened here.
"""

from __future__ import annotations

import io
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

from peak_memory import peak_memory

os.environ["TRUST_REMOTE_CODE"] = "1"  # anomalib opens its own models only with this

SIZE = (224, 224)
CORESET = 0.1
NEIGHBOURS = 9  # anomalib's default
PADIM_FEATURES = 100  # its default with a ResNet18; it has none for a ResNet50, where more take gigabytes


def build(weights: Path, kind: str = "patchcore", coreset: float = CORESET) -> Any:
    """Its PatchCore or PaDiM with a ResNet50 of these weights."""
    from anomalib.models import Padim, Patchcore
    from safetensors import safe_open
    from safetensors.torch import load_file

    method = Padim if kind == "padim" else Patchcore
    own: dict[str, Any] = {"layers": ["layer2", "layer3"], "coreset_sampling_ratio": coreset}
    own |= {"num_neighbors": NEIGHBOURS}
    if kind == "padim":
        own = {"layers": ["layer1", "layer2", "layer3"], "n_features": PADIM_FEATURES}
    model = method(
        backbone="resnet50",
        pre_trained=False,
        pre_processor=method.configure_pre_processor(image_size=SIZE),
        evaluator=False,
        visualizer=False,
        **own,
    )
    network = model.model.feature_extractor
    network = getattr(network, "feature_extractor", network)
    with safe_open(weights, "pt") as file:
        told = file.metadata() or {}
    missing = network.load_state_dict(load_file(weights), strict=False)
    if wrong := [name for name in missing.missing_keys if not name.endswith("num_batches_tracked")]:
        raise SystemExit(f"{weights} has no {', '.join(wrong[:3])}.")
    if "v1" in told:
        for layer in ("layer2", "layer3"):
            block = getattr(network, layer)[0]
            block.conv1.stride, block.conv2.stride = (2, 2), (1, 1)
    return model


def fit(
    folder: str,
    weights: str,
    out: str,
    openvino: bool = False,
    kind: str = "patchcore",
    coreset: float = CORESET,
    drawn: bool = False,
) -> dict[str, Any]:
    """Fit on ``train/good`` with its engine and export for its inferencers.

    With `drawn` the coreset is drawn at random: as large, so as fast to search, where its own choice takes an hour.
    """
    from anomalib.data import Folder
    from anomalib.engine import Engine

    start = time.perf_counter()
    model = build(Path(weights), kind, coreset)
    if drawn:
        from anomalib.models.components import KCenterGreedy

        KCenterGreedy.select_coreset_idxs = lambda self: random.sample(range(self.n_observations), self.coreset_size)
    data = Folder(
        name="peer",
        root=folder,
        normal_dir="train/good",
        train_batch_size=8,
        eval_batch_size=8,
        num_workers=0,
        test_split_mode="none",
        val_split_mode="none",
    )
    quiet = {"logger": False, "enable_progress_bar": False, "limit_val_batches": 0}
    engine = Engine(accelerator="cpu", devices=1, default_root_dir=out, **quiet)
    engine.fit(model=model, datamodule=data)
    fitted = time.perf_counter() - start
    entries = len(model.model.memory_bank) if kind == "patchcore" else 0
    exported = model.eval().to_torch(out)
    found = {"fit": fitted, "all": time.perf_counter() - start, "entries": entries}
    if openvino:
        # For one picture, as its inferencer sends them: with a free batch size the graph comes out for exactly two.
        found["openvino"] = str(model.to_openvino(out, input_size=SIZE, onnx_kwargs={"dynamic_axes": {}}))
    return found | {"model": str(exported)}


def inferencer(out: str, openvino: bool = False) -> Any:
    """One of its inferencers on what `fit` exported."""
    from anomalib.deploy import OpenVINOInferencer, TorchInferencer

    if openvino:
        return OpenVINOInferencer(path=Path(out) / "weights" / "openvino" / "model.xml", device="CPU")
    return TorchInferencer(path=Path(out) / "weights" / "torch" / "model.pt", device="cpu")


def read(data: bytes) -> Any:
    """A picture's RGB values, uint8 (h, w, 3)."""
    import numpy as np
    from PIL import Image

    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def as_tensor(pixels: Any) -> Any:
    """Float32 (3, h, w) from 0 to 1."""
    import torch
    from torchvision.transforms.v2.functional import to_dtype, to_image

    return to_dtype(to_image(pixels), torch.float32, scale=True)


def predict(model: Any, pixels: Any) -> Any:
    """Its answer on a picture; its OpenVINO graph takes pictures of the network's size."""
    if type(model).__name__ == "OpenVINOInferencer":
        import numpy as np
        from PIL import Image

        pixels = np.asarray(Image.fromarray(pixels).resize(SIZE[::-1], Image.Resampling.BILINEAR))
    return model.predict(pixels)


def rate(pictures: str, out: str, seconds: float, openvino: bool = False, batch: int = 1) -> dict[str, Any]:
    """Median seconds of a picture, JPEG bytes in and a prediction out, one batch after the other."""
    import numpy as np
    import torch

    model = inferencer(out, openvino)
    files = [file.read_bytes() for file in sorted(Path(pictures).glob("*.jpg"))]

    def work(start: int) -> None:
        pixels = [read(files[(start + i) % len(files)]) for i in range(batch)]
        if batch == 1:
            predict(model, pixels[0])
        else:
            model.predict(torch.stack([as_tensor(one) for one in pixels]))

    work(0)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        work(len(times) * batch)
        times.append(time.perf_counter() - start)
    return {"seconds": float(np.median(times)) / batch, "batches": len(times)}


def judge(files: list[str], out: str, to: str) -> dict[str, Any]:
    """Write raw scores float32 (n,) and maps float32 (n, 224, 224) of pictures into a file; seconds a picture."""
    import numpy as np
    import torch

    module = inferencer(out).model
    scores, maps, start = [], [], time.perf_counter()
    for file in files:
        pixels = as_tensor(read(Path(file).read_bytes()))[None]
        with torch.inference_mode():
            found = module.model(module.pre_processor(pixels))
        scores.append(float(found.pred_score))
        maps.append(found.anomaly_map.reshape(SIZE).numpy())
    taken = time.perf_counter() - start
    np.savez(to, scores=np.array(scores, np.float32), maps=np.stack(maps))
    return {"seconds": taken / len(files)}


def rank(normal: list[str], strange: list[str], out: str) -> dict[str, Any]:
    """Its raw scores of pictures in files."""
    import torch

    module = inferencer(out).model

    def score(file: str) -> float:
        pixels = as_tensor(read(Path(file).read_bytes()))[None]
        with torch.inference_mode():
            return float(module.model(module.pre_processor(pixels)).pred_score)

    return {"normal": [score(file) for file in normal], "strange": [score(file) for file in strange]}


if __name__ == "__main__":
    commands = {"fit": fit, "rate": rate, "judge": judge, "rank": rank}
    print(json.dumps(commands[sys.argv[1]](**json.loads(sys.argv[2])) | {"peak": peak_memory()}))
