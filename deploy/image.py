"""Build the image of a service with exactly pinned versions: ``make image``, or ``python deploy/image.py --help``.

A Bento is built with ``bentoml build --arg products=…``; it, its models and the exact versions of the packages of this
environment (those that the products were fitted with) are what deploy/Containerfile makes an image of.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import bentoml
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from pydantic import ValidationError

from ood_runners import __version__
from ood_runners.artifacts import production, products, read_version
from ood_runners.errors import BadParameter, NotFound, OODError
from ood_runners.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
BASE = f"docker.io/library/python:{sys.version_info.major}.{sys.version_info.minor}-slim"
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def pinned(names: str) -> dict[str, str]:
    """Product to version: those named as ``hazelnut:V1,walnut:V2``, or every product's version in production.

    Raises
    ------
    OODError
        `names` cannot be read, or a version is missing or damaged.
    """
    if names:
        try:
            pins = Settings(products=names).pins  # type: ignore[call-arg]
        except ValidationError as error:
            raise BadParameter(f"--products: {error.errors()[0]['msg'].removeprefix('Value error, ')}.") from None
    else:
        pins = {name: version for name in products() if (version := production(name))}
    if not pins:
        raise NotFound("No product has a version in production; fit one, or name versions with --products.")
    for name, version in pins.items():
        read_version(name, version)  # every file of it as it was written
    return pins


def requirements(gpu: bool = False) -> list[str]:
    """What a server needs, with all that this needs in turn, each at the version that is installed here.

    A local build (torch's ``2.14.1+cpu``) stands for the release of its version: the CUDA build, with the CUDA runtime.

    Raises
    ------
    NotFound
        One of them is not installed.
    """
    wanted = yaml.safe_load((ROOT / "bentofile.yaml").read_text())["python"]["packages"]
    queue = [Requirement(line) for line in (*wanted, *EXTRAS["s3"], *(EXTRAS["gpu"] if gpu else ()))]
    found: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    while queue:
        requirement = queue.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            raise NotFound(f"{name} is not installed here; `make venv` installs it.") from None
        found[name] = Version(installed.version).public
        for line in installed.requires or []:
            further = Requirement(line)
            if further.marker is None or any(further.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                queue.append(further)
    return [f"{name}=={version}" for name, version in sorted(found.items())]


def build_bento(pins: dict[str, str]) -> bentoml.Bento:
    """The Bento of these versions, in the store."""
    argument = "products=" + ",".join(f"{name}:{version}" for name, version in pins.items())
    command = [sys.executable, "-m", "bentoml", "build", "--output", "tag", "--arg", argument]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return bentoml.bentos.get(done.stdout.strip().removeprefix("__tag__:"))


def write_context(folder: Path, bento: bentoml.Bento, pins: dict[str, str], gpu: bool = False) -> None:
    """The folder that the image is built from."""
    shutil.copytree(Path(bento.path) / "src", folder / "src")
    shutil.copyfile(Path(bento.path) / "bento.yaml", folder / "bento.yaml")
    for name in ("Containerfile", "start.sh", "sbom.py"):
        shutil.copyfile(ROOT / "deploy" / name, folder / name)
    for name, version in pins.items():
        stored = read_version(name, version, verify=False)
        for path in (stored.path, *stored.backbone_paths.values()):
            target = folder / "models" / path.parent.name / path.name
            shutil.copytree(path, target, dirs_exist_ok=True)
    (folder / "requirements.txt").write_text("\n".join(requirements(gpu)) + "\n")
    # A store's files may be for their owner alone; in the image another user reads them.
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def labels(bento: bentoml.Bento, pins: dict[str, str], gpu: bool = False) -> dict[str, str]:
    """What the image says of itself; ``podman inspect`` shows it."""
    return {
        "org.opencontainers.image.title": "ood-runners",
        "org.opencontainers.image.description": "Out-of-distribution and visual anomaly detection service",
        "org.opencontainers.image.version": __version__,
        "org.opencontainers.image.licenses": "Apache-2.0",
        "ood-runners.bento": str(bento.tag),
        "ood-runners.device": "gpu" if gpu else "cpu",
        "ood-runners.products": json.dumps(pins, sort_keys=True, separators=(",", ":")),
        "ood-runners.sbom": "/bento/sbom.cdx.json",
    }


def build(image: str, base: str, names: str, builder: str, gpu: bool = False) -> str:
    """Build the image `image` from the base image `base`; its name.

    Raises
    ------
    OODError
        A version is missing or damaged, or the builder failed.
    """
    if shutil.which(builder) is None:
        raise NotFound(f"{builder} is not installed; install it, or name another one with --builder docker.")
    pins = pinned(names)
    bento = build_bento(pins)
    with tempfile.TemporaryDirectory(prefix="ood-image-") as context:
        write_context(Path(context), bento, pins, gpu)
        command = [builder, "build", "--tag", image, "--build-arg", f"BASE={base}"]
        command += ["--file", f"{context}/Containerfile"]
        for key, value in labels(bento, pins, gpu).items():
            command += ["--label", f"{key}={value}"]
        done = subprocess.run([*command, context], check=False)
    if done.returncode:
        raise OODError(f"{builder} could not build the image; its own lines above say why.")
    return image


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Build an image with exactly pinned versions.")
    parser.add_argument("--image", help=f"its name (default: ood-runners:{__version__}, with --gpu {__version__}-gpu)")
    parser.add_argument("--base", default=BASE, help="a Debian image with Python as here (default: %(default)s)")
    parser.add_argument("--products", default="", help="NAME:VERSION,… (default: every version in production)")
    parser.add_argument("--builder", default="podman", choices=("podman", "docker"))
    parser.add_argument("--gpu", action="store_true", help="for an NVIDIA GPU: with torch and the CUDA runtime")
    given = parser.parse_args(arguments)
    image = given.image or f"ood-runners:{__version__}{'-gpu' if given.gpu else ''}"
    try:
        print(build(image, given.base, given.products, given.builder, given.gpu))
    except OODError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"error: {' '.join(map(str, error.cmd[:4]))} failed; its own lines above say why.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
