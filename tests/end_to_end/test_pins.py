"""A Bento serves, and carries, the versions that it was built with."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
# What `bentoml containerize` sends to the builder, written to a folder: /home/bentoml/bento of the image.
IMAGE = """
import shutil, sys
import bentoml
from bentoml._internal.container import construct_containerfile
with construct_containerfile(bentoml.get(sys.argv[1])) as (context, _):
    shutil.copytree(context, sys.argv[2])
"""


def bentoml(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | {"BENTOML_HOME": str(home)}, capture_output=True, text=True, timeout=120
    )


def build(home: Path, products: str) -> subprocess.CompletedProcess[str]:
    return bentoml(home, "-m", "bentoml", "build", "--output", "tag", "--arg", f"products={products}")


@pytest.mark.slow
def test_a_bento_serves_the_versions_it_was_built_with(
    serve: Any, fitted: Any, tmp_path: Path, normal: bytes, command_line: Callable[..., str]
) -> None:
    home, image = tmp_path / "home", tmp_path / "image"
    shutil.copytree(fitted.home, home)
    built = build(home, f"parts:{fitted.first}")
    assert built.returncode == 0, built.stdout + built.stderr
    tag = built.stdout.strip().removeprefix("__tag__:")
    command_line("promote", f"parts:{fitted.second}", home=home)

    bento = home / "bentos" / tag.replace(":", "/")
    described = (bento / "bento.yaml").read_text()
    models = [model["tag"] for service in yaml.safe_load(described)["services"] for model in service["models"]]
    [backbone] = (home / "models").glob("ood-backbone-*/[0-9a-f]*")
    assert models == [f"ood-parts:{fitted.first}", f"{backbone.parent.name}:{backbone.name}"]
    assert "latest" not in described
    sources = {str(path.relative_to(bento / "src")) for path in (bento / "src").rglob("*") if path.is_file()}
    assert {"service.py", "ood_runners/resnet50_runner.py", "ood_runners/training/report.html.j2"} <= sources
    assert not [name for name in sources if name.startswith(("tests/", ".", "docs/"))]

    # The newer one is in production, and asked for; the Bento's own arguments are the ones that hold.
    with serve(home, f"products=parts:{fitted.second}", target=tag) as server:
        assert server.detect(normal)["version"] == fitted.first
        assert [one["version"] for one in server.http.get("/products").json()["products"] if one["version"]] == [
            fitted.first
        ]

    done = bentoml(home, "-c", IMAGE, tag, str(image))
    assert done.returncode == 0, done.stderr
    shutil.rmtree(home)
    with serve(tmp_path / "empty", target=str(image)) as server:
        assert server.detect(normal)["version"] == fitted.first


def test_a_bento_of_a_version_that_is_not_there_is_not_built(fitted: Any) -> None:
    built = build(fitted.home, "parts:nosuch")
    assert built.returncode != 0
    assert "no version 'nosuch' of 'parts'" in built.stdout + built.stderr
    assert fitted.first in built.stdout + built.stderr
    assert not (fitted.home / "bentos" / "ood_service").exists()
