"""From the raw scores of all detectors to a verdict that keeps a false-alarm rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ood_runners.calibration.calibrator import Calibrator
from ood_runners.calibration.fusion import add, fuse, fuse_held_out
from ood_runners.calibration.guarantee import attainable_alpha
from ood_runners.calibration.map_scale import FloatMap, MapScale, combine, fit_scale, highest_of
from ood_runners.calibration.weights import weights_from_probes
from ood_runners.errors import ArtifactError, BadParameter
from ood_runners.features import Scores

NORMAL, ANOMALOUS = "normal", "anomalous"
OUTLIER_CHANCE = 0.001
RULE = 2  # of `fuse`; stored scores of another rule are no calibration of this one


@dataclass(frozen=True)
class DetectorJudgement:
    """One detector's raw score and its p-value."""

    score: float
    p_value: float


@dataclass(frozen=True)
class Judgement:
    """One picture's verdict: ``anomalous`` where the fused p-value is at most alpha.

    `score` is the fused score: continuous, so that it ranks pictures whose p-values are equal.
    `predicted` is a class index where a detector names one.
    """

    verdict: str
    p_value: float
    score: float
    alpha: float
    detectors: Mapping[str, DetectorJudgement]
    predicted: int | None = None


@dataclass(frozen=True)
class Calibration:
    """The held-out scores of n normal pictures, by detector and fused, and the scale of the map.

    Attributes
    ----------
    alpha, alpha_requested : the false-alarm rate in force, and the one asked for (smaller than n can decide)
    weights : of each detector in the fused score and, for those that localise, in the map
    calibrators : by detector; their names and order are the product's
    fused : of the fused score
    scales : by detector that localises
    highest : the highest calibrated pixel of each held-out picture; None where no detector localises
    """

    alpha: float
    alpha_requested: float
    weights: Mapping[str, float]
    calibrators: Mapping[str, Calibrator]
    fused: Calibrator
    scales: Mapping[str, MapScale]
    highest: Calibrator | None

    @classmethod
    def fit(
        cls,
        held_out: Mapping[str, Scores],
        weights: Mapping[str, float],
        size: tuple[int, int],
        alpha: float,
        *,
        probes: Mapping[str, Scores] | None = None,
    ) -> Self:
        """From each detector's held-out scores of the same n normal pictures; maps are calibrated at `size`.

        `probes` are the detectors' scores of synthetic defects, held out likewise; with them `weights` are what to
        start from, and those in force follow from how well each detector tells the probes from the normals.
        """
        images = _images(held_out)
        weigh = partial(weights_from_probes, weights, _images(probes)) if probes else lambda _: weights
        weights = weigh(images)
        n = len(next(iter(images.values())))
        attained = attainable_alpha(alpha, n)
        scales = {
            name: fit_scale(scores.map, size, attained) for name, scores in held_out.items() if scores.map is not None
        }
        highest = None
        if scales:
            # A mean of maps is calmer than each: its own largest values set where 1 lies.
            peaks = Calibrator.fit(highest_of(held_out, scales, weights, size))
            level = peaks.threshold(attained)
            scales = {name: _stretched(scale, level) for name, scale in scales.items()}
            highest = Calibrator(peaks.scores / level)
        return cls(
            alpha=attained,
            alpha_requested=alpha,
            weights=dict(weights),
            calibrators={name: Calibrator.fit(values) for name, values in images.items()},
            fused=Calibrator.fit(fuse_held_out(images, weigh)),
            scales=scales,
            highest=highest,
        )

    def outliers(self, held_out: Mapping[str, Scores]) -> NDArray[np.int64]:
        """Indices of calibration pictures that look unlike all others, strangest first.

        A picture is one whose added surprises lie so far above the others' that their upper half, taken as
        exponential, gives it less than one chance in 1,000 of turning up anywhere among n pictures.
        `held_out` is what `fit` was given.
        """
        fused = fuse_held_out(_images(held_out), lambda _: self.weights, add)
        order = np.argsort(-fused, kind="stable")
        # Each of the strangest against all those below it, so that two of a kind do not hide each other.
        strange = 0
        for i in range(len(order) // 4):
            rest = fused[order[i + 1 :]]
            middle = np.median(rest)
            scale = (rest[rest > middle] - middle).mean() if (rest > middle).any() else 0.0
            if fused[order[i]] - middle > scale * np.log(len(fused) / (2 * OUTLIER_CHANCE)):
                strange = i + 1
        return order[:strange]

    @property
    def names(self) -> tuple[str, ...]:
        """The detectors, in the product's order."""
        return tuple(self.calibrators)

    @property
    def n(self) -> int:
        """Calibration pictures."""
        return self.fused.n

    def judge(self, scores: Mapping[str, Scores], alpha: float | None = None) -> list[Judgement]:
        """A judgement a picture; `alpha` other than the product's own may be given.

        Raises
        ------
        BadParameter
            `alpha` is outside (0, 1), or smaller than n calibration pictures can decide at.
        """
        level = self.check_alpha(alpha)
        images = _images({name: scores[name] for name in self.names})
        fused = fuse(self.calibrators, self.weights, images)
        p_fused = self.fused.p_value(fused)
        p_each = {name: self.calibrators[name].p_value(values) for name, values in images.items()}
        predicted = next(
            (
                one.predicted
                for name in ("softmax", "mahalanobis")
                if (one := scores.get(name)) is not None and one.predicted is not None
            ),
            None,
        )
        return [
            Judgement(
                verdict=ANOMALOUS if p_fused[i] <= level else NORMAL,
                p_value=float(p_fused[i]),
                score=float(fused[i]),
                alpha=level,
                detectors={
                    name: DetectorJudgement(float(images[name][i]), float(p_each[name][i])) for name in self.names
                },
                predicted=None if predicted is None else int(predicted[i]),
            )
            for i in range(len(fused))
        ]

    def check_alpha(self, alpha: float | None) -> float:
        """The rate to judge at: `alpha`, or the product's own for None; raises BadParameter as `judge` says."""
        if alpha is None:
            return self.alpha
        if not 0 < alpha < 1:
            raise BadParameter(f"alpha is a false-alarm rate between 0 and 1, not {alpha:g}.")
        if alpha < self.fused.smallest_p:
            raise BadParameter(
                f"alpha {alpha:g} cannot be decided with {self.n} calibration pictures; the smallest is "
                f"{self.fused.smallest_p:.4g}: ask for more, or fit with more normal pictures."
            )
        return alpha

    def anomaly_map(self, scores: Mapping[str, Scores], size: tuple[int, int]) -> FloatMap:
        """Calibrated maps float32 (n, H, W).

        0 is typical of normals; the highest pixel of a normal picture exceeds 1 with probability alpha.

        Raises
        ------
        BadParameter
            No detector of the product localises.
        """
        if not self.scales:
            raise BadParameter(f"This product has no detector that localises ({', '.join(self.names)}), so no map.")
        return combine(scores, self.scales, self.weights, size)

    @property
    def localises(self) -> bool:
        """Whether there is an anomaly map."""
        return bool(self.scales)

    def region_p_value(self, peak: float) -> float:
        """p-value of a region's highest calibrated pixel among the highest pixels of held-out normals."""
        return 1.0 if self.highest is None else float(self.highest.p_value([peak])[0])

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """The fitted state, by detector in the order of `names`."""
        nothing = MapScale(np.nan, np.nan)
        scales = [self.scales.get(name, nothing) for name in self.names]
        return {
            "alpha": np.array([self.alpha, self.alpha_requested]),
            "weights": np.array([self.weights[name] for name in self.names]),
            "scores": np.stack([self.calibrators[name].scores for name in self.names]),
            "fused": self.fused.scores,
            "rule": np.array([RULE]),
            "map_scale": np.array([[scale.centre, scale.level] for scale in scales]),
            "highest": np.empty(0) if self.highest is None else self.highest.scores,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], names: tuple[str, ...]) -> Self:
        """The inverse of `to_arrays`; `names` are the detectors in their order."""
        if arrays.get("rule", np.array([1]))[0] != RULE:
            raise ArtifactError(
                "The calibration was made by another release, which fused scores in another way; fit the product again."
            )
        rows = dict(enumerate(names))
        scale = arrays["map_scale"]
        return cls(
            alpha=float(arrays["alpha"][0]),
            alpha_requested=float(arrays["alpha"][1]),
            weights={name: float(arrays["weights"][i]) for i, name in rows.items()},
            calibrators={name: Calibrator(arrays["scores"][i]) for i, name in rows.items()},
            fused=Calibrator(arrays["fused"]),
            scales={name: MapScale(*map(float, scale[i])) for i, name in rows.items() if np.isfinite(scale[i]).all()},
            highest=Calibrator(arrays["highest"]) if len(arrays["highest"]) else None,
        )


def _images(scores: Mapping[str, Scores]) -> dict[str, NDArray[np.float64]]:
    return {name: one.image.astype(np.float64) for name, one in scores.items()}


def _stretched(scale: MapScale, factor: float) -> MapScale:
    return MapScale(scale.centre, scale.centre + (scale.level - scale.centre) * factor)
