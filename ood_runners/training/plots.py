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

from ood_runners.training.evaluation import FUSED, Evaluation

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
