"""What `fit --augment light` gives and costs: false alarms under other light, AUROC of defects, with and without it.

    python benchmarks/light.py FOLDER          # in MVTec's layout, such as ../shared/data/ball_screws

Memory bank and Mahalanobis on `efficientnet_lite0` at 224 pixels, fused as in a product, calibrated on the training
pictures by cross-fitting and judged at alpha 5 %. At most 60 normal and 60 defective test pictures; three synthetic
defects of each of these normal ones.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from ood_runners.artifacts.manifest import FeaturesEntry
from ood_runners.backbones import BackboneInfo, FeatureNetwork, Projection, ProjectionFitter, export_backbone
from ood_runners.calibration import Calibration
from ood_runners.calibration.weights import INSPECTION
from ood_runners.detectors import Detector, Mahalanobis, MemoryBank
from ood_runners.features import Features, Scores
from ood_runners.training.augment import LIGHT, fit_held_out, under_light
from ood_runners.training.changes import brightness, contrast
from ood_runners.training.datasets import discover
from ood_runners.training.prepare import Prepared
from ood_runners.training.progress import SilentProgress
from ood_runners.training.robustness import read_some
from ood_runners.training.synthetic import synthetic_defects

SIZE, ALPHA, MOST, FOLDS, BATCH = (224, 224), 0.05, 60, 10, 8
CHANGES = {
    "unchanged": lambda picture: picture,
    "brightness -20 %": lambda picture: brightness(picture, -20),
    "brightness +20 %": lambda picture: brightness(picture, 20),
    "contrast -40 %": lambda picture: contrast(picture, -40),
    "contrast +40 %": lambda picture: contrast(picture, 40),
}


def run(network: FeatureNetwork, pictures: NDArray[np.uint8]) -> Features:
    """Features of all pictures."""
    return Features.concatenate([network(pictures[i : i + BATCH]) for i in range(0, len(pictures), BATCH)])


def load(folder: Path, train: NDArray[np.uint8]) -> FeatureNetwork:
    """The network with a projection fitted on the training pictures."""
    export_backbone("efficientnet_lite0", None, folder)
    spec = BackboneInfo.load(folder).spec

    def network(pooled: tuple[str, ...], projection: Projection | None) -> FeatureNetwork:
        return FeatureNetwork.load(
            folder,
            size=SIZE,
            patch_layers=spec.patch_layers,
            pooled_layers=pooled,
            projection=projection,
            device="cpu",
        )

    fitter, raw = ProjectionFitter(), network((), None)
    for start in range(0, len(train), BATCH):
        patches = raw(train[start : start + BATCH]).patches
        assert patches is not None
        fitter.partial_fit(patches)
    return network(tuple(spec.pooled_layers), fitter.finish(128))


def main(folder: Path) -> None:
    """Print one row without and one with the augmentation."""
    dataset, rng = discover(folder), np.random.default_rng(0)
    shuffled = [dataset.test[i] for i in rng.permutation(len(dataset.test))]
    train, normal, defective = (
        np.stack([picture for _, picture in read_some(files, SIZE, most)])
        for files, most in (
            (dataset.train, len(dataset.train)),
            ([file for file in shuffled if file.label == "good"], MOST),
            ([file for file in shuffled if file.label != "good"], MOST),
        )
    )
    folds = rng.permutation(np.arange(len(train)) % FOLDS)
    with TemporaryDirectory() as name:
        scratch = Path(name)
        network = load(scratch, train)
        known = run(network, train)
        synthetic = run(network, np.concatenate([synthetic_defects(normal, rng)[0] for _ in range(3)]))
        real = run(network, defective)
        changed = {label: run(network, np.stack([c(one) for one in normal])) for label, c in CHANGES.items()}
        prepared = Prepared(FeaturesEntry(), None, {}, None, network, known)
        light = under_light(prepared, train, scratch, SilentProgress())
        print("| --augment | AUROC synthetic | AUROC real | " + " | ".join(CHANGES) + " |")
        print("| --- | --- | --- | " + " | ".join("---" for _ in CHANGES) + " |")
        for title, variants in (("none", None), (LIGHT, light)):
            detectors: dict[str, Detector] = {"memory_bank": MemoryBank(), "mahalanobis": Mahalanobis()}
            held_out = {k: Scores(fit_held_out(d, known, variants, folds, None).image) for k, d in detectors.items()}
            calibration = Calibration.fit(held_out, {name: INSPECTION[name] for name in detectors}, SIZE, ALPHA)

            def judge(features: Features) -> tuple[NDArray[np.float64], float]:
                judged = calibration.judge({k: Scores(d.score(features).image) for k, d in detectors.items()})  # noqa: B023
                return np.array([j.score for j in judged]), float(np.mean([j.verdict != "normal" for j in judged]))

            judged = {label: judge(features) for label, features in changed.items()}
            base = judged["unchanged"][0]
            aurocs = []
            for features in (synthetic, real):
                scores = np.concatenate([base, judge(features)[0]])
                aurocs.append(f"{roc_auc_score(np.arange(len(scores)) >= len(base), scores):.4f}")
            rates = [f"{100 * rate:.0f} %" for _, rate in judged.values()]
            print(f"| {title} | {' | '.join(aurocs)} | {' | '.join(rates)} |", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
