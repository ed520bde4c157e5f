"""Fitting for real: the offline backbone, a store of the test's own, pictures drawn here."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from ood_runners import images
from ood_runners.artifacts import list_versions, production, products, read_version, write_backbone
from ood_runners.backbones import BackboneInfo, export_backbone
from ood_runners.detectors import Mahalanobis, MemoryBank, Softmax, vae_network
from ood_runners.errors import BadParameter, DataError
from ood_runners.pipeline import Product, load_golden
from ood_runners.training import fit as fitting
from ood_runners.training.storing import remember

ROOT = Path(__file__).resolve().parents[2]
BACKBONE = "efficientnet_lite0"
# In float32, which is fitted faster; int8 has tests of its own.
fit = partial(fitting.fit, precision="float32")
FAST = ["memory_bank", "mahalanobis"]  # the VAE has tests of its own; one test here fits all four


def stripes(seed: int, *, spot: bool = False) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.arange(96), np.arange(96))
    grey = 120 + 40 * np.sin((x + rng.uniform(0, 8)) / 3) + rng.normal(scale=4, size=(96, 96))
    picture = np.repeat(grey[..., None], 3, axis=2)
    if spot:
        picture[(x - 60) ** 2 + (y - 40) ** 2 < 90] = (200, 30, 30)
    return picture.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The backbone, exported once; what it is is tested elsewhere."""
    folder = tmp_path_factory.mktemp("exported")
    export_backbone(BACKBONE, None, folder)
    return folder


