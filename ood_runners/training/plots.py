"""The report's plots, as SVG that takes its colours from the page it stands in."""

from __future__ import annotations

import io
import math
import re
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from sklearn.metrics import roc_curve

from ood_runners.calibration import needed_for
from ood_runners.calibration.guarantee import attainable_alpha
from ood_runners.training.evaluation import FUSED, Evaluation
from ood_runners.training.learning import LearningCurve
from ood_runners.training.robustness import Robustness

# Matplotlib wants colours it knows; these stand for the page's CSS variables and are replaced in the SVG, so
# that one page is right on a light screen, a dark one and on paper.
_COLOURS = {
    "ink": "#010101",
    "faint": "#020202",
    "normal": "#030303",
    "defect": "#040404",
    "series-1": "#050505",
    "series-2": "#060606",
    "series-3": "#070707",
    "series-4": "#080808",
}
_SERIES = ("series-1", "series-2", "series-3", "series-4")
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _COLOURS["faint"],
    "axes.labelcolor": _COLOURS["ink"],
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "text.color": _COLOURS["ink"],
    "xtick.color": _COLOURS["ink"],
    "ytick.color": _COLOURS["ink"],
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def histogram(evaluation: Evaluation, name: str) -> str:
    """Scores of normal and defective pictures, and where alpha divides them; `name` is a detector or ``fused``."""
    scores, flagged = scores_of(evaluation, name)
    anomalous = np.array([row.anomalous for row in evaluation.rows])
    finite = np.isfinite(scores)
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(5.2, 2.5)
        if finite.any():
            edges = np.histogram_bin_edges(scores[finite], bins=min(40, max(10, 2 * int(math.sqrt(finite.sum())))))
            for kind, chosen in (("normal", ~anomalous), ("defect", anomalous)):
                if (chosen & finite).any():
                    label = "normal" if kind == "normal" else "defective"
                    values, bins, colour = scores[chosen & finite], edges.tolist(), _COLOURS[kind]
                    axes.hist(values, bins, color=colour, alpha=0.45, histtype="stepfilled", label=label)
                    axes.hist(values, bins, color=colour, histtype="step")
            threshold = dividing_score(scores[finite], flagged[finite])
            if threshold is not None:
                axes.axvline(threshold, color=_COLOURS["ink"], linewidth=1, linestyle="--", label="threshold at alpha")
        axes.set_xlabel("score (larger is stranger)")
        axes.set_ylabel("pictures")
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        figure.legend(loc="outside upper right", ncols=3, borderpad=0, handlelength=1.5)
        return _svg(figure, f"histogram-{name}")


def roc(evaluation: Evaluation) -> str:
    """ROC curves of the fused score and of each detector; there must be normal and defective pictures."""
    anomalous = np.array([row.anomalous for row in evaluation.rows])
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(5.2, 3.6)
        axes.plot([0, 1], [0, 1], color=_COLOURS["ink"], linewidth=0.8, linestyle=":", alpha=0.7)
        names = [*evaluation.detectors, FUSED]  # the fused curve is drawn last, on top
        for i, name in enumerate(names):
            area = evaluation.overall[name].image_auroc.value
            if area is None:
                continue
            fpr, tpr, _ = roc_curve(anomalous, scores_of(evaluation, name)[0], drop_intermediate=False)
            colour, width = (_COLOURS["ink"], 2.2) if name == FUSED else (_COLOURS[_SERIES[i % len(_SERIES)]], 1.4)
            axes.plot(fpr, tpr, color=colour, linewidth=width, label=f"{name} ({area:.3f})", drawstyle="steps-post")
        axes.set(xlabel="false-positive rate", ylabel="true-positive rate", xlim=(-0.02, 1.02), ylim=(-0.02, 1.03))
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], labels[::-1], loc="lower right", title="image AUROC", title_fontsize=8)
        return _svg(figure, "roc")


def uniformity(evaluation: Evaluation) -> str:
    """The share of normal pictures at or below each p-value; there must be normal pictures.

    If they are exchangeable with the calibration pictures, the curve stays at or below the diagonal but for
    chance; the band is the 95 % one of Dvoretzky, Kiefer and Wolfowitz with Massart's constant (1990).
    """
    values = np.sort([row.p_value for row in evaluation.rows if not row.anomalous])
    band = math.sqrt(math.log(2 / 0.05) / (2 * len(values)))
    diagonal = np.linspace(0, 1, 201)
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(5.2, 3.6)
        low, high = np.clip(diagonal - band, 0, 1), np.clip(diagonal + band, 0, 1)
        axes.fill_between(diagonal, low, high, color=_COLOURS["faint"], alpha=0.25, linewidth=0, label="95 % by chance")
        axes.plot([0, 1], [0, 1], color=_COLOURS["ink"], linewidth=0.8, linestyle=":", alpha=0.7)
        shares = np.arange(1, len(values) + 1) / len(values)
        axes.step(
            [0, *values, 1], [0, *shares, 1], where="post", color=_COLOURS["normal"], linewidth=1.8, label="normal"
        )
        axes.axvline(evaluation.alpha, color=_COLOURS["ink"], linewidth=1, linestyle="--", label="alpha")
        axes.set(xlabel="p-value", ylabel="share of normal pictures", xlim=(-0.02, 1.02), ylim=(-0.02, 1.03))
        axes.legend(loc="lower right")
        return _svg(figure, "uniformity")


