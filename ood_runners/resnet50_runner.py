"""Pictures to features: the one pass of the backbone that all detectors share."""

from __future__ import annotations

from typing import Any

import bentoml

from ood_runners.batches import largest_batch
from ood_runners.settings import MARGIN_S, batching, runner_config, settings
from ood_runners.shutdown import end_after_gateway
from ood_runners.telemetry import setup
from ood_runners.wire.transport import framed, warn_if_open_alone

BATCH = largest_batch(settings)


@framed
@bentoml.service(name="ResNet50Runner", **runner_config(gpu=True))
class ResNet50Runner:
    """Runs whichever backbone a product was fitted on; ResNet50 is the default one."""

    def __init__(self) -> None:
        from ood_runners.engines import feature_engine  # in this runner's process alone

        setup.start()
        warn_if_open_alone()
        end_after_gateway(settings.deadline_s + MARGIN_S)
        self._engine = feature_engine(settings.device, settings.memory_bytes, BATCH)

    @bentoml.api(**batching(BATCH))
    def infer(self, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """One answer an item, in order; see ood_runners/engines.py."""
        return self._engine.infer(items)
