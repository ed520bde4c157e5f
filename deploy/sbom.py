"""A CycloneDX bill of what is in the image: Python packages, Debian packages, fitted versions.

It runs in the build: ``python sbom.py ENVIRONMENT MODELS > sbom.cdx.json``.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

from cyclonedx.model import HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL


def python_packages(environment: Path) -> Iterator[Component]:
    """The distributions that are installed in a virtual environment."""
    for found in distributions(path=[str(path) for path in environment.glob("lib/python*/site-packages")]):
        name, version = found.name, found.version
        purl = PackageURL("pypi", name=name.lower(), version=version)
        yield Component(name=name, version=version, purl=purl, bom_ref=str(purl))


def debian_packages() -> Iterator[Component]:
    """The packages of the base image; none where it is not of Debian's kind."""
    if shutil.which("dpkg-query") is None:
        return
    wanted = ["dpkg-query", "--show", "--showformat=${Package} ${Version} ${Architecture}\\n"]
    for line in subprocess.run(wanted, check=True, capture_output=True, text=True).stdout.splitlines():
        name, version, architecture = line.split()
        purl = PackageURL("deb", "debian", name, version, qualifiers={"arch": architecture})
        yield Component(name=name, version=version, purl=purl, bom_ref=str(purl))


def models(folder: Path) -> Iterator[Component]:
    """The fitted versions and backbones, each with the SHA-256 of its manifest, which holds those of its files."""
    for guard in sorted(folder.glob("*/*/manifest.json.sha256")):
        tag = json.loads(guard.with_name("manifest.json").read_text())["tag"]
        name, _, version = tag.partition(":")
        yield Component(
            name=name,
            version=version,
            type=ComponentType.MACHINE_LEARNING_MODEL,
            bom_ref=tag,
            hashes=[HashType.from_hashlib_alg("sha256", guard.read_text().split()[0])],
        )


def main(environment: Path, folder: Path) -> None:
    """Write the bill to standard output."""
    bill = Bom(components=[*python_packages(environment), *debian_packages(), *models(folder)])
    print(JsonV1Dot6(bill).output_as_string(indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
