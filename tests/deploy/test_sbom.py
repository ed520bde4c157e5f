"""The bill of materials names packages and fitted versions."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "sbom.py"


def bill(environment: Path, models: Path) -> dict[str, dict[str, object]]:
    command = [sys.executable, str(SCRIPT), str(environment), str(models)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    written = json.loads(done.stdout)
    assert (written["bomFormat"], written["specVersion"]) == ("CycloneDX", "1.6")
    return {component["bom-ref"]: component for component in written["components"]}


def test_packages_and_versions_are_named(tmp_path: Path) -> None:
    package = tmp_path / "env" / "lib" / "python3.11" / "site-packages" / "Bolts-1.5.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: Bolts\nVersion: 1.5\n")
    fitted = tmp_path / "models" / "ood-parts" / "V1"
    fitted.mkdir(parents=True)
    (fitted / "manifest.json").write_text('{"tag": "ood-parts:V1"}')
    digest = hashlib.sha256((fitted / "manifest.json").read_bytes()).hexdigest()
    (fitted / "manifest.json.sha256").write_text(f"{digest}  manifest.json\n")

    found = bill(tmp_path / "env", tmp_path / "models")
    assert found["pkg:pypi/bolts@1.5"]["version"] == "1.5"
    assert found["ood-parts:V1"]["type"] == "machine-learning-model"
    assert found["ood-parts:V1"]["hashes"] == [{"alg": "SHA-256", "content": digest}]
    others = {name for name in found if not name.startswith("pkg:deb/")}
    assert others == {"pkg:pypi/bolts@1.5", "ood-parts:V1"}


@pytest.mark.skipif(shutil.which("dpkg-query") is None, reason="not a Debian system")
def test_debian_packages_are_named(tmp_path: Path) -> None:
    found = bill(tmp_path, tmp_path)
    assert any(name.startswith("pkg:deb/debian/dpkg@") for name in found)
