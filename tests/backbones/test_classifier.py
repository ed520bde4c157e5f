"""The final layer read from the store is the one that gives the logits."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch

from ood_runners.backbones import FeatureNetwork, export_backbone
from ood_runners.backbones.classifier import read_classifier
from ood_runners.errors import ArtifactError


@pytest.mark.parametrize(("fixture", "layer"), [("resnet18_folder", "layer4"), ("lite0_folder", "head")])
def test_it_maps_the_pooled_features_to_the_logits(fixture, layer, request, pictures) -> None:
    folder = request.getfixturevalue(fixture)
    found = read_classifier(folder)
    assert found is not None
    features = FeatureNetwork.load(folder, size=(96, 128), pooled_layers=[layer], logits=True, device="cpu")(pictures)
    np.testing.assert_allclose(features.pooled[layer] @ found[0].T + found[1], features.logits, rtol=1e-3, atol=1e-3)


def test_weights_without_a_head_have_none(resnet18_state, tmp_path) -> None:
    file = tmp_path / "headless.safetensors"
    safetensors.torch.save_file({k: v for k, v in resnet18_state.items() if not k.startswith("fc.")}, file)
    (tmp_path / "exported").mkdir()
    export_backbone("resnet18", file, tmp_path / "exported")
    assert read_classifier(tmp_path / "exported") is None


def test_damaged_weights_are_refused(resnet18_folder: Path, tmp_path) -> None:
    folder = shutil.copytree(resnet18_folder, tmp_path / "copy")
    (folder / "weights.safetensors").write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_classifier(folder)


def test_it_needs_no_torch(resnet18_folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from ood_runners.backbones.classifier import read_classifier\n"
        "assert read_classifier(Path(sys.argv[1]))[0].shape == (7, 512); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(resnet18_folder)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
