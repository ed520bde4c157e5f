"""What a classifier makes of a picture, for unknown categories: out-of-distribution heads on its last layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ood_runners.detectors.base import Detector, Probes
from ood_runners.detectors.checks import finite_float32, pooled_features
from ood_runners.detectors.heads import HEADS, Activations, Head, Linear, Standard, fused
from ood_runners.detectors.heads.fusion import FITTED, TRAINED
from ood_runners.errors import ArtifactError, BadParameter, DataError
from ood_runners.features import Features, Scores

AUTO = "auto"
INVERSE_REGULARISATION = 0.1  # of the fitted layer's L2 penalty, on standardised features
STATISTICS = 1000  # pictures that the heads keep or take their statistics from, however many there are
OWN_FOLDS = 5  # for `fit`, which is given none


class Softmax(Detector):
    """Out-of-distribution heads of a classifier: one by name, or several together.

    With labels, a linear layer is fitted on pooled features, so that the known categories are the user's own.
    Without, the network's own logits are used, and for most heads its final layer, as `classifier`.

    Parameters
    ----------
    head : a name of `heads.HEADS`, or "auto": those of `heads.fusion` together, standardised on held-out pictures
    layer : pooled layer that the final layer reads; None takes the one with the most channels (the deepest)
    seed : of the solver, and of which pictures the heads keep

    Attributes
    ----------
    classifier : the network's final layer; set it before a fit without labels
    layer_ : the pooled layer; None where no head needs it
    linear_ : the fitted final layer, on raw pooled features; None when the network's own logits are used
    heads_ : the fitted heads, by name
    standards_ : of each of them
    classes_ : int64 (classes,): the labels, or 0 … k-1 for the network's own categories
    """

    name = "softmax"

    def __init__(self, *, head: str = AUTO, layer: str | None = None, seed: int = 0) -> None:
        self.head = head
        self.layer = layer
        self.seed = seed
        self.classifier: Linear | None = None

    def params(self) -> dict[str, Any]:
        return {"head": self.head, "layer": self.layer, "seed": self.seed}

    def fit(self, features: Features, labels: NDArray[np.int64] | None = None) -> Self:
        """Fit on n pictures: on ``features.pooled`` with `labels` int64 (n,), without on ``features.logits`` too."""
        if self.head == AUTO and len(features) > 1:
            folds = np.random.default_rng(self.seed).permutation(len(features)) % OWN_FOLDS
            self.fit_held_out(features, folds, labels)
        else:
            self._fit_heads(features, labels)
        return self

    def fit_held_out(
        self,
        features: Features,
        folds: NDArray[np.int64],
        labels: NDArray[np.int64] | None = None,
        *,
        probes: Probes | None = None,
    ) -> Scores:
        """As the base class says; the same held-out scores standardise the heads.

        A picture's own score has no part in what standardises it.
        """
        n = len(features)
        m = 0 if probes is None else len(probes.features)
        found: list[tuple[NDArray[np.int64], NDArray[np.bool_], list[NDArray[np.float32]], NDArray[np.int64]]] = []
        for fold in np.unique(folds):
            inside, outside = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
            rest = type(self)(**self.params())
            rest.classifier = self.classifier
            rest._fit_heads(features[outside], None if labels is None else labels[outside])
            found.append((inside, folds != fold, *rest._raw(features[inside])))
            if probes is not None and len(made := probes.of(folds, fold)):
                found.append((n + made, folds != fold, *rest._raw(probes.features[made])))
        self._fit_heads(features, labels)
        raw = np.empty((len(self.heads_), n + m))
        predicted = np.empty(n + m, np.int64)
        for rows, _, scores, classes in found:
            raw[:, rows], predicted[rows] = scores, classes
        image = np.empty(n + m, np.float32)
        for rows, others, scores, _ in found:
            image[rows] = fused(self._standards(raw[:, :n][:, others]), scores)
        self.standards_ = self._standards(raw[:, :n])
        return Scores(image=image, predicted=predicted)

    def _standards(self, scores: NDArray[np.floating]) -> list[Standard]:
        """Of each head, from its held-out scores (heads, n); a head alone keeps its own scale."""
        return [Standard.fit(row) for row in scores] if self.head == AUTO else [Standard.none()]

    def _fit_heads(self, features: Features, labels: NDArray[np.int64] | None) -> None:
        if self.head not in (AUTO, *HEADS):
            raise BadParameter(f"There is no head {self.head!r}; choose {AUTO}, or one of {', '.join(HEADS)}.")
        together = TRAINED if labels is None else FITTED
        names = together if self.head == AUTO else (self.head,)
        self.layer_: str | None = None
        self.linear_: Linear | None = None
        if labels is not None:
            labels = np.asarray(labels, np.int64)
            self._fit_linear(features, labels)
        elif features.logits is not None:
            self.classes_ = np.arange(features.logits.shape[1])
            if any(HEADS[name].needs_features for name in names):
                self.layer_ = self._deepest(features)
            if self.classifier is None and any(HEADS[name].needs_linear for name in names):
                raise DataError(
                    f"The head {self.head!r} needs the weights of the classifier's final layer; "
                    "use weights that include one (fc), or choose msp, max_logit, energy or gen."
                )
        else:
            raise DataError(
                "The softmax detector needs a classification head: sort the pictures into class folders, "
                "or use weights that include one (fc)."
            )
        rows = np.sort(np.random.default_rng(self.seed).permutation(len(features))[:STATISTICS])
        seen = self._seen(features[rows])
        classes = labels[rows] if labels is not None else seen.logits.argmax(axis=1)
        linear = self.linear_ or self.classifier
        self.heads_: dict[str, Head] = {name: HEADS[name].fit(seen, linear, classes) for name in names}
        self.standards_ = [Standard.none()] * len(names)

    def _deepest(self, features: Features) -> str:
        if not features.pooled:
            raise DataError("The softmax detector needs pooled features: of the layer that its final layer reads.")
        return self.layer or max(features.pooled, key=lambda name: features.pooled[name].shape[1])

    def _fit_linear(self, features: Features, labels: NDArray[np.int64]) -> None:
        from sklearn.linear_model import LogisticRegression

        self.layer_ = self._deepest(features)
        self.classes_ = np.unique(labels)
        if len(self.classes_) < 2:
            raise DataError("The softmax detector needs pictures of at least two classes.")
        x = pooled_features(features, self.layer_).astype(np.float64)
        mean, deviation = x.mean(axis=0), x.std(axis=0)
        deviation[deviation == 0] = 1
        model = LogisticRegression(C=INVERSE_REGULARISATION, max_iter=1000, random_state=self.seed)
        model.fit((x - mean) / deviation, labels)
        weight, bias = model.coef_, model.intercept_
        if len(self.classes_) == 2:  # one row of log-odds: as two logits that differ by it
            weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
        weight = weight / deviation
        self.linear_ = Linear(weight.astype(np.float32), (bias - weight @ mean).astype(np.float32))

    def logits(self, features: Features) -> NDArray[np.float32]:
        """Logits float32 (n, classes) of the fitted layer or the network's own."""
        if self.linear_ is not None and self.layer_ is not None:
            return self.linear_(pooled_features(features, self.layer_, self.linear_.weight.shape[1]))
        if features.logits is None or features.logits.shape[1] != len(self.classes_):
            found = "none" if features.logits is None else features.logits.shape[1]
            raise DataError(f"The softmax detector was fitted on {len(self.classes_)} logits; there are: {found}.")
        return finite_float32(features.logits, "logits")

    def _seen(self, features: Features) -> Activations:
        pooled = None if self.layer_ is None else pooled_features(features, self.layer_)
        return Activations(self.logits(features), pooled)

    def _raw(self, features: Features) -> tuple[list[NDArray[np.float32]], NDArray[np.int64]]:
        """Each head's scores (n,), and the most probable class (n,)."""
        seen = self._seen(features)
        return [head.score(seen) for head in self.heads_.values()], self.classes_[seen.logits.argmax(axis=1)]

    def score(self, features: Features) -> Scores:
        """``image`` float32 (n,), and ``predicted`` int64 (n,), the most probable class."""
        scores, predicted = self._raw(features)
        return Scores(image=fused(self.standards_, scores), predicted=predicted)

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        arrays: dict[str, NDArray[Any]] = {"classes": self.classes_}
        if self.layer_ is not None:
            arrays["layer"] = np.frombuffer(self.layer_.encode(), np.uint8)
        if self.linear_ is not None:
            arrays |= {"weight": self.linear_.weight, "bias": self.linear_.bias}
        for (name, head), standard in zip(self.heads_.items(), self.standards_, strict=True):
            arrays[f"standard.{name}"] = np.array(astuple(standard))
            arrays |= {f"head.{name}.{field}": array for field, array in head.to_arrays().items()}
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], params: Mapping[str, Any]) -> Self:
        names = [key.removeprefix("standard.") for key in arrays if key.startswith("standard.")]
        if "classes" not in arrays or not names or any(name not in HEADS for name in names):
            raise ArtifactError(
                "The stored softmax detector does not say which classes or which heads it has; fit the product again."
            )
        detector = cls(**params)
        detector.classes_ = arrays["classes"]
        detector.layer_ = arrays["layer"].tobytes().decode() if "layer" in arrays else None
        detector.linear_ = None
        if "weight" in arrays:
            if "bias" not in arrays or detector.layer_ is None:
                raise ArtifactError("The stored softmax detector has a final layer without a bias or a name.")
            detector.linear_ = Linear(arrays["weight"], arrays["bias"])
        detector.heads_, detector.standards_ = {}, []
        for name in names:
            prefix = f"head.{name}."
            own = {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
            detector.heads_[name] = HEADS[name].from_arrays(own)
            detector.standards_.append(Standard(*map(float, arrays[f"standard.{name}"])))
        return detector
