"""What an evaluation found, as sentences, JSON and CSV."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ood_runners.training.metrics import Metric, Proportion

if TYPE_CHECKING:
    from ood_runners.training.learning import LearningCurve
    from ood_runners.training.robustness import Robustness

FUSED = "fused"
ANOMALOUS = "anomalous"
TITLES = {
    "image_auroc": "image AUROC",
    "average_precision": "average precision",
    "fpr_at_95_tpr": "FPR at 95 % TPR",
    "f1": "F1 at alpha",
    "pixel_auroc": "pixel AUROC",
    "aupro": "AUPRO",
}


@dataclass(frozen=True)
class Metrics:
    """The measures of one score over some pictures; `caught` is how many defects alpha flagged."""

    normals: int
    defects: int
    caught: int
    image_auroc: Metric
    average_precision: Metric
    fpr_at_95_tpr: Metric
    f1: Metric
    pixel_auroc: Metric
    aupro: Metric

    def figures(self) -> dict[str, Metric]:
        """The six measures by name, in the order in which they are shown."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Metric)}

    def to_dict(self) -> dict[str, Any]:
        """As JSON values: a measure that could not be had is null, with its reason under `reasons`."""
        figures = self.figures()
        return {
            "normals": self.normals,
            "defects": self.defects,
            "caught": self.caught,
            **{name: figure.value for name, figure in figures.items()},
            "reasons": {name: figure.reason for name, figure in figures.items() if figure.reason},
        }


@dataclass(frozen=True)
class Row:
    """One judged picture. `path` is relative to the data's folder; `detectors` holds (score, p-value) by name."""

    path: str
    label: str
    anomalous: bool
    verdict: str
    p_value: float
    score: float
    detectors: Mapping[str, tuple[float, float]]
    predicted: str | None = None

    @property
    def flagged(self) -> bool:
        """Whether the verdict is anomalous."""
        return self.verdict == ANOMALOUS


