"""The Kubernetes manifests agree with the image, with the service's settings and with each other."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from ood_runners.settings import ENVIRONMENT, Settings

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
CONTAINERFILE = (DEPLOY / "Containerfile").read_text()
FOLDERS = sorted(path.parent for path in KUBERNETES.rglob("kustomization.yaml"))
OVERLAYS = ["cpu", "split"]
COMPONENT = "app.kubernetes.io/component"
Manifest = dict[str, Any]

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which renders them, is not here")
each_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


@cache
def render(overlay: str) -> list[Manifest]:
    """The manifests of an overlay."""
    command = ["kubectl", "kustomize", str(KUBERNETES / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def of_kind(overlay: str, kind: str) -> dict[str, Manifest]:
    """Those of one kind, by name."""
    return {one["metadata"]["name"]: one for one in render(overlay) if one["kind"] == kind}


def pods(overlay: str) -> dict[str, Manifest]:
    """What the pods of each Deployment are."""
    return {name: one["spec"]["template"]["spec"] for name, one in of_kind(overlay, "Deployment").items()}


def environment(pod: Manifest) -> dict[str, Any]:
    [container] = pod["containers"]
    return {variable["name"]: variable.get("value", variable.get("valueFrom")) for variable in container["env"]}


@pytest.mark.parametrize("folder", FOLDERS, ids=[str(folder.relative_to(KUBERNETES)) for folder in FOLDERS])
def test_every_file_is_used(folder: Path) -> None:
    listed = yaml.safe_load((folder / "kustomization.yaml").read_text())
    patches = [patch["path"] for patch in listed.get("patches", []) if "path" in patch]
    named = {*listed.get("resources", []), *listed.get("components", []), *patches}
    assert all((folder / name).exists() for name in named)
    assert {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"} == {
        name for name in named if name.endswith(".yaml")
    }


@needs_kubectl
@each_overlay
def test_a_pod_may_write_where_the_image_does(overlay: str) -> None:
    [home] = re.findall(r"BENTOML_HOME=(\S+)", CONTAINERFILE)
    [user] = re.findall(r"^USER (\d+):", CONTAINERFILE, re.MULTILINE)
    for pod in pods(overlay).values():
        [container] = pod["containers"]
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert {mount["mountPath"] for mount in container["volumeMounts"]} == {home, "/tmp"}
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == int(user)
        assert f"EXPOSE {container['ports'][0]['containerPort']}" in CONTAINERFILE


@needs_kubectl
@each_overlay
def test_the_environment_is_one_that_the_service_reads(overlay: str) -> None:
    for pod in pods(overlay).values():
        variables = environment(pod)
        key = variables.pop("OOD_API_KEY")
        assert key == {"secretKeyRef": {"name": "ood-api-key", "key": "key"}}
        arguments = {name.removeprefix(ENVIRONMENT).lower(): value for name, value in variables.items()}
        assert arguments.keys() <= Settings.model_fields.keys()
        Settings.model_validate(arguments)


@needs_kubectl
@each_overlay
def test_a_pod_is_given_the_time_of_its_longest_request(overlay: str) -> None:
    longest = Settings.model_fields["upload_s"].default + Settings.model_fields["deadline_s"].default
    for pod in pods(overlay).values():
        pause = float(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
        assert pod["terminationGracePeriodSeconds"] >= pause + longest


@needs_kubectl
@each_overlay
def test_what_selects_pods_selects_those_of_its_own_name(overlay: str) -> None:
    labels = {
        name: one["spec"]["template"]["metadata"]["labels"] for name, one in of_kind(overlay, "Deployment").items()
    }
    assert len({one[COMPONENT] for one in labels.values()}) == len(labels)
    for name, own in labels.items():
        assert of_kind(overlay, "Deployment")[name]["spec"]["selector"]["matchLabels"] == own
        assert of_kind(overlay, "Service")[name]["spec"]["selector"] == own
        assert of_kind(overlay, "PodDisruptionBudget")[name]["spec"]["selector"]["matchLabels"] == own
        assert of_kind(overlay, "NetworkPolicy")[name]["spec"]["podSelector"]["matchLabels"] == own
        for constraint in pods(overlay)[name]["topologySpreadConstraints"]:
            assert constraint["labelSelector"]["matchLabels"] == own
    for name, scaler in of_kind(overlay, "HorizontalPodAutoscaler").items():
        assert scaler["spec"]["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}
        assert name in labels


@needs_kubectl
@each_overlay
def test_runners_hold_no_more_than_their_pod_may(overlay: str) -> None:
    for pod in pods(overlay).values():
        [container] = pod["containers"]
        if {"OOD_MEMORY_MB", "OOD_RUNNER_URLS"} & environment(pod).keys() == {"OOD_RUNNER_URLS"}:
            continue  # a gateway without runners beside it
        each = Settings.model_validate({"memory_mb": environment(pod)["OOD_MEMORY_MB"]}).memory_mb
        held = each if "args" in container else 4 * each
        assert held < mebibytes(container["resources"]["limits"]["memory"]) - 300  # the processes themselves


def mebibytes(text: str) -> int:
    return int(text[:-2]) * {"Mi": 1, "Gi": 1024}[text[-2:]]


@needs_kubectl
def test_the_gateway_finds_its_runners_and_they_are_the_image_s_own() -> None:
    urls = Settings.model_validate({"runner_urls": environment(pods("split")["ood"])["OOD_RUNNER_URLS"]}).urls
    start = (DEPLOY / "start.sh").read_text()
    services = of_kind("split", "Service")
    assert {f"http://{name}:{one['spec']['ports'][0]['port']}" for name, one in services.items() if name != "ood"} == {
        *urls.values()
    }
    for runner, url in urls.items():
        name = url.removeprefix("http://").partition(":")[0]
        assert pods("split")[name]["containers"][0]["args"] == [runner]
        assert f"\n    {runner}) alone" in start


@needs_kubectl
def test_only_the_gateway_reaches_a_runner() -> None:
    gateway = of_kind("split", "Deployment")["ood"]["spec"]["template"]["metadata"]["labels"]
    for name, policy in of_kind("split", "NetworkPolicy").items():
        if name == "ood":
            continue
        assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"] and policy["spec"]["egress"] == []
        [rule] = policy["spec"]["ingress"]
        [source] = rule["from"]
        assert source.keys() == {"podSelector"}  # of this namespace alone
        wanted = {one["key"]: one["values"] for one in source["podSelector"]["matchExpressions"]}
        assert wanted == {key: [value] for key, value in gateway.items()}
