"""What a Bento carries: the pinned versions and the backbones they were fitted on, each by its exact tag."""

from __future__ import annotations

from collections.abc import Mapping

from bentoml import Tag
from bentoml.exceptions import InvalidArgument
from bentoml.models import BentoModel

from ood_runners.artifacts import read_version
from ood_runners.errors import OODError


def pinned_models(pins: Mapping[str, str]) -> list[BentoModel]:
    """The models of `pins` (product to version), for a service to declare.

    ``bentoml build`` writes their tags into the Bento, ``bentoml containerize`` and ``bentoml export`` take them along.

    Raises
    ------
    InvalidArgument
        A pinned version is not in the store, or cannot be read.
    """
    tags: dict[Tag, None] = {}  # in order, each once: products share backbones
    for product, version in pins.items():
        try:
            stored = read_version(product, version, verify=False)
        except OODError as error:
            raise InvalidArgument(f"products={product}:{version}: {error.message}") from error
        tags |= dict.fromkeys((stored.tag, *map(Tag.from_str, stored.backbone_paths)))
    return [BentoModel(tag) for tag in tags]