@dataclass(frozen=True)
class Skipped:
    """A file that could not be read, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Timings:
    """Wall-clock seconds: reading and resizing files, scoring, and judging with maps and pixel measures."""

    reading: float
    scoring: float
    judging: float
    milliseconds_a_picture: float


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes
    ----------
    product : the version's tag
    root, layout : the data's folder, and how it is laid out ("folder", "mvtec", "classes")
    created : ISO 8601, UTC
    alpha : the false-alarm rate at which the verdicts were given
    input_size : (height, width) at which pixel measures are computed; masks are brought to it by nearest neighbour
    overall : measures of all pictures, for the fused score and for each detector
    by_defect : measures of the fused score for each defect folder against all normal pictures
    false_alarms : flagged pictures among the normal ones
    accuracy : share of pictures whose predicted class is their folder's, where the product knows classes
    learning, robustness : further reports, where they were asked for
    """

    product: str
    root: str
    layout: str
    created: str
    alpha: float
    input_size: tuple[int, int]
    overall: Mapping[str, Metrics]
    by_defect: Mapping[str, Metrics]
    false_alarms: Proportion
    accuracy: Proportion | None
    rows: Sequence[Row]
    skipped: Sequence[Skipped]
    notes: Sequence[str]
    timings: Timings
    learning: LearningCurve | None = None
    robustness: Robustness | None = None

    @property
    def detectors(self) -> list[str]:
        """The detectors' names, without the fused score."""
        return [name for name in self.overall if name != FUSED]

    def headline(self) -> str:
        """The outcome in one sentence."""
        fused, alarms = self.overall[FUSED], self.false_alarms
        parts = []
        if fused.defects:
            parts.append(f"{fused.caught} of {plural(fused.defects, 'defective picture')} found")
        if alarms.total:
            parts.append(f"{alarms.count} of {plural(alarms.total, 'normal picture')} falsely flagged")
        return f"{', '.join(parts)}, at alpha = {self.alpha:.3g}."

    def false_alarm_sentence(self) -> str:
        """The false-alarm rate on normal pictures with its interval, and whether it agrees with alpha."""
        alarms, alpha = self.false_alarms, percent(self.alpha)
        if alarms.rate is None:
            return "There are no normal pictures here, so the false-alarm rate was not measured."
        rate = f"The false-alarm rate on normal pictures is {describe(alarms)}"
        if alarms.low > self.alpha:
            return (
                f"{rate}: more than the {alpha} that alpha promises. These pictures differ from those that the product "
                "was calibrated on; look for a change of light, camera or parts, and fit again."
            )
        if alarms.rate <= self.alpha:
            return f"{rate}, within the {alpha} that alpha allows."
        return f"{rate}; chance alone can give that at an alpha of {alpha}."

    def accuracy_sentence(self) -> str | None:
        """How often the predicted class was right, where it was measured."""
        if self.accuracy is None:
            return None
        return f"The predicted class is the folder's for {describe(self.accuracy)} of the pictures."

    def lines(self) -> list[str]:
        """The outcome for a terminal: sentences, then the measures where there are any, then the notes."""
        sentences = [self.headline(), self.false_alarm_sentence(), self.accuracy_sentence()]
        table: list[list[str]] = []
        if self.overall[FUSED].defects and self.overall[FUSED].normals:
            folders = {f"fused, {label}": measured for label, measured in self.by_defect.items()}
            table = [["", *TITLES.values()]]
            for name, measured in [*self.overall.items(), *folders.items()]:
                table.append([name, *(show(name, figure) for name, figure in measured.figures().items())])
        further = [line for one in (self.learning, self.robustness) if one is not None for line in ["", *one.lines()]]
        return [*filter(None, sentences), *aligned(table), *self.notes, *further]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "product": self.product,
            "data": {"root": self.root, "layout": self.layout, "pictures": len(self.rows)},
            "created": self.created,
            "alpha": self.alpha,
            "input_size": list(self.input_size),
            "overall": {name: measured.to_dict() for name, measured in self.overall.items()},
            "by_defect": {name: measured.to_dict() for name, measured in self.by_defect.items()},
            "false_alarms": asdict(self.false_alarms),
            "accuracy": None if self.accuracy is None else asdict(self.accuracy),
            "notes": list(self.notes),
            "skipped": [asdict(file) for file in self.skipped],
            "timings": asdict(self.timings),
            "learning_curve": None if self.learning is None else self.learning.to_dict(),
            "robustness": None if self.robustness is None else self.robustness.to_dict(),
            "pictures": [_row_dict(row) for row in self.rows],
        }

    def to_json(self) -> str:
        """`to_dict` as JSON text that any parser reads: what is not a finite number is null."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def write_scores(self, path: Path) -> None:
        """One CSV row a picture: path,label,verdict,p_value,score and then each detector's score and p-value."""
        columns = [f"{name}_{value}" for name in self.detectors for value in ("score", "p_value")]
        # A file name that is not UTF-8 is written back byte for byte.
        with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "label", "verdict", "p_value", "score", *columns])
            for row in self.rows:
                values = [value for name in self.detectors for value in row.detectors[name]]
                writer.writerow([row.path, row.label, row.verdict, row.p_value, row.score, *values])


def _row_dict(row: Row) -> dict[str, Any]:
    detectors = {name: {"score": _finite(s), "p_value": _finite(p)} for name, (s, p) in row.detectors.items()}
    return asdict(row) | {"p_value": _finite(row.p_value), "score": _finite(row.score), "detectors": detectors}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """A table's rows as lines of even columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in table
    ]


def percent(share: float) -> str:
    """``0.01234`` as ``1.23 %``: three figures."""
    return f"{100 * share:.3g} %"


def plural(count: int, noun: str) -> str:
    """``1 file``, ``2 files``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def describe(proportion: Proportion) -> str:
    """``3.33 % (1 of 30; exact 95 % interval 0.0844 % to 17.2 %)``."""
    share = "none" if proportion.rate is None else percent(proportion.rate)
    return (
        f"{share} ({proportion.count:,} of {proportion.total:,}; "
        f"exact 95 % interval {percent(proportion.low)} to {percent(proportion.high)})"
    )


def show(name: str, figure: Metric) -> str:
    """The figure of the measure `name` as the tables show it; a dash where there is none."""
    if figure.value is None:
        return "-"
    return percent(figure.value) if name == "fpr_at_95_tpr" else f"{figure.value:.3f}"
