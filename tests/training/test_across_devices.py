"""A version in float32 is one on a CPU and on a GPU: fitted on either, it answers on the other as where it was fitted.

The GPU's engine runs on the CPU here, in the float16 that it takes on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision

from ood_runners import images
from ood_runners.artifacts import read_version
from ood_runners.backbones import runtime, torch_engine
from ood_runners.backbones.torch_engine import TorchEngine
from ood_runners.detectors import torch_search
from ood_runners.detectors.torch_search import TorchMetric, TorchSearch
from ood_runners.pipeline import Product, check_golden, load_golden
from ood_runners.training.fit import fit

DETECTORS = ["memory_bank", "mahalanobis", "softmax"]  # the VAE's network is in float32 everywhere


def waves(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.arange(64), np.arange(64))
    grey = 120 + 50 * np.sin((x + rng.uniform(0, 9)) / 3) * np.cos(y / 7) + rng.normal(0, 6, (64, 64))
    return np.repeat(grey[..., None], 3, axis=2).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None, num_classes=7)
    with torch.no_grad():
        network(torch.randn(16, 3, 64, 64))  # for running statistics as after training
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    safetensors.torch.save_file(network.state_dict(), path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "waves"
    folder.mkdir()
    for seed in range(24):
        (folder / f"{seed:02}.png").write_bytes(images.encode_png(waves(seed)))
    return folder


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[torch.dtype]]:
    """Makes this machine one with a GPU, or one without; what the GPU's engines compute in is noted.

    So is what distances are, which the GPU's search computes.
    """

    def change(device: str) -> list[torch.dtype]:
        used: list[torch.dtype] = []

        def engine(*given: object) -> TorchEngine:
            made = TorchEngine(*given[:-1], "cpu")  # type: ignore[arg-type,call-arg]
            used.append(made.dtype)
            return made

        def search(bank: np.ndarray, k: int, device: str, **options: np.ndarray | None) -> TorchSearch:
            made = TorchSearch(bank, k, "cpu", **options)
            used.append(made._bank.dtype)
            return made

        def metric(bank: np.ndarray, matrix: np.ndarray, device: str) -> TorchMetric:
            return TorchMetric(bank, matrix, "cpu")

        monkeypatch.setattr(torch_search, "TorchSearch", search)
        monkeypatch.setattr(torch_search, "TorchMetric", metric)
        monkeypatch.setattr(runtime, "_nvidia_device", lambda: device == "cuda")
        monkeypatch.setattr(runtime, "_torch_sees_gpu", lambda: True)
        monkeypatch.setattr(torch_engine, "TorchEngine", engine)
        return used

    return change


@pytest.mark.parametrize("first", ["cpu", "cuda"])
def test_a_version_answers_alike_on_the_other_device(
    first: str, folder: Path, weights: Path, bento_home: Path, on: Callable[[str], list[torch.dtype]]
) -> None:
    used = {first: on(first)}
    result = fit(
        folder, product="waves", backbone="resnet18", weights=weights, size=(64, 64), detectors=DETECTORS,
        precision="float32", bank_size=300,
    )  # fmt: skip
    manifest = result.manifest
    assert (manifest.backbone.precision, manifest.cost["device"]) == ("float32", first)
    stored = read_version(result.tag)
    pictures = np.stack([waves(seed) for seed in range(100, 112)])
    pictures[8:, 20:30, 30:36] = (200, 40, 40)
    judged = {first: Product.open(stored).judge(pictures)}
    other = "cpu" if first == "cuda" else "cuda"
    used[other] = on(other)
    opened = Product.open(stored)
    golden = opened.raw_scores(load_golden(stored)[np.newaxis])
    check_golden(str(stored.tag), manifest.golden.scores, manifest.golden.tolerance, golden)
    judged[other] = opened.judge(pictures)
    assert set(used["cuda"]) == {torch.float16, torch.float32} and used["cpu"] == []
    for one, two in zip(judged["cpu"], judged["cuda"], strict=True):
        assert abs(one.p_value - two.p_value) < 1.5 / 25  # a rank among the held-out pictures
        for name in DETECTORS:
            assert one.detectors[name].score == pytest.approx(two.detectors[name].score, rel=0.01, abs=0.01), name
