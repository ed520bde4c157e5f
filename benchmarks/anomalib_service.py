"""The smallest BentoML service around anomalib's PatchCore, for `serving.py` to measure."""

from __future__ import annotations

import os
from typing import Any

import bentoml
import numpy as np
from anomalib_peer import inferencer, predict
from PIL.Image import Image


@bentoml.service(traffic={"timeout": 300})
class AnomalibPeer:
    """One picture in, one score out."""

    def __init__(self) -> None:
        self.model = inferencer(os.environ["ANOMALIB_MODEL"], os.environ.get("ANOMALIB_OPENVINO") == "1")

    @bentoml.api
    def detect(self, image: Image) -> dict[str, Any]:
        """`verdict` is here for the load generator, which looks for it."""
        answer = predict(self.model, np.asarray(image.convert("RGB")))
        label, score = (np.ravel(value)[0] for value in (answer.pred_label, answer.pred_score))  # (1, 1) of OpenVINO's
        return {"verdict": bool(label), "score": float(score)}