def learning(curve: LearningCurve) -> str:
    """AUROC of synthetic defects, and the attainable alpha, against the number of normal pictures."""
    counts = [point.pictures for point in curve.points]
    needed = needed_for(curve.alpha)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10.4, 2.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        aurocs = np.array([point.auroc for point in curve.points])
        spread = np.array([point.deviation for point in curve.points])
        low, high = aurocs - spread, np.minimum(aurocs + spread, 1)
        left.fill_between(counts, low, high, color=_COLOURS["normal"], alpha=0.2, linewidth=0)
        left.plot(counts, aurocs, color=_COLOURS["normal"], marker="o", markersize=4)
        left.set(xlabel="normal pictures", ylabel="AUROC of synthetic defects")
        every = np.unique(np.geomspace(counts[0], max(counts[-1], needed), 100).astype(int))
        alphas = [100 * attainable_alpha(curve.alpha, int(count)) for count in every]
        right.plot(every, alphas, color=_COLOURS["normal"])
        right.plot(counts, [100 * point.alpha for point in curve.points], "o", color=_COLOURS["normal"], markersize=4)
        right.axhline(100 * curve.alpha, color=_COLOURS["ink"], linewidth=1, linestyle="--")
        right.set(xlabel="normal pictures", ylabel="attainable alpha (%)", yscale="log")
        right.yaxis.set_major_formatter("{x:g}")
        ticks = [*counts, *([needed] if needed > counts[-1] else [])]
        for axes, marks in ((left, counts), (right, ticks)):
            axes.set_xscale("log")
            axes.set_xticks(marks, [f"{mark:,}" for mark in marks])
            axes.set_xticks([], minor=True)
        return _svg(figure, "learning")


def robustness(found: Robustness) -> str:
    """False-alarm rate with its interval, and the median score, under each change; in colour where alpha is broken."""
    rows = [found.unchanged, *found.changed]
    gaps = np.cumsum([i > 0 and rows[i].change != rows[i - 1].change for i in range(len(rows))])
    heights = np.arange(len(rows)) + 0.5 * gaps
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10.4, 0.6 + 0.19 * heights[-1]), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for one, height in zip(rows, heights, strict=True):
            colour, alarms = _COLOURS["defect" if one.breaks(found.alpha) else "normal"], one.false_alarms
            left.plot([100 * alarms.low, 100 * alarms.high], [height, height], color=colour, linewidth=1.2)
            left.plot(100 * alarms.count / alarms.total, height, "o", color=colour, markersize=5)
            right.plot(one.score, height, "o", color=colour, markersize=5)
        left.axvline(100 * found.alpha, color=_COLOURS["ink"], linewidth=1, linestyle="--")
        right.axvline(found.unchanged.score, color=_COLOURS["ink"], linewidth=1, linestyle=":")
        left.set_yticks(heights, [one.label for one in rows])
        left.invert_yaxis()
        left.set(xlabel="false alarms (%), 95 % interval; dashed: alpha", xlim=(-2, 102))
        right.set(xlabel="median score; dotted: unchanged")
        return _svg(figure, "robustness")


def scores_of(evaluation: Evaluation, name: str) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The scores float64 (n,) of a detector or of ``fused``, and whether alpha flags each."""
    if name == FUSED:
        return np.array([row.score for row in evaluation.rows]), np.array([row.flagged for row in evaluation.rows])
    pairs = np.array([row.detectors[name] for row in evaluation.rows])
    return pairs[:, 0], pairs[:, 1] <= evaluation.alpha


def dividing_score(scores: NDArray[np.float64], flagged: NDArray[np.bool_]) -> float | None:
    """Halfway from the highest score that passed to the lowest that was flagged; None where no score divides them."""
    if not flagged.any() or flagged.all():
        return None
    low, high = float(scores[~flagged].max()), float(scores[flagged].min())
    return (low + high) / 2 if low <= high else None


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure: Figure, prefix: str) -> str:
    """The figure as an ``<svg>`` element whose ids are its own on the page."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'\bid="|href="#|url\(#', lambda found: f"{found[0]}{prefix}-", text)
    for name, colour in _COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return text
