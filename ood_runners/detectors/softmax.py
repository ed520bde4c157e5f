"""The classifier's own confidence: maximum softmax probability and energy, for unknown categories.

References
----------
Hendrycks and Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural
Networks", ICLR 2017.
Liu et al., "Energy-based Out-of-distribution Detection", NeurIPS 2020.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ood_runners.detectors.base import Detector
from ood_runners.detectors.checks import finite_float32, pooled_features
from ood_runners.errors import ArtifactError, BadParameter, DataError
from ood_runners.features import Features, Scores

INVERSE_REGULARISATION = 0.1  # of the fitted head's L2 penalty, on standardised features


class Softmax(Detector):
    """Energy or maximum softmax probability of a classification head, as a score that grows with strangeness.

    With labels, a linear head is fitted on pooled features, so that the known categories are the user's own.
    Without, the network's own logits are used. On ImageNet photographs against textures the energy of the
    network's logits gave 0.93 AUROC and the maximum softmax probability 0.84; with fitted heads they are close.

    Parameters
    ----------
    score : "energy", minus ``T logsumexp(logits / T)``; or "msp", one minus the highest probability
    temperature : T of the energy
    layer : pooled layer the head is fitted on; None takes the one with the most channels (the deepest)
    seed : of the head's solver

    Attributes
    ----------
    layer_ : the layer of the fitted head; None when the network's own logits are used
    weight_, bias_ : float32 (channels, classes) and (classes,) of the fitted head, on raw pooled features
    classes_ : int64 (classes,): the labels, or 0 … k-1 for the network's own categories
    """

    name = "softmax"
    layer_: str | None

    def __init__(
        self, *, score: str = "energy", temperature: float = 1.0, layer: str | None = None, seed: int = 0
    ) -> None:
        # `score` is the method's name, so the parameter is kept under another one.
        self.kind = score
        self.temperature = temperature
        self.layer = layer
        self.seed = seed

    def params(self) -> dict[str, Any]:
        return {"score": self.kind, "temperature": self.temperature, "layer": self.layer, "seed": self.seed}

    def fit(self, features: Features, labels: NDArray[np.int64] | None = None) -> Self:
        """Fit a head on ``features.pooled[layer]`` (n, channels) where there are `labels` int64 (n,).

        Without labels nothing is learned; ``features.logits`` float32 (n, k) must be there.
        """
        if self.kind not in ("energy", "msp"):
            raise BadParameter(f"The softmax detector's score is 'energy' or 'msp', not {self.kind!r}.")
        if not self.temperature > 0:
            raise BadParameter(f"The temperature of the energy must be above 0, not {self.temperature}.")
        if labels is not None:
            self._fit_head(features, np.asarray(labels, np.int64))
        elif features.logits is not None:
            self.layer_ = None
            self.classes_ = np.arange(features.logits.shape[1])
        else:
            raise DataError(
                "The softmax detector needs a classification head: sort the pictures into class folders, "
                "or use weights that include one (fc)."
            )
        return self

    def _fit_head(self, features: Features, labels: NDArray[np.int64]) -> None:
        from sklearn.linear_model import LogisticRegression

        if not features.pooled:
            raise DataError("The softmax detector needs pooled features to fit a head for the class folders.")
        self.classes_ = np.unique(labels)
        if len(self.classes_) < 2:
            raise DataError("The softmax detector needs pictures of at least two classes.")
        layer = self.layer or max(features.pooled, key=lambda name: features.pooled[name].shape[1])
        x = pooled_features(features, layer).astype(np.float64)
        mean, deviation = x.mean(axis=0), x.std(axis=0)
        deviation[deviation == 0] = 1
        model = LogisticRegression(C=INVERSE_REGULARISATION, max_iter=1000, random_state=self.seed)
        model.fit((x - mean) / deviation, labels)
        weight, bias = model.coef_, model.intercept_
        if len(self.classes_) == 2:  # one row of log-odds: as two logits that differ by it
            weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
        weight = weight / deviation
        self.weight_ = np.ascontiguousarray(weight.T, dtype=np.float32)
        self.bias_ = (bias - weight @ mean).astype(np.float32)
        self.layer_ = layer

    def logits(self, features: Features) -> NDArray[np.float32]:
        """Logits float32 (n, classes) of the fitted head or the network's own."""
        if self.layer_ is not None:
            return pooled_features(features, self.layer_, len(self.weight_)) @ self.weight_ + self.bias_
        if features.logits is None or features.logits.shape[1] != len(self.classes_):
            found = "none" if features.logits is None else features.logits.shape[1]
            raise DataError(f"The softmax detector was fitted on {len(self.classes_)} logits; there are: {found}.")
        return finite_float32(features.logits, "logits")

    def score(self, features: Features) -> Scores:
        """``image`` float32 (n,), and ``predicted`` int64 (n,), the most probable class."""
        logits = self.logits(features)
        predicted = self.classes_[logits.argmax(axis=1)]
        if self.kind == "msp":
            # One minus the highest, summed over the others: keeps its digits where one class is almost certain.
            others = np.exp(logits - logits.max(axis=1, keepdims=True))
            others[np.arange(len(logits)), logits.argmax(axis=1)] = 0
            rest = others.sum(axis=1)
            image = rest / (1 + rest)
        else:
            scaled = logits / np.float32(self.temperature)
            highest = scaled.max(axis=1)
            image = -np.float32(self.temperature) * (highest + np.log(np.exp(scaled - highest[:, None]).sum(axis=1)))
        return Scores(image=image.astype(np.float32), predicted=predicted)

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        arrays: dict[str, NDArray[Any]] = {"classes": self.classes_}
        if self.layer_ is not None:
            arrays |= {f"weight.{self.layer_}": self.weight_, f"bias.{self.layer_}": self.bias_}
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], params: Mapping[str, Any]) -> Self:
        detector = cls(**params)
        if "classes" not in arrays:
            raise ArtifactError("The stored softmax detector does not say which classes it knows.")
        detector.classes_ = arrays["classes"]
        detector.layer_ = next((name.removeprefix("weight.") for name in arrays if name.startswith("weight.")), None)
        if detector.layer_ is not None:
            if f"bias.{detector.layer_}" not in arrays:
                raise ArtifactError("The stored softmax detector has a head without a bias.")
            detector.weight_, detector.bias_ = arrays[f"weight.{detector.layer_}"], arrays[f"bias.{detector.layer_}"]
        return detector
