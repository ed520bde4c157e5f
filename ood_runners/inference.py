"""How networks are compiled for a CPU: in one way, for fitting and serving alike."""

from __future__ import annotations

from typing import Any

from ood_runners.cores import available_cores


def compile_for_cpu(model: Any, threads: int | None = None) -> Any:
    """An ``openvino.Model``, compiled.

    Always float32 where the model is: processors with bfloat16 would otherwise give other scores. The stages of a
    request follow one another, so each may use every core there is; `threads` is for those who share them otherwise.
    """
    import openvino as ov

    config = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads or available_cores(),
    }
    return ov.Core().compile_model(model, "CPU", config)
