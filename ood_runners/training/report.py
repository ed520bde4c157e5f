"""An evaluation as one HTML page that needs nothing beside itself: no script, no font, no file, no network."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray

from ood_runners import __version__, images, maps
from ood_runners.errors import OODError
from ood_runners.training import plots
from ood_runners.training.evaluation import FUSED, TITLES, Evaluation, Metrics, Row, percent, plural, show

if TYPE_CHECKING:
    from ood_runners.pipeline import Product

THUMBNAIL = 256
PICTURES_A_GROUP = 6


@dataclass(frozen=True)
class Example:
    """One picture beside its heat map, as data URIs; both None where the file can no longer be read."""

    row: Row
    picture: str | None
    heat: str | None


@dataclass(frozen=True)
class Group:
    """Pictures that are shown together, and why."""

    title: str
    remark: str
    examples: Sequence[Example]


def write_report(evaluation: Evaluation, path: Path, product: Product) -> None:
    """Write the page to `path`. The pictures shown are read and scored again by `product` for their heat maps."""
    # A file name that is not UTF-8 must not cost the whole page.
    path.write_text(render(evaluation, product), encoding="utf-8", errors="backslashreplace")


def render(evaluation: Evaluation, product: Product) -> str:
    """The page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(percent=percent, plural=plural, show=show, titles=TITLES)
    name, _, version = evaluation.product.partition(":")
    fused, both = evaluation.overall[FUSED], evaluation.overall[FUSED].image_auroc.value is not None
    return environment.get_template("report.html.j2").render(
        evaluation=evaluation,
        product=name.removeprefix("ood-"),
        version=version,
        software=__version__,
        fused=fused,
        reasons=missing(evaluation.overall),
        folder_reasons=missing(evaluation.by_defect),
        histograms=[(n, Markup(plots.histogram(evaluation, n))) for n in evaluation.overall],
        roc=Markup(plots.roc(evaluation)) if both else None,
        uniformity=Markup(plots.uniformity(evaluation)) if fused.normals else None,
        learning=None if evaluation.learning is None else Markup(plots.learning(evaluation.learning)),
        robustness=None if evaluation.robustness is None else Markup(plots.robustness(evaluation.robustness)),
        scale=_scale(),
        groups=[
            Group(title, remark, [_example(evaluation, row, product) for row in rows])
            for title, remark, rows in choose(evaluation.rows)
            if rows
        ],
    )


def choose(rows: Sequence[Row], count: int = PICTURES_A_GROUP) -> list[tuple[str, str, list[Row]]]:
    """Title, remark and at most `count` rows of each group of pictures, what went wrong first."""
    ascending = sorted(rows, key=lambda row: row.score)
    descending = ascending[::-1]
    return [
        (
            "Missed defects",
            "Defective pictures that were judged normal, the least strange first.",
            [row for row in ascending if row.anomalous and not row.flagged][:count],
        ),
        (
            "False alarms",
            "Normal pictures that were flagged, the strangest first.",
            [row for row in descending if not row.anomalous and row.flagged][:count],
        ),
        (
            "Defects found",
            "Defective pictures that were flagged, the strangest first.",
            [row for row in descending if row.anomalous and row.flagged][:count],
        ),
        (
            "Normal pictures passed",
            "Normal pictures that were judged normal, the least strange first.",
            [row for row in ascending if not row.anomalous and not row.flagged][:count],
        ),
    ]


def missing(table: Mapping[str, Metrics]) -> list[str]:
    """Why a table has gaps, a sentence each, such as: No pixel AUROC, AUPRO for softmax: there is no anomaly map."""
    gaps: dict[tuple[str, str], list[str]] = {}
    for name, measured in table.items():
        reasons: dict[str, list[str]] = {}
        for key, figure in measured.figures().items():
            if figure.reason:
                reasons.setdefault(figure.reason, []).append(TITLES[key])
        for reason, titles in reasons.items():
            gaps.setdefault((", ".join(titles), reason), []).append(name)
    return [f"No {titles} for {', '.join(names)}: {reason}." for (titles, reason), names in gaps.items()]


def _example(evaluation: Evaluation, row: Row, product: Product) -> Example:
    try:
        picture = images.read(Path(evaluation.root) / row.path)
    except OODError:
        return Example(row, None, None)
    scale = min(1.0, THUMBNAIL / max(picture.shape[:2]))
    size = max(1, round(picture.shape[0] * scale)), max(1, round(picture.shape[1] * scale))
    thumbnail = images.resize(picture, size)
    scores = product.raw_scores(images.resize(picture, product.input_size)[np.newaxis])
    if all(score.map is None for score in scores.values()):
        return Example(row, _data_uri(thumbnail), None)
    heat = maps.overlay(thumbnail, product.calibration.anomaly_map(scores, size)[0])
    return Example(row, _data_uri(thumbnail), _data_uri(heat))


def _scale() -> str:
    """The heat maps' colours as the stops of a CSS gradient."""
    top = maps.SCALE[-1][0]
    return ", ".join(f"rgb{colour} {value / top:.0%}" for value, colour in maps.SCALE)


def _data_uri(picture: NDArray[np.uint8]) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(images.encode_jpeg(picture, quality=80)).decode()
