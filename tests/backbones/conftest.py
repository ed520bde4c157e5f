"""Small real networks that need no download: ResNet18 with random weights, EfficientNet-Lite0 with its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from numpy.typing import NDArray
from torch import Tensor

from ood_runners.backbones import export_backbone


@pytest.fixture(scope="session")
def resnet18_state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None, num_classes=7)
    # A fresh network's running statistics are 0 and 1; let them be something, as after training.
    with torch.no_grad():
        network.train()
        network(torch.randn(16, 3, 64, 64))
    return {key: value.clone() for key, value in network.state_dict().items()}


@pytest.fixture(scope="session")
def resnet18_file(resnet18_state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    safetensors.torch.save_file(resnet18_state, path)
    return path


@pytest.fixture(scope="session")
def resnet18_folder(resnet18_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resnet18")
    export_backbone("resnet18", resnet18_file, folder)
    return folder


@pytest.fixture(scope="session")
def lite0_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lite0")
    export_backbone("efficientnet_lite0", None, folder)
    return folder


@pytest.fixture(scope="session")
def pictures() -> NDArray[np.uint8]:
    """uint8 (3, 96, 128, 3): smooth colours with some noise, each another."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[0:96, 0:128] / 20
    waves = [np.sin(x * a + y * b)[..., None] * c for a, b, c in rng.uniform(0.2, 2, (3, 3))]
    noise = rng.normal(0, 0.2, (3, 96, 128, 3))
    return np.clip(128 + 70 * (np.stack(waves) + noise), 0, 255).astype(np.uint8)
