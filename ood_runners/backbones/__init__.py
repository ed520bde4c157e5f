"""Pictures -> Features: the registry of backbones, their export, and the network that runs.

`export_backbone` and `auto_backbone` need torch and import it on first use; everything else runs without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ood_runners.backbones.projection import Projection, ProjectionFitter
from ood_runners.backbones.runtime import FeatureNetwork
from ood_runners.backbones.spec import BACKBONES, BackboneInfo, BackboneSpec, LayerSpec, get_spec

if TYPE_CHECKING:
    from ood_runners.backbones.export import export_backbone
    from ood_runners.backbones.weights import auto_backbone

__all__ = [
    "BACKBONES",
    "BackboneInfo",
    "BackboneSpec",
    "FeatureNetwork",
    "LayerSpec",
    "Projection",
    "ProjectionFitter",
    "auto_backbone",
    "export_backbone",
    "get_spec",
]


def __getattr__(name: str) -> Any:
    if name == "export_backbone":
        from ood_runners.backbones.export import export_backbone

        return export_backbone
    if name == "auto_backbone":
        from ood_runners.backbones.weights import auto_backbone

        return auto_backbone
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
