"""The public service: ``bentoml serve`` in this folder serves every product that has a version in production."""

from __future__ import annotations

import gc

# What imports make stays. Looking through it again and again takes a tenth of each process's start.
gc.disable()

import shutil
from typing import TYPE_CHECKING, cast

import bentoml

from ood_runners.api.keys import KeyGuard, Keys, warn_if_open
from ood_runners.api.later import Later
from ood_runners.api.plain import PlainErrors
from ood_runners.mahalanobis_runner import MahalanobisRunner
from ood_runners.nearest_neighbour_runner import NearestNeighbourRunner
from ood_runners.pins import pinned_models
from ood_runners.resnet50_runner import ResNet50Runner
from ood_runners.settings import gateway_config, settings
from ood_runners.shutdown import GATEWAY, keep_sockets
from ood_runners.telemetry import setup
from ood_runners.telemetry.requests import RequestIds
from ood_runners.vae_runner import VAERunner
from ood_runners.wire.guard import NoPickle
from ood_runners.wire.transport import depends

if TYPE_CHECKING:
    from ood_runners.gateway.graph import Graph

keys = Keys.from_environment()
app = Later()


@bentoml.service(name=GATEWAY, **gateway_config())
@bentoml.asgi_app(app, path="/")
class OODService:
    """Says of a picture whether it belongs to what was shown as normal, how sure that is, and where it does not."""

    if settings.profile == "graph":
        resnet50 = depends(ResNet50Runner, settings.urls.get("resnet50"))
        vae = depends(VAERunner, settings.urls.get("vae"))
        nearest_neighbour = depends(NearestNeighbourRunner, settings.urls.get("nearest_neighbour"))
        mahalanobis = depends(MahalanobisRunner, settings.urls.get("mahalanobis"))

    def __init__(self) -> None:
        # Here, since every runner's process imports this module and does without.
        from ood_runners.api.app import create_app
        from ood_runners.gateway.gateway import Gateway
        from ood_runners.gateway.local import fused_graph

        setup.start()
        warn_if_open(keys)
        self.sockets = keep_sockets()
        graph = fused_graph(settings) if settings.profile == "fused" else self.graph()
        http = create_app(upload_s=settings.upload_s, guarded=keys is not None)
        self.gateway = http.state.gateway = Gateway(graph, settings)
        app.become(http)

    def graph(self) -> Graph:
        """The runners, each in a process of its own."""
        from ood_runners.gateway.calls import Runner
        from ood_runners.gateway.graph import Graph

        return Graph(
            features=Runner("ResNet50Runner", self.resnet50, "resnet50" in settings.urls),
            vae=Runner("VAERunner", self.vae, "vae" in settings.urls),
            memory_bank=Runner("NearestNeighbourRunner", self.nearest_neighbour, "nearest_neighbour" in settings.urls),
            mahalanobis=Runner("MahalanobisRunner", self.mahalanobis, "mahalanobis" in settings.urls),
        )

    @bentoml.on_startup
    def start(self) -> None:
        """Begin to load and warm up; requests that come earlier wait for it."""
        self.gateway.start()

    @bentoml.on_shutdown
    async def stop(self) -> None:
        """Stop following the production records; every request has been answered by now."""
        await self.gateway.stop()
        shutil.rmtree(self.sockets, ignore_errors=True)

    async def __is_ready__(self) -> bool:
        return await self.gateway.is_ready()

    async def __is_alive__(self) -> bool:
        return await self.gateway.is_alive()


# From the outside in, and around BentoML's own routes as well.
surface = cast("bentoml.Service[OODService]", OODService)
surface.models.extend(pinned_models(settings.pins))
surface.add_asgi_middleware(RequestIds)  # type: ignore[arg-type]
surface.add_asgi_middleware(PlainErrors)  # type: ignore[arg-type]
surface.add_asgi_middleware(NoPickle)  # type: ignore[arg-type]
if keys is not None:
    surface.add_asgi_middleware(KeyGuard, keys=keys)  # type: ignore[arg-type]

gc.freeze()
gc.enable()
