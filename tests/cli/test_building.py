"""Fit, evaluate, promote and roll back as a person does: a process, its output and its exit status."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from ood_runners.artifacts.files import sha256
from ood_runners.artifacts.verify import MANIFEST, MANIFEST_SUM, manifest_sum
from ood_runners.images import encode_png
from ood_runners.pipeline import GOLDEN
from ood_runners.training.inspection_set import generate
from tests.artifacts.samples import snapshot

ROOT = Path(__file__).resolve().parents[2]
FAST = ("--backbone", "efficientnet_lite0", "--detectors", "memory_bank,mahalanobis", "--size", "64", "--device", "cpu")


@dataclass(frozen=True)
class Shop:
    """A store with two versions of the product ``flange`` and the pictures it was fitted on."""

    home: Path
    data: Path
    first: str
    second: str
    printed: str

    def start(self, *args: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "build_artifacts.py", *map(str, args)],
            cwd=ROOT,
            env=os.environ | {"BENTOML_HOME": str(self.home)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *args: object) -> tuple[int, list[str], str]:
        """Exit status, lines of standard output, standard error."""
        process = self.start(*args)
        stdout, stderr = process.communicate(timeout=240)
        assert "Traceback" not in stderr, stderr
        return process.returncode, stdout.splitlines(), stderr


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    home, data = tmp_path_factory.mktemp("store"), tmp_path_factory.mktemp("pictures")
    generate(data, train=24, good=6, per_defect=2, size=96)
    for number, content in enumerate((b"", b"not a picture", (data / "train/good/000.png").read_bytes()[:300])):
        (data / "train" / "good" / f"broken{number}.png").write_bytes(content)
    empty = Shop(home, data, "", "", "")
    status, lines, stderr = empty.run("fit", data, "--product", "flange", *FAST)
    assert status == 0, stderr
    status, more, stderr = empty.run("fit", data, "--product", "flange", *FAST, "--no-promote", "--seed", "1")
    assert status == 0, stderr
    return Shop(home, data, lines[-1], more[-1], "\n".join(lines))


def test_a_fit_ends_with_its_tag_and_says_what_was_skipped_and_which_alpha_holds(shop: Shop) -> None:
    assert re.fullmatch(r"flange:[\w.-]+", shop.first)
    assert shop.first != shop.second
    for number in range(3):
        assert f"broken{number}.png" in shop.printed
    assert re.search(r"alpha is 0\.04, not 0\.01: .* 99 are needed", shop.printed)
    _, shown, _ = shop.run("show", shop.first)
    assert "0.04 (0.01 asked for)" in "\n".join(shown)


def test_only_the_first_is_in_production(shop: Shop) -> None:
    _, lines, _ = shop.run("list", "--product", "flange")
    assert [line.split()[0] for line in lines if "production" in line] == [shop.first]


def test_an_evaluation_writes_what_it_was_asked_for(shop: Shop, tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("m.json", "r.html", "s.csv")}
    status, lines, _ = shop.run(
        "evaluate", shop.data, "--product", shop.second, "--alpha", "0.2",
        "--json", files["m.json"], "--html", files["r.html"], "--scores", files["s.csv"],
        "--learning-curve", "--robustness",
    )  # fmt: skip
    assert status == 0
    assert lines[-3:] == [str(files[name]) for name in ("m.json", "s.csv", "r.html")]
    metrics = json.loads(files["m.json"].read_text())
    assert metrics["product"].endswith(shop.second)
    assert metrics["alpha"] == pytest.approx(0.2)
    assert metrics["overall"]["fused"]["image_auroc"] > 0.5
    assert [point["pictures"] for point in metrics["learning_curve"]["points"]] == [5, 10, 19]
    assert metrics["learning_curve"]["advice"] in lines
    assert len(metrics["robustness"]["changes"]) == 25
    assert metrics["robustness"]["advice"] in lines
    rows = list(csv.DictReader(files["s.csv"].open()))
    assert len(rows) == 6 + 2 * len([folder for folder in (shop.data / "test").iterdir() if folder.name != "good"])
    assert {"path", "label", "verdict", "p_value", "score", "memory_bank_score", "mahalanobis_p_value"} <= set(rows[0])
    assert files["r.html"].read_text().lstrip().lower().startswith("<!doctype html>")


def test_promote_and_rollback_name_from_and_to(shop: Shop) -> None:
    status, lines, _ = shop.run("promote", shop.second, "--why", "sharper")
    assert (status, lines[-1]) == (0, shop.second)
    assert shop.first.split(":")[1] in lines[0]
    status, lines, _ = shop.run("rollback", "flange")
    assert (status, lines[-1]) == (0, shop.first)
    _, shown, _ = shop.run("show", "flange")
    assert "sharper" in "\n".join(shown)
    status, lines, stderr = shop.run("rollback", "flange")
    assert (status, lines) == (1, [])
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1


def test_a_version_that_scores_otherwise_is_not_promoted(shop: Shop, tmp_path: Path) -> None:
    """The golden picture is replaced, and the hashes with it, as if everything were in order."""
    home = tmp_path / "home"
    shutil.copytree(shop.home, home)
    other = Shop(home, shop.data, shop.first, shop.second, "")
    folder = home / "models" / "ood-flange" / shop.second.split(":")[1]
    (folder / GOLDEN).write_bytes(encode_png(np.zeros((64, 64, 3), np.uint8)))
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][GOLDEN] = sha256(folder / GOLDEN)
    text = (json.dumps(manifest) + "\n").encode()
    (folder / MANIFEST).write_bytes(text)
    (folder / MANIFEST_SUM).write_text(manifest_sum(text))
    status, _, stderr = other.run("promote", shop.second)
    assert status == 1
    assert "golden picture" in stderr
    _, lines, _ = other.run("list", "--product", "flange")
    assert [line.split()[0] for line in lines if "production" in line] == [shop.first]


@pytest.mark.parametrize("pictures", [None, 0, 1])
def test_a_folder_that_cannot_be_fitted_is_one_sentence(shop: Shop, tmp_path: Path, pictures: int | None) -> None:
    folder = tmp_path / "pictures"
    if pictures is not None:
        folder.mkdir()
    for number in range(pictures or 0):
        shutil.copy(shop.data / "train" / "good" / f"{number:03d}.png", folder)
    before = snapshot(shop.home)
    status, lines, stderr = shop.run("fit", folder, "--product", "flange", *FAST)
    assert (status, lines) == (1, [])
    assert re.search(r"^error: [A-Z/].*[.]$", stderr, re.MULTILINE)
    assert snapshot(shop.home) == before


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_fit_leaves_the_store_as_it_was(shop: Shop, how: signal.Signals) -> None:
    before = snapshot(shop.home)
    process = shop.start("fit", shop.data, "--product", "flange", *FAST)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("features"):
            break
    process.send_signal(how)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stdout == ""
    assert stderr.splitlines()[-1] == "interrupted: nothing was stored or changed"
    assert "Traceback" not in stderr
    assert snapshot(shop.home) == before
