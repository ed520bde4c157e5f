"""pytorch-ood's detectors on the same features, logits and final layer, for `ood_heads.py`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ood_runners.detectors.heads import Linear
from ood_runners.features import Features

Score = Callable[[Features], NDArray[np.floating]]


def fit_peers(features: Features, logits: NDArray[np.float32], layer: str, linear: Linear, labels: NDArray) -> dict:
    """A function from Features to scores (n,) for each detector; `labels` int64 (n,) count from 0.

    Where a parameter has a twin here it is the same: k = 1 for so few pictures, SCALE's 85th percentile, ViM's space of
    a third of the pictures. ASH has its paper's 90th percentile; the rest are the package's defaults.
    """
    import torch
    from pytorch_ood import detector as peer

    x = torch.from_numpy(np.ascontiguousarray(features.pooled[layer], np.float32))
    y = torch.from_numpy(labels)
    weight, bias = torch.from_numpy(linear.weight), torch.from_numpy(linear.bias)
    last = torch.nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        last.weight.copy_(weight)
        last.bias.copy_(bias)

    def head(maps: torch.Tensor) -> torch.Tensor:
        return last(maps.flatten(1))

    maps = x[:, :, None, None]
    on_logits = {
        "MaxSoftmax": peer.MaxSoftmax(None),
        "MaxLogit": peer.MaxLogit(None),
        "EnergyBased": peer.EnergyBased(None),
        "GEN": peer.GEN(None, M=min(100, len(bias))),
    }
    on_features = {
        "ViM": peer.ViM(None, min(max(1, len(x) // 3), x.shape[1] // 2), weight, bias).fit_features(x, y),
        "KNN": peer.KNN(None, k=1).fit_features(x, y),
        "NCI": peer.NCI(None, last).fit_features(x),
    }
    if len(torch.unique(y)) == int(y.max()) + 1 and len(torch.unique(y)) < len(y) / 2:  # it wants all classes
        on_features["RMD"] = peer.RMD(None).fit_features(x, y)
        on_features["Mahalanobis"] = peer.Mahalanobis(None).fit_features(x, y)
    on_maps = {
        "ReAct": peer.ReAct(None, head).fit_feature_maps(maps, y),
        "ASH": peer.ASH(None, head, percentile=0.9),
        "SCALE": peer.SCALE(None, head, percentile=0.85),
    }

    def scored(predict: Callable[[torch.Tensor], torch.Tensor], read: Callable[[Features], NDArray]) -> Score:
        def score(queries: Features) -> NDArray[np.floating]:
            with torch.no_grad():
                return predict(torch.from_numpy(np.ascontiguousarray(read(queries), np.float32))).numpy()

        return score

    def pooled(queries: Features) -> NDArray:
        return queries.pooled[layer]

    def as_maps(queries: Features) -> NDArray:
        return queries.pooled[layer][:, :, None, None]

    def as_logits(queries: Features) -> NDArray:
        return linear(queries.pooled[layer])

    return {
        **{name: scored(one.predict_logits, as_logits) for name, one in on_logits.items()},
        **{name: scored(one.predict_features, pooled) for name, one in on_features.items()},
        **{name: scored(one.predict_feature_maps, as_maps) for name, one in on_maps.items()},
    }
