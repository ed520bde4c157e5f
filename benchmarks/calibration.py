"""Whether the false-alarm rate is what was asked for, over repeated splits of normal pictures.

    python benchmarks/calibration.py              # sets in ../shared/data where they are, a generated one otherwise
    python benchmarks/calibration.py FOLDER … --splits 40 --plot docs/images/calibration.png

All normal pictures of a set (train and test) are split again and again. On one part the projection, a memory bank and
the Gaussians are fitted and cross-fitted, and the fused score is calibrated, as in a fit; the other part is judged.
Features of `efficientnet_lite0` at 224 pixels are computed once, every fourth patch in each direction; bank of 1,000.

Within a split all judged pictures meet one threshold, so their false alarms are no binomial: among m pictures, where k
of the n + 1 ranks are rejected, they are beta-binomial(m, k, n + 1 - k). The splits are drawn independently, so the sum
over splits is a sum of such numbers, and its 95 % interval is computed from that. The plain binomial interval is shown
beside it.
Uniformity of p-values is tested with the Kolmogorov-Smirnov statistic of p-values
made continuous (a tie is broken by a uniform number), whose law over such splits is simulated.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from common import SHARED, heading, show
from numpy.typing import NDArray
from scipy.stats import binom, kstest

from ood_runners.calibration.guarantee import attainable_alpha, false_alarms
from ood_runners.features import Features

SIZE, ALPHAS = (224, 224), (0.01, 0.05, 0.10)
EVERY, BANK, FOLDS, BATCH = 4, 1_000, 10, 8
FITTED = 0.7  # of the pictures
SETS = ("hazelnut_toy", "cookies", "ball_screws")
SIMULATIONS, DRAWN = 500, 5_000


@dataclass(frozen=True)
class Split:
    """One split's judged pictures: their p-values (m,), the same made continuous, and the number of calibration scores.

    All splits of a family have the same n and m.
    """

    n: int
    p: NDArray[np.float64]
    continuous: NDArray[np.float64]


def read(folder: Path, most: int) -> list[Path]:
    """The normal pictures of a folder, train and test, by name; evenly spread ones where there are more than `most`."""
    from ood_runners.training.datasets import GOOD, discover

    dataset = discover(folder)
    good = [file.path for file in (*dataset.train, *dataset.test) if file.label == GOOD]
    files = sorted(good, key=lambda path: path.name)
    return [files[i] for i in np.linspace(0, len(files) - 1, min(most, len(files))).astype(int)]


def extract(files: Sequence[Path], scratch: Path) -> Features:
    """Joined patches before the projection, and pooled features."""
    from dataclasses import replace

    from ood_runners import images
    from ood_runners.backbones import BackboneInfo, FeatureNetwork, export_backbone

    if not (scratch / "backbone").is_dir():
        (scratch / "backbone").mkdir()
        export_backbone("efficientnet_lite0", None, scratch / "backbone")
    spec = BackboneInfo.load(scratch / "backbone").spec
    network = FeatureNetwork.load(
        scratch / "backbone", size=SIZE, patch_layers=spec.patch_layers, pooled_layers=spec.pooled_layers, device="cpu"
    )
    parts = []
    for start in range(0, len(files), BATCH):
        part = network(np.stack([images.resize(images.read(file), SIZE) for file in files[start : start + BATCH]]))
        assert part.patches is not None
        parts.append(
            replace(part, patches=part.patches[:, EVERY // 2 :: EVERY, EVERY // 2 :: EVERY].astype(np.float16))
        )
    return Features.concatenate(parts)


def judge(features: Features, fitted: NDArray[np.int64], judged: NDArray[np.int64], seed: int) -> Split:
    """Fit, cross-fit and calibrate on some pictures, and judge others."""
    from ood_runners.backbones import ProjectionFitter
    from ood_runners.calibration import Calibration
    from ood_runners.calibration.weights import INSPECTION
    from ood_runners.detectors import Detector, Mahalanobis, MemoryBank
    from ood_runners.features import Scores
    from ood_runners.pipeline import place

    assert features.patches is not None
    projection = ProjectionFitter().partial_fit(features.patches[fitted]).finish(128)
    seen, new = (
        Features(projection.apply(features.patches[rows]).astype(np.float16), features[rows].pooled)
        for rows in (fitted, judged)
    )
    rng = np.random.default_rng(seed)
    folds = rng.permutation(np.arange(len(fitted)) % min(FOLDS, len(fitted)))
    detectors: list[Detector] = [MemoryBank(size=BANK, seed=seed), Mahalanobis()]
    for detector in detectors:
        place(detector, "cpu", 1)
    # Only what the verdict needs: the scale of the map is another matter.
    held_out = {one.name: Scores(one.fit_held_out(seen, folds).image) for one in detectors}
    weights = {one.name: INSPECTION[one.name] for one in detectors}
    calibration = Calibration.fit(held_out, weights, SIZE, min(ALPHAS))
    answers = calibration.judge({one.name: Scores(one.score(new).image) for one in detectors})
    scores = np.array([answer.score for answer in answers])
    known = calibration.fused.scores
    above, ties = (known > scores[:, None]).sum(axis=1), (known == scores[:, None]).sum(axis=1)
    continuous = (above + rng.uniform(size=len(scores)) * (ties + 1)) / (len(known) + 1)
    return Split(len(known), np.array([answer.p_value for answer in answers]), continuous)


def random_splits(n: int, splits: int, seed: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Fitted and judged pictures, drawn."""
    rng = np.random.default_rng(seed)
    return [tuple(np.split(rng.permutation(n), [round(FITTED * n)])) for _ in range(splits)]  # type: ignore[misc]


