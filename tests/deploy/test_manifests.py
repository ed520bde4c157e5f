"""The Kubernetes manifests agree with the image, with the service's settings and with each other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ood_runners.settings import ENVIRONMENT, Settings

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
BASE = DEPLOY / "kubernetes" / "base"
FOLDERS = sorted(path.parent for path in (DEPLOY / "kubernetes").glob("*/kustomization.yaml"))
CONTAINERFILE = (DEPLOY / "Containerfile").read_text()


@pytest.fixture
def pod() -> dict[str, Any]:
    return yaml.safe_load((BASE / "deployment.yaml").read_text())["spec"]["template"]["spec"]


@pytest.mark.parametrize("folder", FOLDERS, ids=[folder.name for folder in FOLDERS])
def test_every_manifest_is_used_and_named_alike(folder: Path) -> None:
    listed = yaml.safe_load((folder / "kustomization.yaml").read_text())
    named = {*listed["resources"], *(patch["path"] for patch in listed.get("patches", []))}
    assert all((folder / name).exists() for name in named)
    files = {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"}
    assert files == {name for name in named if name.endswith(".yaml")}
    assert {yaml.safe_load((folder / name).read_text())["metadata"]["name"] for name in files} == {"ood"}


def test_the_pod_may_write_where_the_image_does(pod: dict[str, Any]) -> None:
    [container] = pod["containers"]
    [home] = re.findall(r"BENTOML_HOME=(\S+)", CONTAINERFILE)
    [user] = re.findall(r"^USER (\d+):", CONTAINERFILE, re.MULTILINE)
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {home, "/tmp"}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == int(user)
    assert f"EXPOSE {container['ports'][0]['containerPort']}" in CONTAINERFILE


def test_the_environment_is_one_that_the_service_reads(pod: dict[str, Any]) -> None:
    names = {variable["name"].removeprefix(ENVIRONMENT).lower() for variable in pod["containers"][0]["env"]}
    assert names <= {*Settings.model_fields, "api_key"}


def test_a_pod_is_given_the_time_of_its_longest_request(pod: dict[str, Any]) -> None:
    pause = float(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    longest = Settings.model_fields["upload_s"].default + Settings.model_fields["deadline_s"].default
    assert pod["terminationGracePeriodSeconds"] >= pause + longest
