"""Judge a folder of pictures with a fitted product and measure how well it did."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ood_runners import images, maps
from ood_runners.errors import DataError, OODError
from ood_runners.features import Scores
from ood_runners.training import metrics
from ood_runners.training.evaluation import FUSED, Evaluation, Metrics, Row, Skipped, Timings, plural
from ood_runners.training.metrics import Metric, PixelTally, Proportion
from ood_runners.training.progress import Progress, SilentProgress

if TYPE_CHECKING:
    from ood_runners.calibration import Judgement
    from ood_runners.pipeline import Product
    from ood_runners.training.datasets import Dataset, PictureFile

# A detector's own map is smoothed as in PatchCore before its pixels are measured; the fused one comes calibrated.
SIGMA = 4.0
NO_MAP = "there is no anomaly map"
# A lossy mask has grey fringes around both colours; in any other, every value but 0 marks a defect.
_LOSSY, _LOSSY_LEVEL = frozenset({".jpg", ".jpeg", ".webp"}), 127


def evaluate(
    product: Product,
    dataset: Dataset,
    *,
    alpha: float | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Evaluation:
    """Judge the data set's test pictures and measure the verdicts, the scores and the maps.

    In MVTec's layout each test folder but ``good`` holds defects. In the other layouts every picture counts as
    normal, so that there is a false-alarm rate and no AUROC; with class folders there is the accuracy of the
    predicted class too. Data without test pictures is judged on its training pictures, and a note says so.

    `alpha` is the false-alarm rate to judge at, by default the product's own. Files that cannot be read are skipped and
    listed. Raises `DataError` where none can be read.
    """
    files = dataset.test or dataset.train
    gathered = _Gathered(product, dataset, alpha)
    with (progress or SilentProgress()).stage("evaluate", total=len(files)) as stage:
        for start in range(0, len(files), batch_size):
            batch = files[start : start + batch_size]
            gathered.add(batch)
            stage.advance(len(batch))
    if not gathered.rows:
        raise DataError(f"None of the {len(files)} pictures in {dataset.root} could be read, so nothing was evaluated.")
    return gathered.finish()


@dataclass
class _Gathered:
    """What the batches leave behind: rows and tallies, never pictures or maps."""

    product: Product
    dataset: Dataset
    alpha: float | None
    rows: list[Row] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    # By score and folder; the normal pictures' is "", and so is a detector's, which is over all folders.
    tallies: dict[str, dict[str, PixelTally]] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    judged_alpha: float = math.nan

    def add(self, batch: Sequence[PictureFile]) -> None:
        """Read, score and judge one batch."""
        started = time.perf_counter()
        files: list[PictureFile] = []
        pictures: list[NDArray[np.uint8]] = []
        for file in batch:
            try:
                pictures.append(images.resize(images.read(file.path), self.product.input_size))
                files.append(file)
            except OODError as error:
                self._skip(file.path, error)
        read = time.perf_counter()
        self.seconds["reading"] += read - started
        if not files:
            return
        scores = self.product.raw_scores(np.stack(pictures))
        scored = time.perf_counter()
        self.seconds["scoring"] += scored - read
        judgements = self.product.calibration.judge(scores, self.alpha)
        self.judged_alpha = judgements[0].alpha
        self.rows += [self._row(file, judgement) for file, judgement in zip(files, judgements, strict=True)]
        self._tally(files, scores)
        self.seconds["judging"] += time.perf_counter() - scored

    def finish(self) -> Evaluation:
        """The evaluation of everything added."""
        anomalous = np.array([row.anomalous for row in self.rows])
        labels = np.array([row.label for row in self.rows])
        defects = sorted(set(labels[anomalous].tolist()))
        flagged = np.array([row.flagged for row in self.rows])
        names = [FUSED, *self.rows[0].detectors]
        total = sum(self.seconds.values())
        return Evaluation(
            product=self.product.manifest.tag,
            root=str(self.dataset.root),
            layout=self.dataset.layout,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            alpha=self.judged_alpha,
            input_size=self.product.input_size,
            overall={name: self._measure(name, np.ones_like(anomalous), defects) for name in names},
            by_defect={label: self._measure(FUSED, ~anomalous | (labels == label), [label]) for label in defects},
            false_alarms=metrics.false_alarm_rate(flagged, anomalous),
            accuracy=self._accuracy(),
            rows=self.rows,
            skipped=self.skipped,
            notes=self._notes(),
            timings=Timings(**self.seconds, milliseconds_a_picture=1000 * total / len(self.rows)),
        )

    def _row(self, file: PictureFile, judgement: Judgement) -> Row:
        predicted = judgement.predicted
        return Row(
            path=self._relative(file.path),
            label=file.label,
            anomalous=self._is_anomalous(file),
            verdict=judgement.verdict,
            p_value=float(judgement.p_value),
            score=float(judgement.score),
            detectors={name: (float(d.score), float(d.p_value)) for name, d in judgement.detectors.items()},
            predicted=None if predicted is None or not self.product.classes else self.product.classes[predicted],
        )

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.dataset.root).as_posix()

    def _skip(self, path: Path, error: OODError) -> None:
        self.skipped.append(Skipped(self._relative(path), error.message.removeprefix(f"{path}: ")))

    def _is_anomalous(self, file: PictureFile) -> bool:
        return self.dataset.layout == "mvtec" and file.label != "good"

    def _tally(self, files: Sequence[PictureFile], scores: Mapping[str, Scores]) -> None:
        """Count the pixels of the pictures whose defects are marked, and of all normal ones."""
        masks = {i: self._mask(file) for i, file in enumerate(files) if self._is_anomalous(file)}
        groups: dict[str, list[int]] = {}
        for i, file in enumerate(files):
            if i not in masks or masks[i] is not None:
                groups.setdefault(file.label if i in masks else "", []).append(i)
        size = self.product.input_size
        values = {
            n: maps.smooth(maps.upscale(score.map, size), SIGMA) for n, score in scores.items() if score.map is not None
        }
        if values:
            values[FUSED] = self.product.calibration.anomaly_map(scores, size)
        for name, pixels in values.items():
            self.tallies.setdefault(name, {})
            for label, rows in groups.items():
                tally = self.tallies[name].setdefault(label if name == FUSED else "", PixelTally())
                tally.add(pixels[rows], [masks.get(i) for i in rows])

    def _mask(self, file: PictureFile) -> NDArray[np.bool_] | None:
        """The defect's mask at the input size, or None where it has none that can be used."""
        if file.mask is None:
            self.left_out["no mask"] += 1
            return None
        try:
            mask = images.read(file.mask).max(axis=2)
        except OODError as error:
            self._skip(file.mask, error)
            self.left_out["mask that cannot be read"] += 1
            return None
        level = _LOSSY_LEVEL if file.mask.suffix.lower() in _LOSSY else 0
        marked = metrics.resize_mask(mask > level, self.product.input_size)
        if not marked.any():
            self.left_out["mask that marks no pixel at the input size"] += 1
            return None
        return marked

    def _measure(self, name: str, chosen: NDArray[np.bool_], defects: Sequence[str]) -> Metrics:
        """Measures of the score `name` over the `chosen` rows; pixel measures over the folders `defects`."""
        rows = [row for row, is_chosen in zip(self.rows, chosen, strict=True) if is_chosen]
        anomalous = np.array([row.anomalous for row in rows])
        if name == FUSED:
            scores = np.array([row.score for row in rows])
            flagged = np.array([row.flagged for row in rows])
        else:
            scores = np.array([row.detectors[name][0] for row in rows])
            flagged = np.array([row.detectors[name][1] <= self.judged_alpha for row in rows])
        tally = self._pixels(name, defects)
        return Metrics(
            normals=int((~anomalous).sum()),
            defects=int(anomalous.sum()),
            caught=int((anomalous & flagged).sum()),
            image_auroc=metrics.image_auroc(scores, anomalous),
            average_precision=metrics.average_precision(scores, anomalous),
            fpr_at_95_tpr=metrics.fpr_at_tpr(scores, anomalous),
            f1=metrics.f1(flagged, anomalous),
            pixel_auroc=Metric(None, NO_MAP) if tally is None else tally.auroc(),
            aupro=Metric(None, NO_MAP) if tally is None else tally.aupro(),
        )

    def _pixels(self, name: str, defects: Sequence[str]) -> PixelTally | None:
        """The tally of `name` over the normal pictures and the folders `defects`."""
        if name not in self.tallies:
            return None
        parts = [tally for label, tally in self.tallies[name].items() if label in ("", *defects)]
        return sum(parts, PixelTally())

    def _accuracy(self) -> Proportion | None:
        """The share of right classes among pictures of classes that the product knows."""
        known = [row for row in self.rows if row.predicted is not None and row.label in (self.product.classes or [])]
        if self.dataset.layout != "classes" or not known:
            return None
        return Proportion.of(sum(row.predicted == row.label for row in known), len(known))

    def _notes(self) -> list[str]:
        notes = []
        if not self.dataset.test:
            notes.append(
                "There are no test pictures, so these are the training pictures: if the product was fitted on them, "
                "the false-alarm rate says nothing of new ones."
            )
        if self.dataset.layout != "mvtec":
            notes.append("Every picture counts as normal, because no folder is named as holding defects.")
        notes += [
            f"{plural(count, 'defective picture')} left out of the pixel measures: {why}."
            for why, count in self.left_out.items()
        ]
        if self.skipped:
            notes.append(f"{plural(len(self.skipped), 'file')} skipped that could not be read.")
        return notes
