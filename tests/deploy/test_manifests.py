"""The Kubernetes manifests agree with the image, with the service's settings and with each other."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from ood_runners.settings import ENVIRONMENT, RUNNERS, Settings
from tests.deploy.rendered import (
    DEPLOY,
    KUBERNETES,
    OVERLAYS,
    each,
    environment,
    manifests,
    needs_kubectl,
    of_kind,
    pods,
    text,
)

CONTAINERFILE = (DEPLOY / "Containerfile").read_text()
START = (DEPLOY / "start.sh").read_text()
FOLDERS = sorted(path.parent for path in KUBERNETES.rglob("kustomization.yaml"))
COMPONENT = "app.kubernetes.io/component"
OPERATOR = "monitoring.coreos.com"  # its kinds have no schema there
HOME = "/var/lib/ood"
Chosen = tuple[str, ...]


@pytest.mark.parametrize("folder", FOLDERS, ids=[str(folder.relative_to(KUBERNETES)) for folder in FOLDERS])
def test_every_file_is_used(folder: Path) -> None:
    listed = yaml.safe_load((folder / "kustomization.yaml").read_text())
    patches = [patch["path"] for patch in listed.get("patches", []) if "path" in patch]
    generated = [name for one in listed.get("configMapGenerator", []) for name in one["files"]]
    named = {*listed.get("resources", []), *listed.get("components", []), *patches, *generated}
    assert all((folder / name).exists() for name in named)
    files = {path.name for path in folder.iterdir() if path.is_file()} - {"kustomization.yaml"}
    assert files == {name for name in named if (folder / name).is_file()}


@needs_kubectl
@each
def test_kubernetes_knows_every_field(chosen: Chosen) -> None:
    for manifest in manifests(chosen):
        if not manifest["apiVersion"].startswith(OPERATOR):
            validate(json.dumps(manifest))


@cache
def validate(manifest: str) -> None:
    kubernetes_validate.validate(json.loads(manifest), kubernetes_validate.latest_version(), strict=True)


@needs_kubectl
@pytest.mark.skipif(shutil.which("checkov") is None, reason="checkov, which scans for policies, is not installed")
@each
def test_no_policy_is_broken_but_those_with_a_reason(chosen: Chosen, tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text(text(chosen))
    command = ["checkov", "--config-file", str(KUBERNETES / ".checkov.yaml"), "--framework", "kubernetes"]
    command += ["--file", str(tmp_path / "all.yaml"), "--output", "json", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)
    assert found["summary"]["passed"] > 50
    assert [(one["check_id"], one["resource"]) for one in found["results"]["failed_checks"]] == []


@needs_kubectl
@each
def test_a_pod_may_write_where_the_image_does(chosen: Chosen) -> None:
    [home] = re.findall(r"BENTOML_HOME=(\S+)", CONTAINERFILE)
    [user] = re.findall(r"^USER (\d+):", CONTAINERFILE, re.MULTILINE)
    assert home == HOME
    for pod in pods(chosen).values():
        for container in (*pod["containers"], *pod.get("initContainers", [])):
            assert container["securityContext"]["readOnlyRootFilesystem"]
            writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
            assert writable == {home, "/tmp"}
            assert {mount["name"] for mount in container["volumeMounts"]} <= {one["name"] for one in pod["volumes"]}
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == int(user)
        assert f"EXPOSE {pod['containers'][0]['ports'][0]['containerPort']}" in CONTAINERFILE


@needs_kubectl
@each
def test_no_two_pods_name_a_volume_of_their_own_alike(chosen: Chosen) -> None:
    names = [one["name"] for pod in pods(chosen).values() for one in pod["volumes"] if "emptyDir" in one]
    assert len(names) == len(set(names)) == 2 * len(pods(chosen))


@needs_kubectl
@each
def test_the_environment_is_one_that_the_service_reads(chosen: Chosen) -> None:
    for pod in pods(chosen).values():
        variables = environment(pod)
        if "key-file" in chosen:
            assert "OOD_API_KEY" not in variables
            folder, _, name = variables.pop("OOD_API_KEY_FILE").rpartition("/")
            [volume] = [one["secret"] for one in pod["volumes"] if "secret" in one]
            assert volume == {"secretName": "ood-api-key", "items": [{"key": "keys", "path": name}]}
            assert folder in {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        else:
            assert variables.pop("OOD_API_KEY") == {"secretKeyRef": {"name": "ood-api-key", "key": "key"}}
        arguments = {name.removeprefix(ENVIRONMENT).lower(): value for name, value in variables.items()}
        if "products" in arguments:
            reference = arguments["products"]["configMapKeyRef"]
            arguments["products"] = of_kind(chosen, "ConfigMap")[reference["name"]]["data"][reference["key"]]
        assert arguments.keys() <= Settings.model_fields.keys()
        Settings.model_validate(arguments)


@needs_kubectl
@each
def test_a_pod_is_given_the_time_of_its_longest_request(chosen: Chosen) -> None:
    longest = Settings.model_fields["upload_s"].default + Settings.model_fields["deadline_s"].default
    for pod in pods(chosen).values():
        pause = float(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
        assert pod["terminationGracePeriodSeconds"] >= pause + longest


@needs_kubectl
@each
def test_what_selects_pods_selects_those_of_its_own_name(chosen: Chosen) -> None:
    deployments = of_kind(chosen, "Deployment")
    labels = {name: one["spec"]["template"]["metadata"]["labels"] for name, one in deployments.items()}
    assert len({one[COMPONENT] for one in labels.values()}) == len(labels)
    for name, own in labels.items():
        assert deployments[name]["spec"]["selector"]["matchLabels"] == own
        for kind in ("Service", "PodDisruptionBudget", "NetworkPolicy"):
            for manifest in filter(None, [of_kind(chosen, kind).get(name)]):
                spec = manifest["spec"]
                selector = spec["podSelector"] if kind == "NetworkPolicy" else spec["selector"]
                assert selector.get("matchLabels", selector) == own
        for constraint in deployments[name]["spec"]["template"]["spec"].get("topologySpreadConstraints", []):
            assert constraint["labelSelector"]["matchLabels"] == own
    for name, scaler in of_kind(chosen, "HorizontalPodAutoscaler").items():
        assert scaler["spec"]["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}
    served = pods(chosen).keys()
    assert served == of_kind(chosen, "Service").keys()
    assert served <= of_kind(chosen, "NetworkPolicy").keys()
    spared = of_kind(chosen, "PodDisruptionBudget").keys()
    assert spared == of_kind(chosen, "HorizontalPodAutoscaler").keys() == (set() if chosen[0] == "edge" else served)


@needs_kubectl
@each
def test_runners_hold_no_more_than_their_pod_may(chosen: Chosen) -> None:
    for name, pod in pods(chosen).items():
        [container] = pod["containers"]
        runners = 1 if name != "ood" else 0 if "OOD_RUNNER_URLS" in environment(pod) else len(RUNNERS)
        held = runners * int(environment(pod).get("OOD_MEMORY_MB", 0))
        assert runners == 0 or held > 0
        assert held < mebibytes(container["resources"]["limits"]["memory"]) - 400  # the processes themselves


def mebibytes(quantity: str) -> int:
    return int(quantity[:-2]) * {"Mi": 1, "Gi": 1024}[quantity[-2:]]


@needs_kubectl
@pytest.mark.parametrize("overlay", ["split", "gpu"])
def test_the_gateway_finds_its_runners(overlay: str) -> None:
    urls = Settings.model_validate({"runner_urls": environment(pods((overlay,))["ood"])["OOD_RUNNER_URLS"]}).urls
    services = of_kind((overlay,), "Service")
    del services["ood"]
    assert urls.keys() == set(RUNNERS)
    assert {*urls.values()} == {f"http://{name}:{one['spec']['ports'][0]['port']}" for name, one in services.items()}
    for runner, url in urls.items():
        name = url.removeprefix("http://").partition(":")[0]
        assert pods((overlay,))[name]["containers"][0]["args"] == [runner]
        assert f"\n    {runner}) alone" in START


@needs_kubectl
@pytest.mark.parametrize("overlay", ["split", "gpu"])
def test_only_the_gateway_reaches_a_runner(overlay: str) -> None:
    gateway = of_kind((overlay,), "Deployment")["ood"]["spec"]["template"]["metadata"]["labels"]
    policies = of_kind((overlay,), "NetworkPolicy")
    del policies["ood"]
    assert len(policies) == len(RUNNERS)
    for policy in policies.values():
        assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"] and policy["spec"]["egress"] == []
        [rule] = policy["spec"]["ingress"]
        [source] = rule["from"]
        assert source.keys() == {"podSelector"}  # of this namespace alone
        wanted = {one["key"]: one["values"] for one in source["podSelector"]["matchExpressions"]}
        assert wanted == {key: [value] for key, value in gateway.items()}


@needs_kubectl
def test_what_needs_a_gpu_gets_one_and_nothing_else_does() -> None:
    for name, pod in pods(("gpu",)).items():
        [container] = pod["containers"]
        has_one = container["resources"]["limits"].get("nvidia.com/gpu") == "1"
        assert has_one == (name in ("ood-resnet50", "ood-vae"))
        assert has_one == container["image"].endswith("-gpu") == ("nodeSelector" in pod) == ("tolerations" in pod)
        assert environment(pod).get("OOD_DEVICE", "auto") == ("cuda" if has_one else "auto")


@needs_kubectl
@pytest.mark.parametrize("overlay", ["cpu", "split"])
def test_versions_are_brought_before_a_pod_serves_them(overlay: str) -> None:
    chosen = (overlay, "store")
    data = {name.rpartition("-")[0]: one["data"] for name, one in of_kind(chosen, "ConfigMap").items()}
    for name, pod in pods(chosen).items():
        [pull], [container] = pod["initContainers"], pod["containers"]
        assert pull["command"][:3] == ["python", "build_artifacts.py", "pull"]
        for word, key in zip(pull["command"][3:], ("versions", "place"), strict=True):
            [variable] = [one for one in pull["env"] if f"$({one['name']})" == word]
            assert variable["valueFrom"]["configMapKeyRef"]["key"] == key
        assert pull["image"] == container["image"]
        assert pull["volumeMounts"] == container["volumeMounts"]
        assert pull["securityContext"] == container["securityContext"]
        # The gateway serves the store and not the versions of its image, and the ones that the ConfigMap names.
        assert (container["args"] == ["store"]) == (name == "ood") == ("OOD_PRODUCTS" in environment(pod))
    assert set(data["ood-products"]["products"].split(",")) <= set(data["ood-versions"]["versions"].split(","))
    assert "\n    store) exec bentoml serve service:OODService" in START


@needs_kubectl
def test_pods_read_the_shared_store_and_the_desk_writes_it() -> None:
    chosen = ("split", "records")
    mounts = {name: pod["containers"][0]["volumeMounts"] for name, pod in pods(chosen).items()}
    for listed in mounts.values():
        shared = {one["subPath"]: one for one in listed if one["name"] == "store"}
        assert {name: one["mountPath"] for name, one in shared.items()} == {
            name: f"{HOME}/{name}" for name in ("models", "ood-production")
        }
        assert all(one["readOnly"] for one in shared.values())
    desk = of_kind(chosen, "Deployment")["ood-desk"]["spec"]["template"]["spec"]
    assert {"name": "store", "mountPath": HOME} in desk["containers"][0]["volumeMounts"]
    assert desk["containers"][0]["image"] == pods(chosen)["ood"]["containers"][0]["image"]
    claims = {one["persistentVolumeClaim"]["claimName"] for one in desk["volumes"] if "persistentVolumeClaim" in one}
    assert claims == of_kind(chosen, "PersistentVolumeClaim").keys()
    assert pods(chosen)["ood"]["containers"][0]["args"] == ["store"]


def of(manifest: dict[str, Any]) -> dict[str, Any]:
    """The metrics of an autoscaler, by kind."""
    return {one["type"]: one for one in manifest["spec"]["metrics"]}


@needs_kubectl
@pytest.mark.parametrize("chosen", [("cpu", "queue-time"), ("split", "queue-time-split")], ids="+".join)
def test_a_line_of_pictures_brings_pods(chosen: Chosen) -> None:
    rules = yaml.safe_load((DEPLOY / "prometheus" / "adapter.yaml").read_text())["rules"]["external"]
    scalers = of_kind(chosen, "HorizontalPodAutoscaler")
    stages = {}
    for name, scaler in scalers.items():
        metric = of(scaler)["External"]["external"]["metric"]
        assert metric["name"] in {rule["name"]["as"] for rule in rules}
        assert "Resource" in of(scaler)
        stages[name] = metric.get("selector", {"matchLabels": {}})["matchLabels"].get("stage")
    if chosen[0] == "cpu":
        assert stages == {"ood": None}
    else:
        assert stages == {
            "ood": "gateway",
            "ood-resnet50": "features",
            "ood-vae": "vae",
            "ood-nearest-neighbour": "memory_bank",
            "ood-mahalanobis": "mahalanobis",
        }


PAGE = (DEPLOY.parent / "docs" / "kubernetes.md").read_text()


@needs_kubectl
def test_the_overlay_of_the_documentation_is_one(tmp_path: Path) -> None:
    [block] = [one for one in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) if "kind: Kustomization" in one]
    folder = tmp_path.resolve()
    path = os.path.relpath(DEPLOY, folder)
    named = block.replace("../deploy", path).replace("VERSION_BEFORE", "v1").replace("VERSION", "v2")
    (folder / "kustomization.yaml").write_text(named.replace('newTag: "2026-11-23"', "newTag: mine"))
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rendered = list(yaml.safe_load_all(done.stdout))
    assert {one["metadata"]["namespace"] for one in rendered} == {"line"}
    assert set(re.findall(r"image: (\S+)", done.stdout)) == {"registry.example.com/ood:mine"}
    for name in ("ood-versions", "ood-products"):  # found by the names that kustomize gave them
        [made] = [one["metadata"]["name"] for one in rendered if one["metadata"]["name"].startswith(f"{name}-")]
        assert set(re.findall(rf"name: ({name}\S*)", done.stdout)) == {made}


def test_the_documentation_names_every_overlay_and_component() -> None:
    inner = {"runner", "split"}  # parts of overlays
    listed = set(re.findall(r"^\| `([\w-]+)` \|", PAGE, re.MULTILINE)) | {"queue-time-split"}
    folders = {folder.relative_to(KUBERNETES).parts for folder in FOLDERS}
    overlays = {parts[0] for parts in folders if len(parts) == 1} - {"base"}
    components = {parts[1] for parts in folders if parts[0] == "components"} - inner
    assert overlays == set(OVERLAYS)
    assert overlays | components == {name for name in listed if not name.startswith("OOD")}
