"""The Kubernetes manifests, as `kubectl kustomize` renders them."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
Manifest = dict[str, Any]

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which renders them, is not here")
# Each overlay alone, and with components as docs/kubernetes.md puts them together.
OVERLAYS = ("cpu", "gpu", "split", "edge")
TOGETHER = (
    ("cpu", "store", "store-volume", "monitoring", "queue-time"),
    ("edge", "store", "key-file"),
    ("split", "store", "key-file", "monitoring", "queue-time-split"),
    ("gpu", "records", "key-file", "monitoring", "queue-time-split"),
    ("cpu", "records", "monitoring"),
)
VERSIONS = {"ood-products": ["products=nut:v2"], "ood-versions": ["place=s3://models/ood", "versions=nut:v2,nut:v1"]}
each = pytest.mark.parametrize("chosen", [(name,) for name in OVERLAYS] + list(TOGETHER), ids="+".join)


@cache
def text(chosen: tuple[str, ...]) -> str:
    """The manifests of an overlay, the first name, with components, as an overlay of one's own has them."""
    overlay, *components = chosen
    with TemporaryDirectory() as folder:
        # kustomize wants a relative path, and knows a temporary folder by its real name alone.
        own = Path(folder).resolve() / "own"
        own.mkdir()
        path = os.path.relpath(KUBERNETES, own)
        kustomization: Manifest = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [f"{path}/{overlay}"],
            "components": [f"{path}/components/{name}" for name in components],
        }
        if "store" in components:
            kustomization["configMapGenerator"] = [{"name": k, "literals": v} for k, v in VERSIONS.items()]
        (own / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        done = subprocess.run(["kubectl", "kustomize", str(own)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def manifests(chosen: tuple[str, ...]) -> tuple[Manifest, ...]:
    """All of them; not to be changed."""
    return tuple(yaml.load_all(text(chosen), getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


def of_kind(chosen: tuple[str, ...], kind: str) -> dict[str, Manifest]:
    """Those of one kind, by name."""
    return {one["metadata"]["name"]: one for one in manifests(chosen) if one["kind"] == kind}


def pods(chosen: tuple[str, ...]) -> dict[str, Manifest]:
    """What the pods of each Deployment that serves are."""
    deployments = of_kind(chosen, "Deployment")
    return {name: one["spec"]["template"]["spec"] for name, one in deployments.items() if name != "ood-desk"}


def environment(pod: Manifest) -> dict[str, Any]:
    """The variables of the container that serves; for what comes from elsewhere, where that is."""
    [container] = pod["containers"]
    return {variable["name"]: variable.get("value", variable.get("valueFrom")) for variable in container["env"]}
