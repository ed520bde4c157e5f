"""One container: what it may do, what it holds, what it answers."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.container.conftest import Images
from tests.container.podman import RIGHTS, Container, inspect, podman, running, wait_for
from tests.end_to_end.traffic import Answer, in_progress, load

pytestmark = [pytest.mark.container, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def container(images: Images) -> Iterator[Container]:
    with running(images.first) as started:
        yield started


def test_it_detects(container: Container, images: Images, normal: bytes, defective: bytes) -> None:
    good, bad = container.detect(normal), container.detect(defective)
    assert (good["verdict"], bad["verdict"]) == ("normal", "anomalous")
    assert good["version"] == bad["version"] == images.versions.first
    assert set(bad["detectors"]) == {"memory_bank", "mahalanobis", "vae", "softmax"}
    heatmap = container.http.post("/heatmap", files={"image": defective}, data={"product": "parts"})
    assert heatmap.content.startswith(b"\x89PNG")


def test_it_has_no_more_rights_than_it_needs(container: Container) -> None:
    assert podman("exec", container.name, "id", "-u") == "10001"
    for path in ("/bento/x", "/opt/ood/x", "/etc/x", "/home/x"):
        assert podman("exec", container.name, "sh", "-c", f"touch {path} 2>/dev/null || echo no") == "no"
    status = podman("exec", container.name, "grep", "-E", "^(CapEff|CapPrm|NoNewPrivs):", "/proc/1/status")
    assert [line.split()[1] for line in status.splitlines()] == ["0" * 16, "0" * 16, "1"]
    limits = inspect(container.name)["HostConfig"]
    assert (limits["Memory"], limits["NanoCpus"], limits["ReadonlyRootfs"]) == (2 * 2**30, 2 * 10**9, True)


def test_it_holds_what_it_serves_and_no_more(container: Container, images: Images) -> None:
    described = inspect(images.first, "image")
    assert described["Size"] < 900e6
    assert json.loads(described["Labels"]["ood-runners.products"]) == {"parts": images.versions.first}
    assert described["Labels"]["ood-runners.device"] == "cpu"
    for tool in ("gcc", "cc", "pip", "uv"):
        assert podman("exec", container.name, "sh", "-c", f"command -v {tool} || echo none") == "none"
    bill = json.loads(podman("exec", container.name, "cat", described["Labels"]["ood-runners.sbom"]))
    names = {component["name"] for component in bill["components"]}
    assert {"openvino", "bentoml", "libc6"} <= names
    assert not {"torch", "scikit-learn", "pip"} & names
    assert podman("exec", container.name, "ls", "/bento/models/ood-parts") == images.versions.first


def test_the_bill_names_the_version_of_its_own_image(images: Images) -> None:
    # The second image is built from what the first one left in the builder's cache.
    for image, version in ((images.first, images.versions.first), (images.second, images.versions.second)):
        bill = json.loads(podman("run", "--rm", "--entrypoint", "cat", image, "/bento/sbom.cdx.json"))
        fitted = [component["bom-ref"] for component in bill["components"] if component["name"] == "ood-parts"]
        assert fitted == [f"ood-parts:{version}"]


def test_a_home_that_cannot_be_written_is_said(images: Images) -> None:
    command = ["podman", "run", "--rm", "--network", "host", *RIGHTS, images.first]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("/var/lib/ood cannot be written by user 10001: mount a writable folder there")


def test_each_image_serves_its_own_version_whatever_the_store_holds(
    container: Container, images: Images, many: list[bytes], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(images.versions.home, store)
    for path in (store, *store.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
    with running(images.first, home=("--volume", f"{store}:/var/lib/ood")) as old, running(images.second) as new:
        held = {path.name for path in (store / "models" / "ood-parts").iterdir()}
        assert {images.versions.first, images.versions.second} <= held
        for picture in many[:4]:
            first, again, second = (one.detect(picture) for one in (container, old, new))
            assert first["version"] == again["version"] == images.versions.first
            assert second["version"] == images.versions.second
            assert first["score"] == again["score"] != second["score"]
        assert [one["version"] for one in old.http.get("/products").json()["products"]] == [images.versions.first]


def test_sigterm_under_load_loses_nothing(images: Images, many: list[bytes]) -> None:
    with running(images.first) as ending:

        async def end() -> list[Answer]:
            asking = asyncio.create_task(load(ending.url, many, 400, 16))
            while await asyncio.to_thread(in_progress, ending) < 8:
                assert not asking.done()
                await asyncio.sleep(0.01)
            ending.end(signal.SIGTERM)
            return await asking

        answers = asyncio.run(end())
        statuses = Counter(answer.status for answer in answers)
        # What had been taken on is answered; what came after finds the door closed.
        assert set(statuses) == {200, 0}, statuses
        assert statuses[200] >= 8, statuses
        assert {answer.body["version"] for answer in answers if answer.status == 200} == {images.versions.first}
        wait_for(lambda: ending.state()["Status"] == "exited", 60, ending.log)
        assert ending.state()["ExitCode"] == 0
        with pytest.raises(httpx.ConnectError):
            ending.http.get("/livez")
