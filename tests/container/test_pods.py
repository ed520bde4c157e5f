"""The pods of the Kubernetes manifests, rendered as for a cluster, run by podman."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.container.conftest import Images
from tests.container.podman import Container, podman
from tests.deploy.rendered import Manifest, needs_kubectl, of_kind
from tests.end_to_end.traffic import alike

pytestmark = [pytest.mark.container, pytest.mark.timeout(900), needs_kubectl]
KEY = "key-of-the-pods-0123456789"
PICKLE = "application/vnd.bentoml+pickle"


def for_podman(overlay: str, image: str) -> tuple[list[Manifest], dict[str, str]]:
    """The Deployments of an overlay with their pods on the loopback interface, and each one's address there.

    Its one pod's address is put in the place of a Service's name, and the image `image` in that of the registry's.
    """
    deployments = deepcopy(of_kind((overlay,), "Deployment"))
    addresses = {name: f"127.31.0.{i}" for i, name in enumerate(of_kind((overlay,), "Service"), 1)}
    for name, deployment in deployments.items():
        pod = deployment["spec"]["template"]["spec"]
        [container] = pod["containers"]
        pod["hostNetwork"] = True
        container["image"] = image
        del container["ports"]  # podman refuses them on the host's network
        for variable in container["env"]:
            if variable["name"] == "OOD_API_KEY":  # podman's releases differ in how they keep a Secret
                del variable["valueFrom"]
                variable["value"] = KEY
            for service, address in addresses.items():
                variable["value"] = variable["value"].replace(f"//{service}:", f"//{address}:")
        container["args"] = [*container.get("args", ["serve"]), "--host", addresses[name]]
    return list(deployments.values()), addresses


@contextmanager
def pods(overlay: str, image: str, folder: Path) -> Iterator[dict[str, Container]]:
    """The pods of an overlay by the names of their Services; the gateway's, "ood", is ready."""
    deployments, addresses = for_podman(overlay, image)
    file = folder / f"{overlay}.yaml"
    file.write_text(yaml.safe_dump_all(deployments))
    try:
        podman("kube", "play", str(file))
        found = {name: Container(f"{name}-pod-0-ood", f"http://{address}:3000") for name, address in addresses.items()}
        for container in found.values():
            container.http.headers["X-API-Key"] = KEY
        found["ood"].wait_until_ready()
        yield found
    finally:
        podman("kube", "down", str(file), check=False)


class Trap:
    """Makes a folder where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("/tmp/caught",)


def test_one_pod_and_its_parts_answer_alike(images: Images, many: list[bytes], tmp_path: Path) -> None:
    with pods("cpu", images.first, tmp_path) as whole:
        assert set(whole) == {"ood"}
        together = [whole["ood"].detect(picture) for picture in many[:4]]
        assert {answer["version"] for answer in together} == {images.versions.first}

    with pods("split", images.first, tmp_path) as parts:
        assert set(parts) == {"ood", "ood-resnet50", "ood-vae", "ood-nearest-neighbour", "ood-mahalanobis"}
        apart = [parts["ood"].detect(picture) for picture in many[:4]]
        assert alike(apart, together), (apart, together)

        for name, part in parts.items():
            for path in ("/infer", "/detect", "/"):
                trap = part.http.post(path, content=pickle.dumps(Trap()), headers={"content-type": PICKLE})
                assert trap.status_code == 415, (name, path, trap.text)
            assert podman("exec", part.name, "sh", "-c", "test -e /tmp/caught || echo safe") == "safe", name
            del part.http.headers["X-API-Key"]
            assert part.http.get("/metrics").status_code == 401, name
