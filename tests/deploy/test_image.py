"""What goes into an image: the versions, the packages, the files and the words on it. No container is needed."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import distribution
from importlib.metadata import version as installed
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from bentoml import Tag
from packaging.version import Version

from ood_runners import __version__
from ood_runners.artifacts import promote, write_backbone, write_version
from ood_runners.errors import BadParameter, NotFound, OODError
from tests.artifacts.samples import TinyBackbone, backbone_folder, describe, fill

FOLDER = Path(__file__).resolve().parents[2] / "deploy"


@pytest.fixture(scope="module")
def image() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        module = import_module("image")
    sys.modules.pop("image")
    return module


@pytest.fixture
def fit(bento_home: Path, tmp_path: Path) -> Callable[[str], Tag]:
    """Writes a version of a product."""
    backbone = write_backbone(TinyBackbone(), backbone_folder(tmp_path / "exported"))
    return lambda product: write_version(describe(product, backbone), fill)


def test_an_image_has_what_is_in_production(image: ModuleType, fit: Callable[[str], Tag]) -> None:
    bolts, newer = fit("bolts"), fit("bolts")
    fit("nuts")  # never promoted
    promote(bolts)
    assert image.pinned("") == {"bolts": bolts.version}
    assert image.pinned(f"bolts:{newer.version}") == {"bolts": newer.version}


def test_versions_that_cannot_be_served_are_refused(
    image: ModuleType, fit: Callable[[str], Tag], bento_home: Path
) -> None:
    with pytest.raises(NotFound, match="No product has a version in production"):
        image.pinned("")
    bolts = fit("bolts")
    with pytest.raises(NotFound, match="nosuch"):
        image.pinned("bolts:nosuch")
    with pytest.raises(BadParameter, match=r"^--products: products wants name:version,name:version, not 'bolts'\.$"):
        image.pinned("bolts")
    arrays = bento_home / "models" / "ood-bolts" / str(bolts.version) / "memory_bank.safetensors"
    arrays.chmod(0o600)
    arrays.write_bytes(arrays.read_bytes()[:-1] + b"!")
    with pytest.raises(OODError, match="memory_bank"):
        image.pinned(f"bolts:{bolts.version}")


def test_packages_are_exact_and_without_torch(image: ModuleType) -> None:
    found = dict(line.split("==") for line in image.requirements())
    assert {"bentoml", "openvino", "faiss-cpu", "s3fs"} <= found.keys()
    # Needed by one of those, and by an extra of one.
    assert found["starlette"] == installed("starlette")
    assert found["aiobotocore"] == installed("aiobotocore")
    assert not {"torch", "torchvision", "scikit-learn", "scipy", "nncf", "pytest"} & found.keys()


def test_a_gpu_has_torch_at_the_release_of_what_is_installed(
    image: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Local:
        """The CPU's own build of the torch that is installed."""

        def __init__(self, name: str) -> None:
            whole = distribution(name)
            self.version = f"{Version(whole.version).public}+cpu" if name == "torch" else whole.version
            self.requires = whole.requires

    monkeypatch.setattr(image, "distribution", Local)
    found = dict(line.split("==") for line in image.requirements(gpu=True))
    assert found["torch"] == Version(installed("torch")).public
    assert "torchvision" not in found
    assert found.keys() > {line.partition("==")[0] for line in image.requirements()}


def test_a_package_that_is_not_installed_is_named(
    image: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bentofile.yaml").write_text("python: {packages: ['no-such-package>=1']}")
    monkeypatch.setattr(image, "ROOT", tmp_path)
    with pytest.raises(NotFound, match=r"^no-such-package is not installed here"):
        image.requirements()


def test_labels_say_what_is_in_it(image: ModuleType) -> None:
    found = image.labels(SimpleNamespace(tag=Tag("ood_service", "abc")), {"nuts": "2", "bolts": "1"})
    assert found["org.opencontainers.image.version"] == __version__
    assert found["ood-runners.bento"] == "ood_service:abc"
    assert found["ood-runners.device"] == "cpu"
    assert json.loads(found["ood-runners.products"]) == {"bolts": "1", "nuts": "2"}


def test_any_user_can_read_what_the_image_is_built_from(
    image: ModuleType, fit: Callable[[str], Tag], bento_home: Path, tmp_path: Path
) -> None:
    bolts = fit("bolts")
    bento, context = tmp_path / "bento", tmp_path / "context"
    (bento / "src").mkdir(parents=True)
    (bento / "src" / "service.py").touch(mode=0o600)
    (bento / "bento.yaml").touch()
    context.mkdir()
    image.write_context(context, SimpleNamespace(path=str(bento)), {"bolts": str(bolts.version)})
    assert {path.name for path in context.iterdir()} == {
        *("Containerfile", "start.sh", "sbom.py", "bento.yaml", "requirements.txt", "src", "models")
    }
    fitted = context / "models" / "ood-bolts" / str(bolts.version)
    stored = bento_home / "models" / "ood-bolts" / str(bolts.version)
    assert (fitted / "memory_bank.safetensors").read_bytes() == (stored / "memory_bank.safetensors").read_bytes()
    assert len(list((context / "models").glob("ood-backbone-resnet18/*/network.bin"))) == 1
    for path in context.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path


def test_a_builder_that_is_not_there_is_named(
    image: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert image.main(["--builder", "docker"]) == 1
    assert "docker is not installed" in capsys.readouterr().err
