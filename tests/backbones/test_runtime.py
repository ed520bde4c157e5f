from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import safetensors.numpy
import torch
from numpy.typing import NDArray

from ood_runners.backbones import BackboneInfo, FeatureNetwork, Projection, ProjectionFitter, export_backbone, runtime
from ood_runners.backbones.networks import TapNetwork
from ood_runners.backbones.runtime import Tapping, choose_device
from ood_runners.backbones.spec import GRAPH_FILE
from ood_runners.backbones.torch_engine import TorchEngine
from ood_runners.errors import ArtifactError, BadParameter, WeightsError

SIZE = (96, 128)
LAYERS = ("layer2", "layer3")


def taps(folder: Path, pictures: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
    network = TapNetwork(BackboneInfo.load(folder).name, safetensors.numpy.load_file(folder / "weights.safetensors"))
    outputs = network(torch.from_numpy(pictures))
    return {name: output.numpy() for name, output in zip(network.names, outputs, strict=True)}


def averaged(tap: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """Mean over the cells of a side x side square that exist, in plain loops."""
    half, result = side // 2, np.empty_like(tap)
    for y in range(tap.shape[2]):
        for x in range(tap.shape[3]):
            square = tap[:, :, max(0, y - half) : y + half + 1, max(0, x - half) : x + half + 1]
            result[:, :, y, x] = square.mean((2, 3))
    return result


def bilinear(tap: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """Twice the cells along one axis; centres at a quarter and three quarters, edges repeated."""
    n = tap.shape[axis]
    at = np.clip((np.arange(2 * n) + 0.5) / 2 - 0.5, 0, n - 1)
    low = np.floor(at).astype(int)
    shape = [1] * tap.ndim
    shape[axis] = -1
    share = (at - low).reshape(shape)
    return tap.take(low, axis) * (1 - share) + tap.take(np.minimum(low + 1, n - 1), axis) * share


def reference_patches(folder: Path, pictures: NDArray[np.uint8], side: int = 3) -> NDArray[np.float32]:
    found = taps(folder, pictures)
    fine, coarse = averaged(found["layer2"], side), averaged(found["layer3"], side)
    return np.concatenate([fine, bilinear(bilinear(coarse, 2), 3)], 1).transpose(0, 2, 3, 1)


@pytest.fixture(scope="module")
def projection(resnet18_folder: Path, pictures: NDArray[np.uint8]) -> Projection:
    return ProjectionFitter().partial_fit(reference_patches(resnet18_folder, pictures)).finish(16)


@pytest.fixture(scope="module")
def network(resnet18_folder: Path, projection: Projection) -> FeatureNetwork:
    return FeatureNetwork.load(
        resnet18_folder,
        size=SIZE,
        patch_layers=LAYERS,
        pooled_layers=("layer3", "layer4"),
        logits=True,
        projection=projection,
        device="cpu",
        threads=1,
    )


def close(found: NDArray[Any], expected: NDArray[Any], tolerance: float) -> None:
    """Within `tolerance` of the largest expected value."""
    assert found.shape == expected.shape
    difference = np.abs(found.astype(np.float64) - expected).max()
    assert difference <= tolerance * np.abs(expected.astype(np.float64)).max()


@pytest.mark.parametrize("side", [1, 3, 5])
def test_patches_are_averaged_brought_to_one_grid_and_joined(
    side: int, resnet18_folder: Path, pictures: NDArray[np.uint8]
) -> None:
    network = FeatureNetwork.load(
        resnet18_folder, size=SIZE, patch_layers=LAYERS, neighbourhood=side, device="cpu", threads=1
    )
    features = network(pictures)
    assert features.patches is not None
    assert features.patches.dtype == np.float16
    assert (features.pooled, features.logits, features.pictures) == ({}, None, None)
    close(features.patches, reference_patches(resnet18_folder, pictures, side), 6e-4)


def test_the_order_of_the_layers_is_the_order_of_the_channels(
    resnet18_folder: Path, pictures: NDArray[np.uint8]
) -> None:
    network = FeatureNetwork.load(resnet18_folder, size=SIZE, patch_layers=LAYERS[::-1], device="cpu", threads=1)
    patches = network(pictures).patches
    assert patches is not None
    close(patches, np.roll(reference_patches(resnet18_folder, pictures), 256, axis=-1), 6e-4)


def test_projecting_first_equals_projecting_last(
    network: FeatureNetwork, projection: Projection, resnet18_folder: Path, pictures: NDArray[np.uint8]
) -> None:
    patches = network(pictures).patches
    assert patches is not None
    assert patches.dtype == np.float16
    close(patches, projection.apply(reference_patches(resnet18_folder, pictures)), 6e-4)


def test_pooled_features_and_logits(
    network: FeatureNetwork, resnet18_folder: Path, pictures: NDArray[np.uint8]
) -> None:
    features, expected = network(pictures), taps(resnet18_folder, pictures)
    assert list(features.pooled) == ["layer3", "layer4"]
    for layer, pooled in features.pooled.items():
        assert pooled.dtype == np.float32
        close(pooled, expected[layer].mean((2, 3)), 1e-4)
    assert features.logits is not None
    assert features.logits.dtype == np.float32
    close(features.logits, expected["logits"], 1e-4)


def test_a_batch_equals_batches_of_one(network: FeatureNetwork, pictures: NDArray[np.uint8]) -> None:
    together = network(pictures).to_arrays()
    for i in range(len(pictures)):
        for name, alone in network(pictures[i : i + 1]).to_arrays().items():
            close(alone[0], together[name][i], 1e-3 if name == "patches" else 1e-5)


def test_no_pictures_give_no_rows(network: FeatureNetwork, pictures: NDArray[np.uint8]) -> None:
    full = network(pictures).to_arrays()
    for name, empty in network(pictures[:0]).to_arrays().items():
        assert empty.shape == (0, *full[name].shape[1:])
        assert empty.dtype == full[name].dtype


def test_a_network_that_was_kept_is_opened_without_compiling(
    resnet18_folder: Path, projection: Projection, pictures: NDArray[np.uint8], tmp_path: Path, monkeypatch: Any
) -> None:
    def load(layers: tuple[str, ...]) -> dict[str, NDArray[Any]]:
        network = FeatureNetwork.load(
            resnet18_folder,
            size=SIZE,
            patch_layers=layers,
            pooled_layers=("layer3",),
            logits=True,
            projection=projection if layers == LAYERS else None,
            device="cpu",
            threads=1,
            graph=resnet18_folder / GRAPH_FILE,
            kept=tmp_path,
        )
        return network(pictures).to_arrays()

    first, other = load(LAYERS), load(("layer2",))
    assert len(list(tmp_path.iterdir())) == 2  # each what it is
    monkeypatch.setattr(ov.Core, "compile_model", lambda *_: pytest.fail("compiled although it was kept"))
    for layers, before in ((LAYERS, first), (("layer2",), other)):
        again = load(layers)
        assert again.keys() == before.keys()
        for name, array in before.items():
            np.testing.assert_array_equal(again[name], array)


def test_threads_do_not_mix_their_answers(network: FeatureNetwork, pictures: NDArray[np.uint8]) -> None:
    expected = [network(pictures[i : i + 1]).logits for i in range(3)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda i: network(pictures[i % 3 : i % 3 + 1]).logits, range(24)))
    for i, logits in enumerate(found):
        np.testing.assert_allclose(logits, expected[i % 3], rtol=1e-5, atol=1e-5)


def test_results_are_not_overwritten_by_the_next_call(network: FeatureNetwork, pictures: NDArray[np.uint8]) -> None:
    first = network(pictures[:1])
    before = {name: array.copy() for name, array in first.to_arrays().items()}
    network(pictures[1:2])
    for name, array in first.to_arrays().items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize(
    ("dtype", "bound", "bound_of_patches"), [(torch.float32, 1e-4, 1e-3), (torch.float16, 3e-3, 3e-3)]
)
@pytest.mark.parametrize("projected", [False, True])
def test_the_gpus_engine_equals_the_cpus(
    projected: bool,
    dtype: torch.dtype,
    bound: float,
    bound_of_patches: float,
    resnet18_folder: Path,
    projection: Projection,
    pictures: NDArray[np.uint8],
) -> None:
    used = projection if projected else None
    tapping = Tapping(SIZE, LAYERS, ("layer4",), True, used, 3)
    found = TorchEngine(resnet18_folder, BackboneInfo.load(resnet18_folder), tapping, "cpu", dtype)
    network = FeatureNetwork.load(
        resnet18_folder,
        size=SIZE,
        patch_layers=LAYERS,
        pooled_layers=("layer4",),
        logits=True,
        projection=used,
        device="cpu",
        threads=1,
    )
    expected = network(pictures).to_arrays()
    arrays = found(pictures)
    assert set(arrays) == set(expected)
    for name, array in arrays.items():
        assert array.dtype == expected[name].dtype
        close(array, expected[name], bound_of_patches if name == "patches" else bound)
    assert {name: array.shape for name, array in found(pictures[:0]).items()} == {
        name: (0, *array.shape[1:]) for name, array in arrays.items()
    }


def test_real_weights_in_both_engines(shared_weights: Path, tmp_path: Path, pictures: NDArray[np.uint8]) -> None:
    info = export_backbone("resnet50_v1", shared_weights / "resnet50_v1_to_layer3.safetensors", tmp_path)
    assert (info.layers, info.has_logits) == (("layer1", "layer2", "layer3"), False)
    network = FeatureNetwork.load(
        tmp_path, size=SIZE, patch_layers=LAYERS, pooled_layers=("layer3",), device="cpu", threads=1
    )
    features = network(pictures)
    close(features.patches, reference_patches(tmp_path, pictures), 6e-4)
    found = TorchEngine(tmp_path, info, Tapping(SIZE, LAYERS, ("layer3",), False, None, 3), "cpu")
    assert found.dtype == torch.float16
    close(found(pictures)["patches"], features.patches, 4e-3)
    close(found(pictures)["pooled.layer3"], features.pooled["layer3"], 2e-3)


def test_lite0_has_patches_on_the_finest_grid(lite0_folder: Path, pictures: NDArray[np.uint8]) -> None:
    spec = BackboneInfo.load(lite0_folder).spec
    network = FeatureNetwork.load(lite0_folder, size=SIZE, patch_layers=spec.patch_layers, device="cpu", threads=1)
    patches = network(pictures).patches
    assert patches is not None
    assert patches.shape == (3, 12, 16, 152)


# ---------------------------------------------------------------- what is refused


def test_what_the_weights_do_not_reach_is_refused(resnet18_folder: Path, projection: Projection) -> None:
    def load(**wanted: Any) -> FeatureNetwork:
        return FeatureNetwork.load(resnet18_folder, size=SIZE, device="cpu", **wanted)

    with pytest.raises(WeightsError, match="have no layer5; they reach layer1, layer2, layer3, layer4"):
        load(patch_layers=("layer2", "layer5"))
    with pytest.raises(WeightsError, match="projection is for 384 channels, but layer2 of resnet18 have 128"):
        load(patch_layers=("layer2",), projection=projection)
    with pytest.raises(BadParameter, match="Nothing is asked"):
        load()
    with pytest.raises(BadParameter, match="neighbourhood odd"):
        load(patch_layers=("layer2",), neighbourhood=2)


def test_logits_of_a_headless_file_are_refused(tmp_path: Path) -> None:
    BackboneInfo("resnet18", "0" * 64, "x", ("layer1",), False).save(tmp_path)
    with pytest.raises(WeightsError, match="no classification head"):
        FeatureNetwork.load(tmp_path, size=SIZE, logits=True, device="cpu")


def test_a_folder_without_its_network_is_refused(resnet18_folder: Path, tmp_path: Path) -> None:
    BackboneInfo.load(resnet18_folder).save(tmp_path)
    with pytest.raises(ArtifactError, match=r"network\.xml is missing or damaged"):
        FeatureNetwork.load(tmp_path, size=SIZE, logits=True, device="cpu")
    with pytest.raises(ArtifactError, match=r"weights\.safetensors is missing or damaged"):
        TorchEngine(tmp_path, BackboneInfo.load(tmp_path), Tapping(SIZE, (), (), True, None, 3), "cpu")


@pytest.mark.parametrize("shape", [(2, 96, 96, 3), (96, 128, 3), (1, 96, 128, 4)])
def test_pictures_of_another_shape_are_a_mistake(shape: tuple[int, ...], network: FeatureNetwork) -> None:
    with pytest.raises(ValueError, match=r"must be uint8 \(n, 96, 128, 3\)"):
        network(np.zeros(shape, np.uint8))


# ---------------------------------------------------------------- devices


def test_an_unknown_device() -> None:
    with pytest.raises(BadParameter, match="no device 'tpu'"):
        choose_device("tpu")


def test_cuda_is_taken_only_where_both_driver_and_torch_see_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for driver in (False, True):
        for seen in (False, True):
            monkeypatch.setattr(runtime, "_nvidia_device", lambda driver=driver: driver)
            monkeypatch.setattr(runtime, "_torch_sees_gpu", lambda seen=seen: seen)
            assert choose_device("auto") == ("cuda" if driver and seen else "cpu")
            assert choose_device("cpu") == "cpu"
    monkeypatch.setattr(runtime, "_nvidia_device", lambda: False)
    with pytest.raises(BadParameter, match="cuda was asked for"):
        choose_device("cuda")


def test_hidden_gpus_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_NVIDIA_DEVICES", ("/dev/null",))
    assert runtime._nvidia_device()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not runtime._nvidia_device()


def test_a_cpu_server_loads_neither_torch_nor_scikit_learn(resnet18_folder: Path) -> None:
    program = (
        "import sys, numpy as np; from pathlib import Path; from ood_runners.backbones import FeatureNetwork\n"
        f"network = FeatureNetwork.load(Path({str(resnet18_folder)!r}), size=(64, 64), logits=True, device='cpu')\n"
        "network(np.zeros((1, 64, 64, 3), np.uint8))\n"
        "assert not {'torch', 'torchvision', 'sklearn'} & set(sys.modules), 'a heavy library was loaded'\n"
    )
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run([sys.executable, "-W", "error", "-c", program], cwd=root, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
