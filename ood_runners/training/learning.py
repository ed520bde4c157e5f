"""How much data is enough: accuracy and the attainable alpha against the number of normal pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ood_runners.calibration import Calibration, needed_for
from ood_runners.calibration.guarantee import attainable_alpha
from ood_runners.detectors import DETECTORS
from ood_runners.errors import BadParameter, DataError
from ood_runners.features import Features, Scores
from ood_runners.training.evaluation import aligned, percent, plural
from ood_runners.training.extract import BATCH
from ood_runners.training.progress import Progress, SilentProgress
from ood_runners.training.robustness import read_some
from ood_runners.training.synthetic import synthetic_defects

if TYPE_CHECKING:
    from ood_runners.pipeline import Product
    from ood_runners.training.datasets import Dataset

LEAST = 15  # pictures; fewer leave no curve
MOST = 400  # pictures looked at: their features are held in memory
DEFECTIVE = 60  # of them, each with DEFECTS synthetic defects
DEFECTS = 2
FIRST = 5  # pictures of the curve's first point; each further one doubles it
HELD_OUT = 5  # parts; each in turn is held out from the fits
FOLDS = 5  # of the cross-fitting that calibrates each point
SMALL_BANK = 2_000
HARDLY = 0.01  # AUROC; a smaller gain is not worth collecting pictures for
# Both look at the backbone's features, which are computed once; a VAE would be trained anew for each point.
REFITTED = ("memory_bank", "mahalanobis")


@dataclass(frozen=True)
class Point:
    """What so many normal pictures give.

    Attributes
    ----------
    pictures : normal ones that were fitted on
    auroc : of synthetic defects against normal pictures, neither fitted on; the mean of the parts held out
    deviation : standard deviation over these parts
    alpha : the smallest false-alarm rate at or above the one asked for that so many pictures can decide at
    """

    pictures: int
    auroc: float
    deviation: float
    alpha: float


@dataclass(frozen=True)
class LearningCurve:
    """The points, by rising number of pictures; `pictures` there are in all, and `alpha` was asked for at the fit."""

    detectors: Sequence[str]
    pictures: int
    alpha: float
    points: Sequence[Point]

    def enough(self) -> Point | None:
        """The first point that no later one betters by 0.01 AUROC; None where the last step still does."""
        best = [max(later.auroc for later in self.points[i:]) for i in range(len(self.points))]
        first = next(i for i, point in enumerate(self.points) if best[i] - point.auroc < HARDLY)
        return self.points[first] if first < len(self.points) - 1 else None

    def advice(self) -> str:
        """What to do, in two sentences."""
        first, last, enough = self.points[0], self.points[-1], self.enough()
        grown = f"{first.auroc:.3f} with {first.pictures}, {last.auroc:.3f} with {last.pictures}"
        if enough is None:
            text = f"Accuracy still grows at the end ({grown}): more normal pictures will help."
        elif enough is first:
            text = f"From {plural(enough.pictures, 'picture')} on, more of them hardly help accuracy ({grown})."
        else:
            text = (
                f"With fewer than {plural(enough.pictures, 'picture')}, adding more helps accuracy ({grown}); from "
                f"{enough.pictures} on it hardly does."
            )
        needed = needed_for(self.alpha)
        if self.pictures < needed:
            return (
                f"{text} An alpha of {percent(self.alpha)} needs {needed}; {self.pictures} decide at "
                f"{percent(attainable_alpha(self.alpha, self.pictures))}."
            )
        return f"{text} An alpha of {percent(self.alpha)} needs {needed}, which there are."

    def notes(self) -> list[str]:
        """What to know when reading the figures."""
        return [
            f"AUROC of synthetic defects by {' and '.join(self.detectors)} with a bank of {SMALL_BANK:,} at most, the "
            f"mean of {HELD_OUT} parts of the training pictures, each held out in turn: it shows what more pictures "
            "change, not how many real defects are found."
        ]

    def lines(self) -> list[str]:
        """For a terminal: the advice, a table, the notes."""
        table = [["normal pictures", "synthetic AUROC", "+-", "alpha"]]
        table += [[str(p.pictures), f"{p.auroc:.3f}", f"{p.deviation:.3f}", percent(p.alpha)] for p in self.points]
        return [self.advice(), *aligned(table), *self.notes()]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "detectors": list(self.detectors),
            "pictures": self.pictures,
            "alpha_requested": self.alpha,
            "advice": self.advice(),
            "notes": self.notes(),
            "points": [asdict(point) for point in self.points],
        }


def learning_curve(
    product: Product, dataset: Dataset, *, seed: int = 0, progress: Progress | None = None
) -> LearningCurve:
    """Fit the product's detectors anew on rising numbers of the data set's training pictures.

    Features come from the product's own network (and so from a projection fitted on all pictures) and are computed
    once, of at most 400 pictures and two synthetic defects of 60 of them. Each fifth is held out in turn; of the
    rest, the first 5, 10, 20, … are fitted on, cross-fitted, calibrated and fused as in a fit.

    Raises
    ------
    DataError
        Fewer than 15 training pictures can be read, or too few for the number of class folders.
    BadParameter
        The product has neither a memory bank nor Mahalanobis.
    """
    names = [name for name in product.own.detectors if name in REFITTED]
    if not names:
        raise BadParameter(
            f"A learning curve needs {' or '.join(REFITTED)}, and this product has only "
            f"{', '.join(product.own.detectors)}; fit one with either."
        )
    rng = np.random.default_rng(seed)
    files = [dataset.train[i] for i in rng.permutation(len(dataset.train))]
    read = read_some(files, product.input_size, MOST)
    classes = product.manifest.data.classes
    first = FIRST if not classes else max(FIRST, 3 * len(classes))
    if len(read) < max(LEAST, 3 * first):
        raise DataError(
            f"A learning curve needs {max(LEAST, 3 * first)} training pictures or more; {len(read)} of {dataset.root} "
            "can be read."
        )
    labels = None
    if classes:
        kept = [file for file, _ in read]
        labels = np.array([classes.index(file.label) for file in kept], np.int64)
    pictures = np.stack([picture for _, picture in read])
    origin = np.tile(np.arange(min(DEFECTIVE, len(pictures))), DEFECTS)
    made, _ = synthetic_defects(pictures[origin], rng)
    parts = np.arange(len(pictures)) % HELD_OUT  # their order is random already
    counts = _counts(first, len(pictures) - int((parts == 0).sum()))
    found: dict[int, list[float]] = {count: [] for count in counts}
    network = product.own.network
    if network is None:
        raise RuntimeError(f"{', '.join(names)} without a network")
    from sklearn.metrics import roc_auc_score

    total = len(pictures) + len(made) + HELD_OUT * len(counts)
    with (progress or SilentProgress()).stage("learning curve", total=total) as stage:

        def features(of: NDArray[np.uint8]) -> Features:
            chunks = []
            for start in range(0, len(of), BATCH):
                chunks.append(network(of[start : start + BATCH]))
                stage.advance(len(chunks[-1]))
            return Features.concatenate(chunks)

        normal, defective = features(pictures), features(made)
        for part in range(HELD_OUT):
            new, defects = np.flatnonzero(parts == part), np.flatnonzero(parts[origin] == part)
            rest = rng.permutation(np.flatnonzero(parts != part))
            judged = Features.concatenate([normal[new], defective[defects]])
            strange = np.arange(len(judged)) >= len(new)
            for count in counts:
                rows = rest[:count]
                scores = _scores(product, names, normal[rows], None if labels is None else labels[rows], judged, rng)
                found[count].append(float(roc_auc_score(strange, scores)))
                stage.advance()
    alpha = product.calibration.alpha_requested
    points = [
        Point(count, float(np.mean(values)), float(np.std(values, ddof=1)), attainable_alpha(alpha, count))
        for count, values in found.items()
    ]
    return LearningCurve(names, len(files) if len(read) == MOST else len(read), alpha, points)


def _counts(first: int, last: int) -> list[int]:
    """``first`` doubled as long as it stays clear of `last`, then `last`: 5, 10, 20, 40, 82."""
    counts = [first]
    while 2 * counts[-1] <= 0.8 * last:
        counts.append(2 * counts[-1])
    return [*counts, last]


def _scores(
    product: Product,
    names: Sequence[str],
    normal: Features,
    labels: NDArray[np.int64] | None,
    judged: Features,
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """Fused scores float64 (m,) of `judged` by detectors fitted, cross-fitted and calibrated on `normal`."""
    folds = rng.permutation(np.arange(len(normal)) % FOLDS)
    held_out: dict[str, Scores] = {}
    scores: dict[str, Scores] = {}
    for name in names:
        params = product.own.detectors[name].params()
        if name == "memory_bank":
            params["size"] = min(params["size"], SMALL_BANK)
        detector = DETECTORS[name](**params)
        # The maps are of no use here, and calibrating their scale takes as long as the rest.
        held_out[name] = Scores(detector.fit_held_out(normal, folds, labels).image)
        scores[name] = Scores(detector.score(judged).image)
    weights = {name: product.calibration.weights[name] for name in names}
    calibration = Calibration.fit(held_out, weights, product.input_size, product.calibration.alpha_requested)
    return np.array([one.score for one in calibration.judge(scores)])
