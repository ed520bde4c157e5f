"""How well defects are told from normal pictures: every development set, each detector and the fused score.

    python benchmarks/accuracy.py                        # all sets; minutes each on a quiet machine
    python benchmarks/accuracy.py --sets cookies --detectors memory_bank,mahalanobis --precision float32
    python benchmarks/accuracy.py --sets cookies --size 320 --also resnet50_v1@224 --also efficientnet_lite0@224
    python benchmarks/accuracy.py --ablation --sets cookies,ball_screws
    python benchmarks/accuracy.py --anomalib-python VENV/bin/python         # its PatchCore and PaDiM beside ours

A set is fitted as `fit` does, with a fixed seed, and judged on its test folder. `--ablation` computes the features of
a set once, in float32, and compares choices behind them on memory bank and Mahalanobis. anomalib's methods get the
same pictures, 224 pixels and ResNet50; their raw scores and maps are measured by the code that measures ours.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
from common import SHARED, Peer, auroc, find_weights, heading, show

SETS = ("hazelnut_toy", "cookies", "ball_screws")
GENERATED = {"generated": 0, "generated_7": 7}
COLUMNS = ("image AUROC", "pixel AUROC", "AUPRO", "FPR at alpha", "bank", "ms a picture")
ALPHA = 0.05
ABLATION_BANK = 4_000


def find(name: str, scratch: Path) -> Path | None:
    """The set's folder in MVTec's layout; None, with a line, where it is not there."""
    if name in GENERATED:
        from ood_runners.training.inspection_set import generate

        return generate(scratch / name, train=60, good=40, per_defect=10, size=448, seed=GENERATED[name])
    folder = SHARED / "data" / name
    if folder.is_dir():
        return folder
    print(f"{name} is left out: there is no {folder}.")
    return None


def measure(folder: Path, name: str, weights: Any, arguments: argparse.Namespace) -> list[list[object]]:
    """Rows of the table: the fused score and each detector."""
    from ood_runners.artifacts import read_version
    from ood_runners.pipeline import Product
    from ood_runners.sizes import parse_size
    from ood_runners.training.datasets import discover
    from ood_runners.training.evaluate import evaluate
    from ood_runners.training.fit import fit

    names = arguments.detectors.split(",") if arguments.detectors else None
    fitted = fit(
        folder,
        product=name.replace("_", "-"),
        backbone=weights.backbone,
        weights=weights.path,
        alpha=ALPHA,
        detectors=names,
        precision=arguments.precision,
        profile=arguments.profile,
        seed=arguments.seed,
        size=None if arguments.size is None else parse_size(arguments.size),
        also=arguments.also,
    )
    product = Product.open(read_version(name.replace("_", "-")))
    found = evaluate(product, discover(folder))
    entry = fitted.manifest.detectors.get("memory_bank")
    rows = []
    for method, measured in found.overall.items():
        figures = [measured.image_auroc, measured.pixel_auroc, measured.aupro]
        fused = method == "fused"
        rows.append(
            [
                name,
                method,
                *("-" if one.value is None else f"{one.value:.3f}" for one in figures),
                f"{found.false_alarms.rate:.3f}" if fused and found.false_alarms.rate is not None else "-",
                entry.info["entries"] if entry is not None and method in ("fused", "memory_bank") else "-",
                f"{found.timings.milliseconds_a_picture:.0f}" if fused else "-",
            ]
        )
    return rows


def of_peer(peer: Peer, folder: Path, name: str, weights: Any, coreset: float, scratch: Path) -> list[list[object]]:
    """Rows of anomalib's methods; it has no false-alarm rate without anomalous pictures."""
    from ood_runners import images
    from ood_runners.training.datasets import discover
    from ood_runners.training.metrics import PixelTally

    test = discover(folder).test
    strange, to = np.array([file.label != "good" for file in test]), str(scratch / "judged.npz")
    rows: list[list[object]] = []
    for kind, told in (("patchcore", f"PatchCore {coreset:.0%}"), ("padim", "PaDiM")):
        fitted, _ = peer.run("fit", folder=str(folder), weights=str(weights.path), kind=kind, coreset=coreset)
        judged, _ = peer.run("judge", files=[str(file.path) for file in test], to=to)
        tally = PixelTally()
        with np.load(to, allow_pickle=False) as found:
            scores, maps = found["scores"], found["maps"]
        for file, one in zip(test, maps, strict=True):
            if file.label == "good" or file.mask is not None:
                mask = None if file.mask is None else images.read(file.mask).max(axis=2) > 0
                tally.add(one[None], [mask])
        figures = [auroc(scores[~strange], scores[strange]), tally.auroc().value, tally.aupro().value]
        cells = ["-" if one is None else f"{one:.3f}" for one in figures]
        rows.append(
            [name, f"anomalib {told}", *cells, "-", fitted["entries"] or "-", f"{1000 * judged['seconds']:.0f}"]
        )
    return rows


# ---------------------------------------------------------------- choices, compared on the same features


