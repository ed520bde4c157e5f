"""The benchmarks of speed: they start, and what they compute by themselves is right."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops
from sklearn.metrics import roc_auc_score

from ood_runners import images

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a benchmark's module, which finds its neighbours as a script does."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if (file := getattr(sys.modules[name], "__file__", None)) and Path(file).parent == FOLDER:
            del sys.modules[name]


@pytest.mark.parametrize("script", ["throughput", "serving", "fit", "scaling", "soak", "search", "calibration"])
def test_says_what_it_does(script: str) -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{script}.py"), "--help"],
        env=os.environ | {"PYTHONPATH": str(FOLDER.parent), "COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "--quick" in done.stdout or script == "soak", done.stdout


def test_operations_are_two_for_each_product_of_weights(load: Callable[[str], ModuleType]) -> None:
    picture = ops.parameter([1, 3, 8, 8], ov.Type.f32)
    kernel = ops.constant(np.zeros((5, 3, 3, 3), np.float32))
    convolved = ops.convolution(picture, kernel, [1, 1], [1, 1], [1, 1], [1, 1])  # 1 x 5 x 8 x 8
    kernels = ops.constant(np.zeros((5, 1, 1, 3, 3), np.float32))
    grouped = ops.group_convolution(convolved, kernels, [1, 1], [1, 1], [1, 1], [1, 1])
    flat = ops.reshape(grouped, np.array([1, 320]), False)
    straight = ops.matmul(flat, ops.constant(np.zeros((7, 320), np.float32)), False, True)
    turned = ops.matmul(
        ops.transpose(flat, np.array([1, 0])), ops.constant(np.zeros((320, 2), np.float32)), True, False
    )
    model = ov.Model([straight, turned], [picture], "small")
    of_convolutions = 2 * 5 * 8 * 8 * 27 + 2 * 5 * 8 * 8 * 9
    assert load("common").operations(model) == of_convolutions + 2 * 7 * 320 + 2 * 2 * 320


def test_auroc_counts_ties_half(load: Callable[[str], ModuleType]) -> None:
    rng = np.random.default_rng(0)
    normal, strange = rng.integers(0, 6, 40), rng.integers(2, 8, 30)
    expected = roc_auc_score([0] * 40 + [1] * 30, np.concatenate([normal, strange]))
    assert load("common").auroc(normal, strange) == pytest.approx(expected)


def test_the_median_leaves_the_first_call_out(load: Callable[[str], ModuleType]) -> None:
    common = load("common")
    clock = iter([0.0, 10.0, 12.0, 12.0, 15.0, 20.0, 21.0, 99.0])
    calls: list[int] = []
    common.time = type("Clock", (), {"perf_counter": staticmethod(lambda: next(clock))})
    assert common.median_seconds(lambda: calls.append(1), seconds=0.0) == pytest.approx(2.0)
    assert len(calls) == 4


def test_the_gpus_engine_is_set_beside_its_own_pass(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    import torch

    from ood_runners.backbones import BackboneInfo, export_backbone
    from ood_runners.backbones.runtime import Tapping
    from ood_runners.backbones.torch_engine import TorchEngine

    export_backbone("efficientnet_lite0", None, tmp_path)
    tapping = Tapping((64, 64), ("stage4", "stage6"), ("head",), True, None, 3)
    engine = TorchEngine(tmp_path, BackboneInfo.load(tmp_path), tapping, "cpu", torch.float32)
    rows = load("gpu_rates").rates(engine, (64, 64), 0.0, (1, 4))
    assert [(row[0], row[4]) for row in rows] == [("1", "no"), ("4", "no")]
    assert all(float(value) > 0 for row in rows for value in row[1:4])


def test_curves_have_a_point_for_each_size_and_are_drawn(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    curves = load("curves")
    rng = np.random.default_rng(0)
    (tmp_path / "a.png").write_bytes(images.encode_png(rng.integers(0, 256, (40, 50, 3), np.uint8)))
    made = [
        curves.over_banks([40, 3_000], 0.0, 1e9),
        curves.over_sent([32, 64], [tmp_path / "a.png"], (32, 32), 0.0),
    ]
    for curve in made:
        assert len(curve.x) == 2
        assert all(len(values) == 2 and min(values) > 0 for values in curve.y.values())
    curves.plot(made, tmp_path / "drawn.png")
    assert images.read(tmp_path / "drawn.png").shape[0] > 300


def test_made_pictures_are_different_and_the_same_again(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    draw = load("fit").draw
    first, second = (draw(tmp_path / name, 4, 64, tmp_path / f"{name}_scenes") for name in ("a", "b"))
    made = [file.read_bytes() for file in sorted(first.rglob("*.jpg"))]
    assert len(made) == len(set(made)) == 4
    assert made == [file.read_bytes() for file in sorted(second.rglob("*.jpg"))]


def test_a_fit_is_told_by_stage_with_what_no_stage_accounts_for(load: Callable[[str], ModuleType]) -> None:
    fitted = load("common").Fitted
    fits = {
        "plain": fitted("t", 9.0, {"features": 2.0, "memory_bank": 3.0, "all": 6.5}, 2**20),
        "with": fitted("t", 20.0, {"features": 2.0, "memory_bank": 3.0, "vae": 8.0, "all": 14.0}, 3 * 2**20),
    }
    assert load("fit").columns_of(fits) == [
        ["features", "2.0", "2.0"],
        ["memory_bank", "3.0", "3.0"],
        ["vae", "0.0", "8.0"],
        ["reading, backbone, writing", "1.5", "1.0"],
        ["all", "6.5", "14.0"],
        ["with imports", "9.0", "20.0"],
        ["peak memory, MiB", "1", "3"],
    ]


def test_weights_without_the_shared_folder_load_as_resnet50(
    load: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ood_runners.backbones.weights import load_weights

    common = load("common")
    monkeypatch.setattr(common, "SHARED", tmp_path)
    found = common.find_weights(tmp_path)
    assert "random" in found.what
    assert load_weights(found.backbone, found.path)[0]["layer3.0.conv1.weight"].shape == (256, 512, 1, 1)