@pytest.fixture(autouse=True)
def quick(bento_home: Path, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A VAE that trains for a second, and a store that has the backbone already."""
    monkeypatch.setattr(vae_network, "EPOCHS", 1)
    monkeypatch.setattr(vae_network, "STEPS_PER_EPOCH", 4)
    info = BackboneInfo.load(exported)
    write_backbone(info, exported)
    remember(BACKBONE, None, info.sha256)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fill(tmp_path / "parts", 20)


def fill(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i:03}.png").write_bytes(images.encode_png(stripes(i)))
    return folder


def test_a_fitted_version_finds_a_spot_and_is_reproducible(bento_home, folder):
    first = fit(folder, product="stripes", backbone=BACKBONE, size=(96, 96), detectors=FAST, alpha=0.05)
    product = Product.open(read_version("stripes"))
    normal, odd = product.judge(np.stack([stripes(500), stripes(501, spot=True)]))
    assert odd.verdict == "anomalous" and normal.p_value > odd.p_value
    scores = product.raw_scores(np.stack([stripes(501, spot=True)]))
    heat = product.anomaly_maps(scores, (96, 96))[0]
    top, left = np.unravel_index(heat.argmax(), heat.shape)
    assert abs(top - 40) < 16 and abs(left - 60) < 16

    second = fit(folder, product="stripes", backbone=BACKBONE, size=(96, 96), detectors=FAST, alpha=0.05)
    assert second.tag != first.tag
    assert second.manifest.golden == first.manifest.golden
    assert second.manifest.data.fingerprint == first.manifest.data.fingerprint
    assert production("stripes") == second.tag.split(":")[1]
    assert second.manifest.backbone.tag == first.manifest.backbone.tag  # stored once


def test_all_four_detectors_and_the_named_class(bento_home, tmp_path):
    for name, phase in (("fine", 0), ("coarse", 1)):
        folder = tmp_path / "classes" / "train" / name
        folder.mkdir(parents=True)
        for i in range(10):
            picture = stripes(i)
            picture = picture[:, ::2].repeat(2, axis=1) if phase else picture.transpose(1, 0, 2).copy()
            (folder / f"{i}.png").write_bytes(images.encode_png(picture))
    result = fit(tmp_path / "classes", product="kinds", backbone=BACKBONE, size=(64, 64), alpha=0.1)
    assert list(result.manifest.detectors) == ["memory_bank", "mahalanobis", "vae", "softmax"]
    assert result.manifest.data.classes == ["coarse", "fine"]
    product = Product.open(read_version("kinds"))
    judged = product.judge(load_golden(read_version("kinds"))[None])[0]
    assert judged.p_value == pytest.approx(result.manifest.golden.p_value)
    for name, score in result.manifest.golden.scores.items():
        assert judged.detectors[name].score == pytest.approx(score, rel=1e-4)
    picture = images.resize(stripes(3).transpose(1, 0, 2).copy(), (64, 64))
    assert product.classes[product.judge(picture[None])[0].predicted] == "fine"


def test_detectors_of_whole_pictures_are_fitted_without_copies_of_patches(bento_home, folder, monkeypatch):
    """Each fold's fit copies what it is given, which is gigabytes where a large folder's patches are in it."""
    seen = {}

    def watch(kind):
        real = kind.fit_held_out

        def fit_held_out(self, features, folds, labels=None, *, probes=None, **options):
            seen[self.name] = [of.patches is None and of.pictures is None for of in (features, probes.features)]
            return real(self, features, folds, labels, probes=probes, **options)

        monkeypatch.setattr(kind, "fit_held_out", fit_held_out)

    for kind in (Mahalanobis, MemoryBank, Softmax):
        watch(kind)
    names = ["memory_bank", "mahalanobis", "softmax"]
    fit(folder, product="stripes", backbone=BACKBONE, size=(64, 64), detectors=names, alpha=0.1)
    assert seen == {"mahalanobis": [True, True], "softmax": [True, True], "memory_bank": [False, False]}


@pytest.mark.parametrize("head", ["auto", "react"])
def test_heads_on_the_networks_own_final_layer(bento_home, folder, head):
    """The layer is read from the stored weights, and none of its readers needs more than one pooled layer."""
    result = fit(
        folder, product="stripes", backbone=BACKBONE, size=(64, 64), detectors=["softmax"], head=head, alpha=0.1
    )
    assert result.manifest.detectors["softmax"].params["head"] == head
    assert result.manifest.features.pooled_layers == ["head"] and result.manifest.features.logits
    stored = read_version("stripes")
    assert "head.react.weight" in stored.arrays("softmax") or head == "auto"
    product = Product.open(stored)
    normal, noise = product.judge(
        np.stack(
            [images.resize(stripes(500), (64, 64)), np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)]
        )
    )
    assert np.isfinite(noise.score) and normal.score != noise.score
    assert product.classes[normal.predicted]


def test_a_head_that_does_not_exist_is_refused_before_any_work(bento_home, folder):
    with pytest.raises(BadParameter, match="no head entropy; choose auto, or one of msp"):
        fit(folder, product="stripes", backbone=BACKBONE, head="entropy")


def test_broken_files_are_skipped_and_listed(bento_home, folder):
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("no picture")
    (folder / "cut.png").write_bytes((folder / "000.png").read_bytes()[:200])
    result = fit(folder, product="stripes", backbone=BACKBONE, size=(64, 64), detectors=["mahalanobis"])
    assert [one.path for one in result.manifest.data.skipped] == ["cut.png", "empty.png", "text.jpg"]
    assert result.manifest.data.train_count == 20
    assert sum(line.startswith("Skipped ") for line in result.lines) == 3
    assert "alpha is 0.04762, not 0.01" in "\n".join(result.lines)


def test_a_training_picture_unlike_the_others_is_named(bento_home, folder):
    (folder / "odd.png").write_bytes(images.encode_png(255 - stripes(3, spot=True).transpose(1, 0, 2) // 2))
    settings = {"backbone": BACKBONE, "size": (64, 64), "detectors": FAST}
    kept = fit(folder, product="stripes", contamination="none", **settings).manifest
    assert kept.data.suspects == ["odd.png"] and not kept.data.left_out
    assert kept.data.train_count == kept.calibration.n == 21

    result = fit(folder, product="stripes", **settings)
    data = result.manifest.data
    left_out, *held_back = data.left_out
    assert left_out.path == "odd.png" and "odd.png" not in data.suspects
    assert held_back and all(one.calibrated and not one.fitted for one in held_back)
    assert result.manifest.calibration.n == 20 and data.train_count == 20 + left_out.fitted - len(held_back)
    said = "\n".join(result.lines)
    assert f"{'Set aside' if left_out.fitted else 'Dropped'} odd.png: " in said
    # Two of 22: the one left out, and one of the 20 that alpha = 1/21 allows.
    assert "up to 9.09% are called anomalous; fit with --contamination none then." in said
    assert result.manifest.notes and result.manifest.notes[-1] in result.lines


def test_a_defect_among_the_pictures_is_dropped_and_the_others_are_calibrated_on(bento_home, folder):
    settings = {"backbone": BACKBONE, "size": (96, 96), "detectors": FAST, "alpha": 0.06}
    (folder / "003.png").unlink()  # of these drawings the one that is left out by chance
    clean = fit(folder, product="clean", **settings).manifest
    (folder / "zz_spot.png").write_bytes(images.encode_png(stripes(501, spot=True)))
    found = fit(folder, product="found", **settings).manifest
    assert [one.path for one in found.data.left_out if not one.calibrated] == ["zz_spot.png"]
    assert not any(one.fitted for one in found.data.left_out)
    assert not clean.data.left_out and found.calibration == clean.calibration
    normal, odd = stripes(500), stripes(502, spot=True)
    judged = Product.open(read_version("found")).judge(np.stack([normal, odd]))
    assert [one.verdict for one in judged] == ["normal", "anomalous"]


def test_a_way_with_contamination_that_does_not_exist_is_refused_before_any_work(bento_home, folder):
    with pytest.raises(BadParameter, match="no contamination 'some'; choose auto or none"):
        fit(folder, product="stripes", backbone=BACKBONE, contamination="some")


def test_nothing_is_stored_for_data_that_cannot_be_fitted(bento_home, tmp_path):
    with pytest.raises(DataError, match=r"Only one picture .* at least 8"):
        fit(fill(tmp_path / "one", 1), product="stripes", backbone=BACKBONE)
    texts = fill(tmp_path / "texts", 2)
    for i in range(4):
        (texts / f"text{i}.png").write_text("no picture")
    with pytest.raises(DataError, match=r"Only 2 pictures of 6 .* Skipped: text0\.png: This is not .*; and 1 more$"):
        fit(texts, product="stripes", backbone=BACKBONE)
    with pytest.raises(BadParameter, match="no detector nonsense"):
        fit(fill(tmp_path / "some", 9), product="stripes", backbone=BACKBONE, detectors=["nonsense"])
    assert list_versions() == [] and production("stripes") is None


def test_detectors_that_the_weights_cannot_feed(bento_home, folder, shared_weights):
    weights = shared_weights / "resnet50_v1_to_layer3.safetensors"
    with pytest.raises(BadParameter, match="softmax is left out: the weights have no classification head"):
        fit(folder, product="stripes", backbone="resnet50_v1", weights=weights, detectors=["softmax"])
    result = fit(folder, product="stripes", backbone="resnet50_v1", weights=weights, size=(64, 64))
    assert "softmax" not in result.manifest.detectors
    assert result.lines[0].startswith("softmax is left out")


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "build_artifacts.py"), *arguments]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda folder: folder / "absent", "There is no folder"),
        (lambda folder: fill(folder / "none", 0), "There are no pictures in"),
        (lambda folder: fill(folder / "one", 1), "Only one picture"),
    ],
)
def test_the_command_says_what_is_wrong_and_exits_with_1(bento_home, tmp_path, make, sentence):
    done = subprocess.run(
        command("fit", str(make(tmp_path)), "--product", "stripes", "--backbone", BACKBONE),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert sentence in done.stderr and "Traceback" not in done.stderr
    assert list_versions() == []


def test_ctrl_c_leaves_the_store_as_it_was(bento_home, tmp_path):
    folder = fill(tmp_path / "parts", 60)
    running = subprocess.Popen(
        command("fit", str(folder), "--product", "stripes", "--backbone", BACKBONE),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    assert running.stderr is not None
    for line in running.stderr:  # until the features are being computed
        if line.startswith("backbone"):
            break
    time.sleep(0.5)
    running.send_signal(signal.SIGINT)
    rest = running.stderr.read()
    assert running.wait(timeout=60) == 130
    assert "interrupted" in rest and "Traceback" not in rest
    assert list_versions() == [] and production("stripes") is None
    assert not list((bento_home / "ood-staging").glob("*/*"))


def test_a_budget_makes_the_bank_smaller_and_the_costs_are_recorded(bento_home, folder):
    options = {"backbone": BACKBONE, "size": (64, 64), "detectors": FAST, "promote": False}
    plain = fit(folder, product="stripes", bank_size=1_500, **options)
    cost = plain.manifest.cost
    assert plain.manifest.detectors["memory_bank"].params["size"] == 1_500
    assert cost["ms"] > 0 and "budget" not in cost
    assert cost["device"] == "cpu" and cost["ms_by_batch"][str(cost["batch"])] <= cost["ms"] == cost["ms_by_batch"]["1"]
    stored = read_version(plain.tag)
    held = sum(file.stat().st_size for file in stored.path.iterdir()) / 1e6
    assert cost["mb"] == pytest.approx(held, abs=0.05)  # the manifest itself is not counted

    allowed = cost["mb"] - 0.1
    small = fit(folder, product="stripes", budget_mb=allowed, **options)
    entries = small.manifest.detectors["memory_bank"].info["entries"]
    assert entries < plain.manifest.detectors["memory_bank"].info["entries"]
    assert small.manifest.cost["mb"] <= allowed and small.manifest.cost["budget"] == {"ms": None, "mb": allowed}
    assert list(small.manifest.detectors) == FAST and "budget" in small.manifest.cost["seconds"]
    assert any(line.startswith("A verdict takes ") and f"{entries} entries" in line for line in small.lines)
    assert Product.open(read_version(small.tag)).judge(np.zeros((1, 64, 64, 3), np.uint8))[0].verdict == "anomalous"

    before = len(list_versions())
    with pytest.raises(BadParameter, match="are too few; raise --budget-ms"):
        fit(folder, product="stripes", budget_ms=0.001, **options)
    assert len(list_versions()) == before


def test_profile_search_and_what_goes_before_them(bento_home, folder):
    result = fit(
        folder, product="stripes", backbone=BACKBONE, size=(64, 64), profile="fast", search="hnsw", alpha=0.1, seed=3
    )
    assert list(result.manifest.detectors) == ["memory_bank", "mahalanobis", "softmax"]
    bank = result.manifest.detectors["memory_bank"]
    assert bank.params["size"] == 2_000 and bank.params["search"] == "hnsw"
    assert set(bank.info["index_recall"]) == {"hnsw"}
    assert bank.info["search"] == ("hnsw" if bank.info["index_recall"]["hnsw"] >= 0.99 else "exact")
    for wrong in ({"profile": "quick"}, {"search": "kdtree"}, {"bank_size": 9, "budget_mb": 1.0}):
        with pytest.raises(BadParameter):
            fit(folder, product="stripes", backbone=BACKBONE, **wrong)


def faint(seed: int) -> np.ndarray:
    """Stripes with a place that is hardly darker."""
    picture = stripes(seed).astype(np.float32)
    picture[36:52, 52:68] *= 0.93
    return picture.astype(np.uint8)


def test_weights_are_learned_from_labelled_defects_and_served(bento_home, folder, tmp_path):
    defects = tmp_path / "known" / "dark"
    defects.mkdir(parents=True)
    for i in range(12):
        (defects / f"{i}.png").write_bytes(images.encode_png(faint(700 + i)))
    settings = {"backbone": BACKBONE, "size": (96, 96), "detectors": ["memory_bank"], "alpha": 0.05}
    plain = Product.open(read_version(fit(folder, product="stripes", **settings).tag))
    made = fit(folder, product="stripes", defects=tmp_path / "known", **settings)
    learned = made.manifest.detectors["memory_bank"].info["attention"]
    assert learned["used"] and learned["defects"] == 12 and learned["auroc_weighted"] > learned["auroc"]
    assert any(line.startswith("Weights learned from 12 pictures of defects are used") for line in made.lines)
    assert made.manifest.notes[0] in made.lines
    weighted = Product.open(read_version(made.tag))
    new = np.stack([stripes(i) for i in range(800, 816)] + [faint(i) for i in range(820, 836)])

    def auroc(product: Product) -> float:
        scores = product.raw_scores(new)["memory_bank"].image
        return float(np.mean(scores[16:, None] > scores[:16]))

    assert auroc(weighted) > auroc(plain)


def test_defects_that_are_fitted_on_as_normal_or_too_few_are_refused(bento_home, folder, tmp_path):
    settings = {"product": "stripes", "backbone": BACKBONE, "size": (96, 96), "detectors": ["memory_bank"]}
    with pytest.raises(DataError, match="fitted on as normal"):
        fit(folder, defects=folder, **settings)
    few = fill(tmp_path / "few", 4)
    with pytest.raises(DataError, match=r"4 pictures of defects .* at least 5 are needed"):
        fit(folder, defects=few, **settings)
    assert not products()
