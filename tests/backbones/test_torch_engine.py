"""The GPU's engine: it gives what the CPU's gives, whatever the batch. All of it but real graphs runs on a CPU too."""

from __future__ import annotations

import gc
import logging
import weakref
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray

from ood_runners.backbones import BackboneInfo, FeatureNetwork, Projection, ProjectionFitter, export_backbone
from ood_runners.backbones.runtime import Tapping
from ood_runners.backbones.torch_engine import TorchEngine
from tests.gpu import DEVICES

SIZE = (96, 128)


def off(found: NDArray[np.generic], expected: NDArray[np.generic]) -> float:
    """The difference's root mean square, as a part of that of what is expected."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    wanted = expected.astype(np.float64)
    return float(np.linalg.norm(found.astype(np.float64) - wanted) / np.linalg.norm(wanted))


def tapped(folder: Path, pictures: NDArray[np.uint8]) -> Tapping:
    """What a product taps: projected patches, pooled features and logits."""
    spec = BackboneInfo.load(folder).spec
    network = FeatureNetwork.load(folder, size=SIZE, patch_layers=spec.patch_layers, device="cpu", threads=1)
    patches = network(pictures).patches
    assert patches is not None
    projection = ProjectionFitter().partial_fit(patches).finish(16)
    return Tapping(SIZE, spec.patch_layers, spec.pooled_layers, True, projection, 3)


@pytest.fixture(scope="module")
def tapping(resnet18_folder: Path, pictures: NDArray[np.uint8]) -> Tapping:
    return tapped(resnet18_folder, pictures)


def engine_of(folder: Path, tapping: Tapping, device: str, dtype: torch.dtype | None = None) -> TorchEngine:
    return TorchEngine(folder, BackboneInfo.load(folder), tapping, device, dtype)


def on_the_cpu(folder: Path, tapping: Tapping, pictures: NDArray[np.uint8]) -> dict[str, NDArray[np.generic]]:
    network = FeatureNetwork.load(
        folder,
        size=SIZE,
        patch_layers=tapping.patch_layers,
        pooled_layers=tapping.pooled_layers,
        logits=True,
        projection=tapping.projection,
        device="cpu",
        threads=1,
    )
    return network(pictures).to_arrays()


@pytest.mark.parametrize("device", DEVICES)
def test_a_resnet_computes_in_float16_and_gives_what_a_cpu_gives(
    device: str, resnet18_folder: Path, tapping: Tapping, pictures: NDArray[np.uint8]
) -> None:
    expected = on_the_cpu(resnet18_folder, tapping, pictures)
    engine = engine_of(resnet18_folder, tapping, device)
    assert engine.dtype == torch.float16
    found = engine(pictures)
    assert found.keys() == expected.keys()
    rough = engine_of(resnet18_folder, tapping, device, torch.bfloat16)(pictures)
    for name, array in expected.items():
        assert off(found[name], array) < 0.003, name
        # Seven bits are worse than ten: it is the ten that are measured above.
        assert off(rough[name], array) > 3 * off(found[name], array), name


@pytest.mark.parametrize("device", DEVICES)
def test_what_the_mean_loses_in_float16_is_made_up_for(
    device: str, resnet18_folder: Path, pictures: NDArray[np.uint8]
) -> None:
    between = np.full(384, 3 + 2**-10, np.float32)  # two numbers of float16
    plain = Projection(between, np.eye(384, 8, dtype=np.float32))
    tapping = Tapping(SIZE, ("layer2", "layer3"), ("layer4",), True, plain, 3)
    found, expected = (
        of["patches"].astype(np.float64).mean((0, 1, 2))
        for of in (
            engine_of(resnet18_folder, tapping, device, torch.float16)(pictures),
            on_the_cpu(resnet18_folder, tapping, pictures),
        )
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_depthwise_convolutions_compute_in_float32(
    device: str, lite0_folder: Path, pictures: NDArray[np.uint8], caplog: pytest.LogCaptureFixture
) -> None:
    tapping = tapped(lite0_folder, pictures)
    with caplog.at_level(logging.INFO):
        engine = engine_of(lite0_folder, tapping, device)
    assert engine.dtype == torch.float32
    assert "efficientnet_lite0: float16 is 0.00" in caplog.text
    found = engine(pictures)
    for name, array in on_the_cpu(lite0_folder, tapping, pictures).items():
        assert off(found[name], array) < (5e-4 if name == "patches" else 1e-4), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("factor", [3e3, 1e5])
def test_values_near_float16s_end_or_beyond_are_computed_in_float32(
    factor: float, device: str, resnet18_folder: Path, tapping: Tapping, tmp_path: Path, pictures: NDArray[np.uint8]
) -> None:
    state = safetensors.torch.load_file(resnet18_folder / "weights.safetensors")
    # The same function, but for large values on the way.
    for key in ("layer2.0.bn1.weight", "layer2.0.bn1.bias"):
        state[key] *= factor
    state["layer2.0.conv2.weight"] /= factor
    safetensors.torch.save_file(state, tmp_path / "large.safetensors")
    export_backbone("resnet18", tmp_path / "large.safetensors", tmp_path)
    engine = engine_of(tmp_path, tapping, device)
    assert engine.dtype == torch.float32
    found, expected = engine(pictures), engine_of(resnet18_folder, tapping, device, torch.float32)(pictures)
    for name, array in expected.items():
        assert off(found[name], array) < 1e-3, name
    half = engine_of(tmp_path, tapping, device, torch.float16)(pictures)["logits"]
    assert np.isfinite(half).all() == (factor < 1e5)


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_is_its_pictures(
    device: str, resnet18_folder: Path, tapping: Tapping, pictures: NDArray[np.uint8]
) -> None:
    engine = engine_of(resnet18_folder, tapping, device, torch.float16)
    given = np.concatenate([pictures, pictures[::-1, ::-1]])
    together = engine(given)
    for i in range(len(given)):
        for name, alone in engine(given[i : i + 1]).items():
            assert off(alone[0], together[name][i]) < 0.002, name
    assert engine.buckets.recorded() == dict.fromkeys((1, 8), device == "cuda")


@pytest.mark.parametrize("device", DEVICES)
def test_no_pictures_give_no_rows(
    device: str, resnet18_folder: Path, tapping: Tapping, pictures: NDArray[np.uint8]
) -> None:
    engine = engine_of(resnet18_folder, tapping, device, torch.float16)
    full, none = engine(pictures), engine(pictures[:0])
    assert {name: (array.dtype, (0, *array.shape[1:])) for name, array in full.items()} == {
        name: (array.dtype, array.shape) for name, array in none.items()
    }


def test_what_is_let_go_is_gone_at_once(resnet18_folder: Path, pictures: NDArray[np.uint8]) -> None:
    engine = engine_of(resnet18_folder, Tapping(SIZE, (), ("layer4",), False, None, 3), "cpu", torch.float32)
    engine(pictures)
    held = weakref.ref(engine.buckets)
    gc.disable()
    try:
        del engine
        assert held() is None
    finally:
        gc.enable()
