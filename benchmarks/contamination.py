"""What defects among the training pictures cost, and what `fit --contamination auto` saves of it.

    python benchmarks/contamination.py generated ../shared/data/cookies          # folders in MVTec's layout
    python benchmarks/contamination.py --backbone resnet50_v1 ../shared/data/cookies

Defective test pictures, drawn by seed, are mixed into the training pictures until they are the given share of them,
and taken out of the test. Memory bank and Mahalanobis, fused as in a product and calibrated by cross-fitting. Features
are computed once, by a projection of the clean training pictures. `generated` is a generated inspection set.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from common import SHARED
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from ood_runners.backbones import BackboneInfo, FeatureNetwork, Projection, ProjectionFitter, export_backbone
from ood_runners.calibration import Calibration
from ood_runners.calibration.weights import INSPECTION
from ood_runners.detectors import Detector, Mahalanobis, MemoryBank
from ood_runners.features import Features, Scores
from ood_runners.training.contamination import Screened, score_held_back, screen
from ood_runners.training.datasets import discover
from ood_runners.training.inspection_set import generate
from ood_runners.training.robustness import read_some

SIZE, BATCH = (224, 224), 8
WEIGHTS = {"resnet50_v1": SHARED / "weights" / "resnet50_v1_full_int8.safetensors"}


@dataclass(frozen=True)
class Pictures:
    """Features of a set's training and test pictures; `defective` bool (m,) tells the test's."""

    train: Features
    test: Features
    defective: NDArray[np.bool_]

    def mixed(self, share: float, seed: int) -> tuple[Features, NDArray[np.bool_], Features, NDArray[np.bool_]]:
        """Training pictures with so large a share of defects, which are these, and what is left of the test."""
        n = len(self.train)
        count = round(share * n / (1 - share))
        chosen = np.random.default_rng(seed).permutation(np.flatnonzero(self.defective))[:count]
        rest = np.setdiff1d(np.arange(len(self.test)), chosen)
        train = Features.concatenate([self.train, self.test[chosen]])
        return train, np.arange(len(train)) >= n, self.test[rest], self.defective[rest]


def features_of(folder: str, backbone: str, keep: Path) -> Pictures:
    """Of a folder in MVTec's layout or a generated set; kept in, and taken from, a folder of `keep`."""
    root, place = Path(folder), keep / backbone / Path(folder).name
    if folder == "generated":
        root = generate(keep / "pictures", train=60, good=40, per_defect=8)
    dataset = discover(root)
    if not (place / "test.npz").is_file():
        place.mkdir(parents=True, exist_ok=True)
        train, test = (
            np.stack([one for _, one in read_some(files, SIZE, len(files))]) for files in (dataset.train, dataset.test)
        )
        with TemporaryDirectory() as name:
            network = network_of(backbone, Path(name), train)
            for part, pictures in (("train", train), ("test", test)):
                batches = [network(pictures[i : i + BATCH]) for i in range(0, len(pictures), BATCH)]
                arrays = Features.concatenate(batches).to_arrays()
                np.savez(place / f"{part}.npz", allow_pickle=False, pictures=pictures, **arrays)
    loaded = [Features.from_arrays(dict(np.load(place / f"{part}.npz"))) for part in ("train", "test")]
    return Pictures(loaded[0], loaded[1], np.array([file.label != "good" for file in dataset.test]))


def network_of(backbone: str, folder: Path, train: NDArray[np.uint8]) -> FeatureNetwork:
    """The network with a projection fitted on the training pictures."""
    export_backbone(backbone, WEIGHTS.get(backbone), folder)
    spec = BackboneInfo.load(folder).spec

    def network(pooled: Sequence[str], projection: Projection | None) -> FeatureNetwork:
        return FeatureNetwork.load(
            folder, size=SIZE, patch_layers=spec.patch_layers, pooled_layers=pooled, projection=projection, device="cpu"
        )

    fitter, raw = ProjectionFitter(), network((), None)
    for start in range(0, len(train), BATCH):
        patches = raw(train[start : start + BATCH]).patches
        assert patches is not None
        fitter.partial_fit(patches)
    return network(spec.pooled_layers, fitter.finish(128))


def judge(
    train: Features, screened: Screened, test: Features, defective: NDArray[np.bool_], alpha: float, size: int
) -> NDArray[np.float64]:
    """AUROC of the fused score, false-alarm rate and share of the defects found, as screened."""
    kept = train[screened.fitted]
    folds = np.random.default_rng(0).permutation(np.arange(len(kept)) % 10)
    held_out: dict[str, Scores] = {}
    scores: dict[str, Scores] = {}
    detectors: list[Detector] = [MemoryBank(size=size), Mahalanobis()]
    for detector in detectors:
        fitted = detector.fit_held_out(kept, folds)[screened.calibrated]
        unseen = score_held_back(detector, train, screened)
        held_out[detector.name] = Scores(np.concatenate([one.image for one in (fitted, *unseen)]))
        scores[detector.name] = Scores(detector.score(test).image)
    calibration = Calibration.fit(held_out, {name: INSPECTION[name] for name in held_out}, SIZE, alpha)
    judged = calibration.judge(scores)
    alarms = np.array([one.verdict != "normal" for one in judged])
    auroc = roc_auc_score(defective, [one.score for one in judged])
    return np.array([auroc, alarms[~defective].mean(), alarms[defective].mean()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--alpha", type=float, default=0.05)
    parser.add_argument("--seeds", type=int, default=3, help="draws of the defects mixed in")
    parser.add_argument("--shares", default="0,0.05,0.1", help="of defects, with commas between")
    parser.add_argument("--bank", type=int, default=2_000)
    parser.add_argument("--keep", type=Path, help="a folder for the features, so that another run takes less long")
    arguments = parser.parse_args()
    columns = "set | share | --contamination | AUROC | false alarms | found"
    print(f"| {columns} | dropped: bad, good | set aside: bad, good | held back: bad, good |")
    print("| --- " * 9 + "|")
    with TemporaryDirectory() as scratch:
        for folder in arguments.folders:
            pictures = features_of(folder, arguments.backbone, arguments.keep or Path(scratch))
            for share in map(float, arguments.shares.split(",")):
                rows: dict[str, list[NDArray[np.float64]]] = {"none": [], "auto": [], "defects left out by hand": []}
                counts: list[list[int]] = []
                for seed in range(arguments.seeds if share else 1):
                    train, bad, test, defective = pictures.mixed(share, seed)
                    found, nothing = screen(train), Screened.nothing(len(train))
                    by_hand = replace(nothing, dropped=bad)
                    for name, one in zip(rows, (nothing, found, by_hand), strict=True):
                        rows[name].append(judge(train, one, test, defective, arguments.alpha, arguments.bank))
                    ways = (found.dropped, found.aside, found.held_back)
                    counts.append(
                        [int((way & which).sum()) for way in ways for which in (bad, ~bad)] + [int(bad.sum())]
                    )
                *told, mixed = np.sum(counts, axis=0)
                for name, values in rows.items():
                    auroc, alarms, hits = np.mean(values, axis=0)
                    more = " | | "
                    if name == "auto":
                        more = f"{told[0]} of {mixed}, {told[1]} | {told[2]}, {told[3]} | {told[4]}, {told[5]}"
                    cells = f"{auroc:.4f} | {100 * alarms:.1f} % | {100 * hits:.0f} % | {more}"
                    print(f"| {Path(folder).name} | {100 * share:.0f} % | {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