def ablate(folder: Path, weights: Any, seed: int, scratch: Path) -> Mapping[str, tuple[float, float]]:
    """Image AUROC and AUPRO of each choice."""
    from ood_runners import images
    from ood_runners.calibration import Calibration, fusion
    from ood_runners.calibration import calibration as rules
    from ood_runners.calibration.weights import INSPECTION
    from ood_runners.detectors import Mahalanobis, MemoryBank, position
    from ood_runners.features import Features
    from ood_runners.training.datasets import discover
    from ood_runners.training.metrics import PixelTally
    from ood_runners.training.pictures import read_training
    from ood_runners.training.prepare import prepare
    from ood_runners.training.progress import SilentProgress
    from ood_runners.training.storing import store_backbone

    size, quiet, data = (224, 224), SilentProgress(), discover(folder)
    training = read_training(data, size, scratch, quiet)
    stored = store_backbone(weights.backbone, weights.path, scratch)
    names = ("memory_bank", "mahalanobis")
    prepared = prepare(
        training, stored, names, device="cpu", precision="float32", seed=seed, scratch=scratch, progress=quiet
    )
    network = prepared.network
    if network is None or prepared.projection is None:
        raise RuntimeError("patches need a network and a projection")
    tests = [images.resize(images.read(file.path), size) for file in data.test]
    parts = [network(np.stack(tests[i : i + 8])) for i in range(0, len(tests), 8)]
    judged, strange = Features.concatenate(parts), np.array([file.label != "good" for file in data.test])
    folds = np.random.default_rng(seed).permutation(len(training.pictures)) % 10
    masked = [i for i, file in enumerate(data.test) if file.label == "good" or file.mask is not None]

    def run(
        k: int = 3, size_of_bank: int = ABLATION_BANK, weight: float = INSPECTION["mahalanobis"], fine: bool = True
    ) -> Any:
        detectors: dict[str, Any] = {
            "memory_bank": MemoryBank(size=size_of_bank, k=k, seed=seed),
            "mahalanobis": Mahalanobis(),
        }
        detectors["memory_bank"].fine_ = prepared.projection.fine if fine else None
        held_out = {name: one.fit_held_out(prepared.features, folds) for name, one in detectors.items()}
        scores = {name: one.score(judged) for name, one in detectors.items()}
        calibration = Calibration.fit(held_out, {"memory_bank": 1.0, "mahalanobis": weight}, size, ALPHA)
        tally = PixelTally()
        for i in masked:
            mask = None if data.test[i].mask is None else images.read(data.test[i].mask).max(axis=2) > 0
            tally.add(calibration.anomaly_map({n: s[[i]] for n, s in scores.items()}, size), [mask])
        fused = np.array([one.score for one in calibration.judge(scores)])
        both = {"fused": fused, **{name: one.image for name, one in scores.items()}}
        return {name: auroc(one[~strange], one[strange]) for name, one in both.items()}, tally.aupro().value

    found: dict[str, tuple[float, float]] = {}
    single, pro = run()
    found["memory bank alone"], found["Mahalanobis alone"] = (single["memory_bank"], pro), (single["mahalanobis"], 0)
    found["as it is"] = (single["fused"], pro)
    with patch.object(position, "MOST_EXPLAINED", -1.0):
        plain, pro = run()
        found["distances, not by place: memory bank alone"] = (plain["memory_bank"], pro)
        found["distances, not by place"] = (plain["fused"], pro)
    with patch.object(position, "MOST_EXPLAINED", 2.0):
        place, pro = run()
        found["by place always"] = (place["fused"], pro)
    choices: dict[str, Callable[[], Any]] = {
        "Mahalanobis counts a half": lambda: run(weight=0.5),
        "k = 1": lambda: run(k=1),
        "k = 9": lambda: run(k=9),
        "the plain metric for the map as well": lambda: run(fine=False),
        "a quarter of the bank": lambda: run(size_of_bank=ABLATION_BANK // 4),
    }
    for name, choice in choices.items():
        changed, pro = choice()
        found[name] = (changed["fused"], pro)
    with patch.object(fusion.fuse_held_out, "__defaults__", (fusion.add,)), patch.object(rules, "fuse", fusion.add):
        changed, pro = run(weight=0.5)
        found["sum of surprises, Mahalanobis a half"] = (changed["fused"], pro)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", default=",".join((*SETS, *GENERATED)), help="names with commas between")
    parser.add_argument("--detectors", help="names with commas between; all that the weights allow otherwise")
    parser.add_argument("--precision", default="auto", choices=("auto", "float32", "int8"))
    parser.add_argument("--profile", default="balanced", choices=("fast", "balanced", "accurate"))
    parser.add_argument("--size", metavar="PIXELS", help="as of `fit`")
    parser.add_argument("--also", metavar="BACKBONE[@SIZE]", action="append", default=[], help="as of `fit`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ablation", action="store_true")
    parser.add_argument("--anomalib-python", metavar="FILE", help="an interpreter that has anomalib")
    parser.add_argument("--coreset", type=float, default=0.1, help="of anomalib's PatchCore (default: %(default)s)")
    parser.add_argument("--only-peer", action="store_true", help="do without our own rows")
    arguments = parser.parse_args()
    with TemporaryDirectory(prefix="ood-accuracy-") as name:
        scratch = Path(name)
        os.environ["BENTOML_HOME"] = name  # before anything imports BentoML
        (scratch / "models").mkdir()
        weights = find_weights(scratch)
        heading(weights.what)
        folders = {one: folder for one in arguments.sets.split(",") if (folder := find(one, scratch)) is not None}
        if arguments.ablation:
            tables = {}
            for one, folder in folders.items():
                work = scratch / f"{one}-work"
                work.mkdir()
                tables[one] = ablate(folder, weights, arguments.seed, work)
                rows = [[choice, f"{a:.4f}", f"{p:.3f}"] for choice, (a, p) in tables[one].items()]
                show(one, ("choice", "image AUROC", "AUPRO"), rows)
            return
        peer = Peer.find(arguments.anomalib_python, scratch / "anomalib") if arguments.anomalib_python else None
        rows = []
        for one, folder in folders.items():
            rows += [] if arguments.only_peer else measure(folder, one, weights, arguments)
            rows += of_peer(peer, folder, one, weights, arguments.coreset, scratch) if peer else []
        rows.sort(key=lambda row: list(folders).index(str(row[0])))
        show(f"alpha {ALPHA:g}, seed {arguments.seed}", ("set", "method", *COLUMNS), rows)


if __name__ == "__main__":
    main()