def blocks(n: int, splits: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Judged pictures that follow one another by name, so that a series is judged by a fit on other series."""
    length = n - round(FITTED * n)
    starts = np.linspace(0, n - length, splits).astype(int)
    rows = np.arange(n)
    return [(rows[(rows < s) | (rows >= s + length)], rows[s : s + length]) for s in starts]


def interval(alpha: float, splits: Sequence[Split], rng: np.random.Generator) -> tuple[float, float]:
    """The 95 % interval of the share of false alarms over all splits, if the promise holds exactly."""
    n, m = splits[0].n, len(splits[0].p)
    drawn = false_alarms(alpha, n, m).rvs((DRAWN, len(splits)), random_state=rng).mean(axis=1) / m
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def uniform(splits: Sequence[Split], rng: np.random.Generator) -> tuple[float, float]:
    """Kolmogorov-Smirnov distance of the pooled continuous p-values from uniform, and its p-value over such splits."""
    found = float(kstest(np.concatenate([split.continuous for split in splits]), "uniform").statistic)
    exceeded = 0
    for _ in range(SIMULATIONS):
        drawn = []
        for split in splits:
            known, new = np.sort(rng.uniform(size=split.n)), rng.uniform(size=len(split.p))
            above = split.n - np.searchsorted(known, new)
            drawn.append((above + rng.uniform(size=len(new))) / (split.n + 1))
        exceeded += kstest(np.concatenate(drawn), "uniform").statistic >= found
    return found, (1 + exceeded) / (SIMULATIONS + 1)


def row(name: str, splits: Sequence[Split], rng: np.random.Generator) -> list[str]:
    """One line of the table."""
    n, m = splits[0].n, len(splits[0].p)
    cells = [name, str(len(splits)), f"{n} / {m}"]
    p, total = np.concatenate([split.p for split in splits]), len(splits) * m
    for asked in ALPHAS:
        alpha = attainable_alpha(asked, n)
        rate = float(np.mean(p <= alpha + 1e-12))
        low, high = interval(alpha, splits, rng)
        plain = [bound / total for bound in binom.interval(0.95, total, float(false_alarms(alpha, n, 1).mean()))]
        said = "" if low <= rate <= high else " above" if rate > high else " below"
        cells.append(
            f"{100 * rate:.1f} of {100 * float(false_alarms(alpha, n, 1).mean()):.1f} "
            f"({100 * low:.1f} to {100 * high:.1f}; {100 * plain[0]:.1f} to {100 * plain[1]:.1f}){said}"
        )
    distance, chance = uniform(splits, rng)
    return [*cells, f"{distance:.3f} ({chance:.3f})"]


def plot(families: dict[str, Sequence[Split]], path: Path) -> None:
    """The share of p-values below each level, against the level."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(5, 4.2), constrained_layout=True)
    axis.plot([0, 1], [0, 1], color="grey", linewidth=1, label="what is promised")
    for i, (name, splits) in enumerate(families.items()):
        ordered = np.sort(np.concatenate([split.continuous for split in splits]))
        style = "--" if name.endswith("series") else "-"
        axis.plot(ordered, np.arange(1, len(ordered) + 1) / len(ordered), style, color=f"C{i // 2}", label=name)
    axis.set(xlabel="alpha", ylabel="share of new normal pictures with p at most alpha", xlim=(0, 1), ylim=(0, 1))
    axis.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def main() -> None:
    """Read the command line, run every set, print the table and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, help="sets in any layout that fit takes")
    parser.add_argument("--splits", type=int, default=40)
    parser.add_argument("--most", type=int, default=300, help="pictures of a set")
    parser.add_argument("--plot", type=Path, help="draw this picture")
    parser.add_argument(
        "--quick", action="store_true", help="one small generated set, few splits: to see that it works"
    )
    options = parser.parse_args()
    heading("efficientnet_lite0 from its package, 224 x 224 pixels")
    rng, rows, families = np.random.default_rng(0), [], {}
    with TemporaryDirectory() as name:
        scratch = Path(name)
        folders = options.folders or [SHARED / "data" / one for one in SETS if (SHARED / "data" / one).is_dir()]
        if options.quick or not folders:
            from ood_runners.training.inspection_set import generate

            count = 24 if options.quick else 200
            folders = [generate(scratch / "generated", train=count, good=6, per_defect=1, size=256)]
        for folder in folders:
            features = extract(read(folder, options.most), scratch)
            count = 4 if options.quick else options.splits
            for family, drawn in (
                ("random", random_splits(len(features), count, 0)),
                ("series", blocks(len(features), max(4, count // 2))),
            ):
                label = f"{folder.name}, {family}"
                families[label] = [judge(features, *split, seed) for seed, split in enumerate(drawn)]
                rows.append(row(label, families[label], rng))
                print("| " + " | ".join(rows[-1]) + " |", flush=True)
    columns = ["set, splits", "splits", "fitted / judged", *(f"alpha {100 * a:g} %" for a in ALPHAS), "KS (p)"]
    show("False alarms in percent, of what is due (95 % interval; binomial)", columns, rows)
    if options.plot:
        plot(families, options.plot)
        print(options.plot)


if __name__ == "__main__":
    main()
