"""A whole product on known photographs: each detector and the fused verdict, against other sets.

    python benchmarks/ood_product.py            # needs ../shared; about ten minutes on one core, mostly for the VAE

Half of the photographs, drawn by seed, are fitted with the defaults, in float32; the other half are judged with each
other set. The last column is the share of that half that is called anomalous at alpha = 5 %.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from ood_sets import SHARED, SIZE, find
from sklearn.metrics import roc_auc_score

BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--detectors", help="names with commas between; all of them otherwise")
    arguments = parser.parse_args()
    sets = find()
    if sets.known is None:
        raise SystemExit("The known photographs are in ../shared/data, which is not here.")
    with TemporaryDirectory(prefix="ood-product-") as scratch:
        os.environ["BENTOML_HOME"] = scratch  # before anything imports BentoML
        (Path(scratch) / "models").mkdir()
        from ood_runners import images
        from ood_runners.artifacts import read_version
        from ood_runners.pipeline import Product
        from ood_runners.training.fit import fit

        pictures = sets.known()
        order = np.random.default_rng(arguments.seed).permutation(len(pictures))
        half = len(pictures) // 2
        folder = Path(scratch) / "photographs"
        folder.mkdir()
        for row in order[:half]:
            (folder / f"{row:04}.png").write_bytes(images.encode_png(pictures[row]))
        weights = SHARED / "weights" / "resnet50_v1_full_int8.safetensors"
        names = arguments.detectors.split(",") if arguments.detectors else None
        fit(
            folder,
            product="known",
            backbone="resnet50_v1",
            weights=weights,
            alpha=0.05,
            size=SIZE,
            detectors=names,
            precision="float32",
            seed=arguments.seed,
        )
        product = Product.open(read_version("known"))

        def judged(batch: np.ndarray) -> list:
            return [one for i in range(0, len(batch), BATCH) for one in product.judge(batch[i : i + BATCH])]

        normal = judged(pictures[order[half:]])
        alarms = np.mean([one.verdict == "anomalous" for one in normal])
        detectors = list(product.own.detectors)
        print(f"\n| against | fused | {' | '.join(detectors)} | false alarms |")
        print("| --- " * (len(detectors) + 3) + "|")
        for name, load in sets.outside.items():
            strange = judged(load())
            truth = [0] * len(normal) + [1] * len(strange)
            rows = [[one.score for one in (*normal, *strange)]]
            rows += [[one.detectors[detector].score for one in (*normal, *strange)] for detector in detectors]
            print(f"| {name} | {' | '.join(f'{roc_auc_score(truth, row):.3f}' for row in rows)} | {alarms:.3f} |")


if __name__ == "__main__":
    main()
