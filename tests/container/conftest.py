"""A base image, two versions of a product and an image of each, made as users make them."""

from __future__ import annotations

import ast
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

import pytest

from tests.container.podman import podman
from tests.container.proxy import Proxy, proxy
from tests.end_to_end.conftest import FLOAT, ROOT, defective, draw, encode, fit, many, normal  # noqa: F401 (fixtures)

BASE = "localhost/ood-test-base"
PAUSE = "localhost/ood-test-pause"  # what holds a pod together
IMAGE = "localhost/ood-test"
NEEDED = ("podman", "runc", "mmdebstrap", "haproxy")
# What pip is told on this machine and must be told in the build as well; folders that it names are shared.
PIP = ("cert", "index-url", "extra-index-url", "trusted-host", "proxy", "timeout")
CERTIFICATES = Path("/etc/ssl/certs")
ENOUGH = 16384  # open files, processes


def cannot(why: str) -> NoReturn:
    """Skip; where all must be tested, as CI does, fail."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(why)


@dataclass(frozen=True)
class Versions:
    """A store with two versions of the product "parts"; `second` is in production."""

    home: Path
    first: str
    second: str


@dataclass(frozen=True)
class Images:
    """An image of each version."""

    first: str
    second: str
    versions: Versions


def pip_settings() -> tuple[list[str], list[str]]:
    """Environment and volumes with which pip in a build finds what pip finds here."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    environment, volumes = [], {str(CERTIFICATES): f"{CERTIFICATES}:{CERTIFICATES}:ro"}
    for line in listed.stdout.splitlines():
        key, _, written = line.partition("=")
        name, value = key.rpartition(".")[2], str(ast.literal_eval(written))
        if name not in PIP:
            continue
        environment.append(f"PIP_{name.upper().replace('-', '_')}={' '.join(value.split())}")
        for place in value.split():
            path = Path(place.removeprefix("file://"))
            if path.is_dir():  # an index; its files lie beside it
                volumes[str(path.parent)] = f"{path.parent}:{path.parent}:ro"
            elif path.is_file() and CERTIFICATES not in path.parents:
                volumes[str(path)] = f"{path}:{path}:ro"
    return environment, [volume for volume in volumes.values() if Path(volume.partition(":")[0]).exists()]


def write_settings(path: Path, *, build: bool) -> Path:
    """A containers.conf with which podman runs as root, in a container or a virtual machine without systemd as well."""
    environment, volumes = pip_settings() if build else ([], [])
    quoted = []
    for name, number in (("nofile", resource.RLIMIT_NOFILE), ("nproc", resource.RLIMIT_NPROC)):
        hard = resource.getrlimit(number)[1]  # may not be raised, where this machine is itself confined
        limit = ENOUGH if hard == resource.RLIM_INFINITY else min(ENOUGH, hard)
        quoted.append(f"{name}={limit}:{limit}")
    path.write_text(
        "[containers]\n"
        f"default_ulimits = {quoted}\n"
        f"env = {environment}\n"
        f"volumes = {volumes}\n"
        "[engine]\n"
        'runtime = "runc"\n'
        'cgroup_manager = "cgroupfs"\n'
        f'infra_image = "{PAUSE}"\n'
    )
    return path


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """podman can be used; the folder of its two settings, `run.conf` in use and `build.conf`."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        cannot(f"Container tests need root and {', '.join(NEEDED)}: on Debian run .ci/containers as root.")
    folder = tmp_path_factory.mktemp("podman")
    write_settings(folder / "build.conf", build=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONTAINERS_CONF", str(write_settings(folder / "run.conf", build=False)))
        yield folder


def make_base() -> None:
    """The base image, once a machine: `podman rmi` makes the next run take a new one."""
    found = subprocess.run(["podman", "image", "exists", BASE], check=False)
    if found.returncode:
        done = subprocess.run(["deploy/base.sh", BASE], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            cannot(f"No base image could be made:\n{done.stdout}{done.stderr}")
    if subprocess.run(["podman", "image", "exists", PAUSE], check=False).returncode:
        with TemporaryDirectory() as folder:
            (Path(folder) / "Containerfile").write_text(f'FROM {BASE}\nSTOPSIGNAL SIGKILL\nCMD ["sleep", "infinity"]\n')
            podman("build", "--quiet", "--tag", PAUSE, folder)


@pytest.fixture(scope="session")
def versions(settings: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Versions]:
    home = tmp_path_factory.mktemp("store")
    folders = [tmp_path_factory.mktemp("pictures") for _ in range(2)]
    for folder, seeds in zip(folders, (range(40), range(100, 140)), strict=True):
        for seed in seeds:
            (folder / f"{seed:03}.png").write_bytes(encode(draw(seed)))
    with ThreadPoolExecutor(1) as pool:
        base = pool.submit(make_base)  # it waits for the network and the disk, mostly
        first = fit(folders[0], home, "parts", *FLOAT)
        second = fit(folders[1], home, "parts", "--detectors", "memory_bank,mahalanobis", *FLOAT)
        base.result()
    yield Versions(home, first, second)


@pytest.fixture(scope="session")
def images(settings: Path, versions: Versions) -> Images:
    """Built by `make image`'s script. They stay for the layers that the next run need not make again."""
    environment = os.environ | {
        "BENTOML_HOME": str(versions.home),
        "CONTAINERS_CONF": str(settings / "build.conf"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    names = []
    for number, version in enumerate((versions.first, versions.second), 1):
        names.append(name := f"{IMAGE}:v{number}")
        before = podman("images", "--quiet", "--no-trunc", name)
        command = [sys.executable, "deploy/image.py", "--image", name, "--base", BASE]
        command += ["--products", f"parts:{version}"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
        if before and before != podman("images", "--quiet", "--no-trunc", name):
            podman("rmi", before)
    return Images(names[0], names[1], versions)


@pytest.fixture(scope="module")
def service_proxy(settings: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    with proxy(tmp_path_factory.mktemp("proxy"), places=4) as started:
        yield started
