"""The backbone in int8: what it is fitted with is what it is served with, and it is taken only where it is as good."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import openvino as ov
import pytest

from ood_runners.artifacts.manifest import FeaturesEntry
from ood_runners.backbones import FeatureNetwork, ProjectionFitter, export_backbone
from ood_runners.backbones.openvino_engine import build_graph, read_graph
from ood_runners.backbones.runtime import Tapping
from ood_runners.errors import BadParameter
from ood_runners.training import quantise
from ood_runners.training.progress import SilentProgress
from ood_runners.training.storing import StoredBackbone

WANTED = FeaturesEntry(patch_layers=["stage4", "stage6"], pooled_layers=["stage6"], logits=True)


def discs(count: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:64, :64]
    centres = rng.uniform(28, 36, (count, 2, 1, 1))
    inside = np.hypot(x - centres[:, 0], y - centres[:, 1]) < 18
    pictures = np.where(inside[..., None], (180, 150, 90), (50, 60, 70)) + rng.normal(0, 5, (count, 64, 64, 3))
    return pictures.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> StoredBackbone:
    folder = tmp_path_factory.mktemp("backbone")
    return StoredBackbone(export_backbone("efficientnet_lite0", None, folder), None, folder)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def graph(backbone: StoredBackbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantise.quantise(backbone, WANTED, discs(24), tmp_path_factory.mktemp("int8"), 0)


def network(backbone: StoredBackbone, graph: Path | None, device: str = "auto") -> FeatureNetwork:
    return FeatureNetwork.load(
        backbone.path,
        size=(64, 64),
        patch_layers=WANTED.patch_layers,
        pooled_layers=WANTED.pooled_layers,
        logits=True,
        device=device,
        graph=graph,
    )


def test_it_is_smaller_and_nearly_the_same(backbone: StoredBackbone, graph: Path) -> None:
    full = (backbone.path / "network.bin").stat().st_size
    assert graph.with_suffix(".bin").stat().st_size < 0.45 * full
    pictures = discs(6)
    plain, small = (network(backbone, one)(pictures).to_arrays() for one in (None, graph))
    assert plain.keys() == small.keys()
    for name, array in plain.items():
        a, b = array.astype(np.float64).ravel(), small[name].astype(np.float64).ravel()
        assert 0.97 < np.corrcoef(a, b)[0, 1] < 1 - 1e-9, name


def test_a_comparison_ends_where_the_fit_is_interrupted(
    backbone: StoredBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = threading.Event()
    network, computed = quantise._network, []

    def watched(*args: object) -> object:
        run = network(*args)  # type: ignore[arg-type]

        def compute(pictures: np.ndarray) -> object:
            computed.append(len(pictures))
            begun.set()
            return run(pictures)

        return compute

    def interrupted(*_: object) -> Path:
        begun.wait(30)
        raise KeyboardInterrupt

    monkeypatch.setattr(quantise, "_network", watched)
    monkeypatch.setattr(quantise, "_projection", lambda *_: None)
    monkeypatch.setattr(quantise, "quantise", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantise.choose_graph("auto", backbone, WANTED, discs(60), tmp_path, 0, SilentProgress())
    assert 1 <= len(computed) < 8  # of 60 and 40 defects, eight at a time


def test_quantising_leaves_torch_alone(backbone: StoredBackbone, tmp_path: Path) -> None:
    np.save(tmp_path / "pictures.npy", discs(8))
    (tmp_path / "wanted.json").write_text(WANTED.model_dump_json())
    code = (
        "import sys, threading; from pathlib import Path; import numpy as np\n"
        "from ood_runners.artifacts.manifest import FeaturesEntry\n"
        "from ood_runners.backbones import BackboneInfo\n"
        "from ood_runners.training import quantise\n"
        "from ood_runners.training.storing import StoredBackbone\n"
        "backbone, here = map(Path, sys.argv[1:])\n"
        "stored = StoredBackbone(BackboneInfo.load(backbone), None, backbone)\n"
        "wanted = FeaturesEntry.model_validate_json((here / 'wanted.json').read_text())\n"
        "quantise.quantise(stored, wanted, np.load(here / 'pictures.npy'), here / 'int8', 0)\n"
        "print('nncf' in sys.modules, 'torch' in sys.modules)\n"
        "with quantise._without_torch():\n"
        "    other = threading.Thread(target=lambda: __import__('torch'))\n"  # which others may import meanwhile
        "    other.start(); other.join()\n"
        "import torch; print(torch.ones(2).sum().item())\n"
    )
    given = [sys.executable, "-c", code, str(backbone.path), str(tmp_path)]
    assert subprocess.run(given, capture_output=True, text=True, check=True).stdout.split() == ["True", "False", "2.0"]


def test_patches_are_projected_in_int8_from_what_the_next_layer_sees(backbone: StoredBackbone, graph: Path) -> None:
    plain = network(backbone, graph)(discs(6)).patches
    projection = ProjectionFitter().partial_fit(plain).finish(16)
    joined = FeatureNetwork.load(
        backbone.path, size=(64, 64), patch_layers=WANTED.patch_layers, projection=projection, graph=graph
    )
    projected, apart = joined(discs(6)).patches.astype(np.float32), projection.apply(plain)
    assert np.linalg.norm(projected - apart) < 0.03 * np.linalg.norm(apart)  # seven bits; 0.017 to 0.023
    tapping = Tapping((64, 64), tuple(WANTED.patch_layers), (), False, projection, 3)
    model = build_graph(read_graph(graph, tapping.size), backbone.info, tapping)
    runtime = ov.Core().compile_model(model, "CPU").get_runtime_model()
    convolutions = [
        str(node.get_rt_info()["primitiveType"].astype(str))
        for node in runtime.get_ops()
        if "Convolution" in str(node.get_rt_info()["layerType"].astype(str))
    ]
    assert sum("I8" not in one for one in convolutions) == 1  # the first one stays in float32


def test_a_batch_is_its_pictures(backbone: StoredBackbone, graph: Path) -> None:
    run, pictures = network(backbone, graph), discs(5)
    together, alone = run(pictures), run(pictures[3:4])
    assert together.patches is not None and alone.patches is not None
    np.testing.assert_array_equal(together.patches[3], alone.patches[0])


def test_it_runs_on_the_cpu_only(backbone: StoredBackbone, graph: Path) -> None:
    assert network(backbone, graph).device == "cpu"
    with pytest.raises(BadParameter):
        network(backbone, graph, device="cuda")


def test_is_taken_where_it_is_as_good_and_the_comparison_is_recorded(
    backbone: StoredBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def choose(precision: str) -> tuple[Path | None, dict[str, object]]:
        return quantise.choose_graph(precision, backbone, WANTED, discs(24), tmp_path, 0, SilentProgress())

    assert choose("float32") == (None, {})
    monkeypatch.setattr(quantise, "MAX_LOSS", 0.5)
    monkeypatch.setattr(quantise, "MIN_CORRELATION", 0.5)
    taken, record = choose("auto")
    assert taken is not None and taken.is_file() and record["taken"] is True
    assert 0.5 < record["rank_correlation"] <= 1  # type: ignore[operator]
    monkeypatch.setattr(quantise, "MIN_CORRELATION", 1.01)
    refused, record = choose("auto")
    assert refused is None and record["taken"] is False and record["bounds"]["rank_correlation"] == 1.01  # type: ignore[index]


def test_more_pictures_are_asked_where_the_first_do_not_settle_it(
    backbone: StoredBackbone, graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compared(correlation: float) -> object:
        def compare(trial: quantise.Trial, _: Path) -> quantise.Comparison:
            return quantise.Comparison(1.0, 1.0, correlation, trial._pictures)

        monkeypatch.setattr(quantise.Trial, "compare", compare)
        found = quantise.choose_graph("auto", backbone, WANTED, discs(24), tmp_path, 0, SilentProgress())[1]
        return found["pictures"], found["taken"]

    monkeypatch.setattr(quantise, "quantise", lambda *_: graph)
    monkeypatch.setattr(quantise, "FIRST", 9)
    assert compared(0.99) == (9, True)
    assert compared(0.96) == (24, True)
    assert compared(0.9) == (24, False)
