"""More products in one service than its memory budget holds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

PRODUCTS = [f"part-{i:02}" for i in range(22)]
BUDGET_MB = 160  # about seven feature networks in int8, about nine VAEs
CLONE = """
import shutil, sys
from ood_runners.artifacts import open_writer, promote, read_version
stored = read_version("parts")
for product in sys.argv[1:]:
    with open_writer(product) as writer:
        for name in stored.manifest.files:
            if name != "model.yaml":
                shutil.copyfile(stored.path / name, writer.path / name)
        promote(writer.commit(stored.manifest.model_copy(update={"product": product})))
"""


@pytest.fixture(scope="module")
def home(fitted: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one fitted version under 22 names."""
    home = tmp_path_factory.mktemp("many") / "home"
    shutil.copytree(fitted.home, home)
    done = subprocess.run(
        [sys.executable, "-c", CLONE, *PRODUCTS],
        env=os.environ | {"BENTOML_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return home


def megabytes(server: Any, runner: str) -> float:
    [process] = [
        child
        for child in psutil.Process(server.process.pid).children(recursive=True)
        if runner in " ".join(child.cmdline())
    ]
    return float(process.memory_info().rss / 2**20)


def gauge(server: Any, name: str, stage: str) -> float:
    lines = re.findall(rf'^{name}{{stage="{stage}"}} (\S+)$', server.http.get("/metrics").text, re.MULTILINE)
    return float(lines[0])


@pytest.mark.slow
def test_more_products_than_memory(serve: Any, home: Path, fitted: Any, normal: bytes, many: list[bytes]) -> None:
    # What a product takes grows with the pictures that are computed at a time: as many as cores, and as a batch.
    with serve(home, f"memory_mb={BUDGET_MB}", "max_batch=16") as server:
        expected = server.detect(normal, product="parts")

        def ask(product: str) -> None:
            answer = server.detect(normal, product=product)
            assert answer["product"] == product
            assert answer["score"] == pytest.approx(expected["score"], rel=1e-3)
            assert answer["verdict"] == expected["verdict"]

        def fill(product: str) -> None:
            """Have every runner compute a large batch of it, so that it takes as much as it ever does."""
            files = [("images", ("a.jpg", data)) for data in (many * 2)[:24]]
            assert server.http.post("/detect_batch", files=files, data={"product": product}).status_code == 200

        for product in PRODUCTS[:5]:
            ask(product)
            fill(product)
        full = {name: megabytes(server, name) for name in ("ResNet50Runner", "VAERunner")}
        for product in PRODUCTS:  # each cold one is served at its first request
            ask(product)
        for stage, most in (("features", 8), ("vae", 10)):
            assert 1 < gauge(server, "ood_loaded_versions", stage) <= most
            assert gauge(server, "ood_loaded_bytes", stage) <= BUDGET_MB * 2**20
        assert gauge(server, "ood_loaded_versions", "mahalanobis") >= 22  # these are small
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(ask, PRODUCTS))
        for product in PRODUCTS[::6]:
            fill(product)
        after = {name: megabytes(server, name) for name in full}
        for name, before in full.items():
            assert after[name] < before + 100, (full, after)
        # Once in each of the four runners, and again where it had been let go.
        assert server.log.read_text().count("Loaded ood-part-00:") > 4
        listed = {one["product"]: one["version"] for one in server.http.get("/products").json()["products"]}
        assert set(PRODUCTS) <= set(listed)
        assert all(listed[product] for product in PRODUCTS)
