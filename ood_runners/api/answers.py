"""From what a picture is judged to be to the answer over HTTP."""

from __future__ import annotations

import io
import math

import numpy as np
from numpy.typing import NDArray

from ood_runners import images, maps
from ood_runners.api.models import Detection, DetectorAnswer, RegionAnswer
from ood_runners.errors import BadParameter
from ood_runners.gateway.gateway import Judged
from ood_runners.gateway.served import Served


def detection(served: Served, judged: Judged, timing_ms: dict[str, float]) -> Detection:
    """The JSON answer of one picture."""
    judgement = judged.judgement
    return Detection.model_validate(
        {
            "product": served.product,
            "version": served.version,
            "verdict": judgement.verdict,
            "p_value": judgement.p_value,
            "score": judgement.score,
            "alpha": judgement.alpha,
            "detectors": {
                name: DetectorAnswer(score=one.score, p_value=one.p_value) for name, one in judgement.detectors.items()
            },
            "regions": regions(served, judged),
            "predicted_class": served.class_name(judgement.predicted),
            "timing_ms": timing_ms,
        }
    )


def regions(served: Served, judged: Judged) -> list[RegionAnswer]:
    """Where the calibrated map exceeds its threshold, in pixels of the picture that was sent."""
    if judged.map is None:
        return []
    rows, columns = (sent / own for sent, own in zip(judged.picture.size, judged.map.shape, strict=True))
    answers = []
    for region in maps.find_regions(judged.map):
        left, top, right, bottom = region.box
        answers.append(
            RegionAnswer(
                box=(int(left * columns), int(top * rows), math.ceil(right * columns), math.ceil(bottom * rows)),
                p_value=served.calibration.region_p_value(region.peak),
                area=round(region.area * rows * columns),
            )
        )
    return answers


def heatmap(served: Served, judged: Judged) -> bytes:
    """A PNG of the picture as sent, under its calibrated map."""
    assert judged.picture.sent is not None
    height, width = judged.picture.size
    calibrated = maps.upscale(_map(served, judged)[np.newaxis], (height, width))[0]
    return images.encode_png(maps.overlay(judged.picture.sent, calibrated))


def anomaly_map(served: Served, judged: Judged) -> bytes:
    """The calibrated map as a NumPy file."""
    file = io.BytesIO()
    np.save(file, _map(served, judged), allow_pickle=False)
    return file.getvalue()


def headers(served: Served, judged: Judged) -> dict[str, str]:
    """The verdict, for answers that are no JSON."""
    height, width = judged.picture.size
    return {
        "X-OOD-Product": served.product,
        "X-OOD-Version": served.version,
        "X-OOD-Verdict": judged.judgement.verdict,
        "X-OOD-P-Value": f"{judged.judgement.p_value:.6g}",
        "X-OOD-Picture-Size": f"{width}x{height}",
    }


def _map(served: Served, judged: Judged) -> NDArray[np.float32]:
    if judged.map is None:
        raise BadParameter(
            f"No detector of {served.product} localises ({', '.join(served.detectors)}), so it has no map; "
            "fit it with memory_bank or vae."
        )
    return judged.map
