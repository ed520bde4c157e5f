"""How many pictures a runner computes at once: what the served versions were measured to gain from."""

from __future__ import annotations

from ood_runners.artifacts import production, products, read_version
from ood_runners.errors import OODError
from ood_runners.settings import Settings, has_gpu

UNMEASURED = 16
CALL = 8  # pictures that the gateway sends in one call: 1.2 MB of pixels at 224 px, 1.6 MB of patches


def largest_batch(settings: Settings) -> int:
    """The setting `max_batch`, or else the largest batch that one of the served versions gains from, 8 at least.

    A version is measured when it is fitted (``batch`` in its manifest's cost), on the kind of device that it is fitted
    on. Past that size a larger batch takes longer and computes no more a second, and what follows waits for it. Where
    nothing was measured on such a device it is 16. Read once, when the server starts.
    """
    if settings.max_batch is not None:
        return settings.max_batch
    device = "cuda" if settings.device == "cuda" or (settings.device == "auto" and has_gpu()) else "cpu"
    measured = []
    for product, version in _served(settings).items():
        try:
            cost = read_version(product, version, verify=False).manifest.cost
        except OODError:  # the gateway says of it what is to be said
            continue
        if cost.get("device") == device:
            measured.append(int(cost.get("batch", UNMEASURED)))
    return max(CALL, *measured) if measured else UNMEASURED


def _served(settings: Settings) -> dict[str, str]:
    if settings.pins:
        return settings.pins
    found = {product: production(product) for product in products()}
    return {product: version for product, version in found.items() if version}
