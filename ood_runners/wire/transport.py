"""BentoML's client and server of a runner, taught to speak frames.

BentoML looks up how to read and write a body by its media type, on both sides; frames are one entry more there.
A call then goes through BentoML's own batching, time-outs and tracing, whatever it comes over.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from functools import cache
from typing import Any, TypeVar, cast

from _bentoml_impl import serde
from _bentoml_sdk.service.dependency import Dependency
from bentoml import Service, server_context
from bentoml._internal.configuration.containers import BentoMLContainer
from bentoml.exceptions import BadInput, BentoMLException

from ood_runners.api.keys import KeyGuard, Keys, warn_if_open
from ood_runners.errors import MalformedRequest
from ood_runners.wire.credential import Credential
from ood_runners.wire.frames import MEDIA_TYPE, decode, encode
from ood_runners.wire.guard import OnlyFrames

Runner = TypeVar("Runner")
ENTRY = "entry_service"  # BentoML's name for the one service that a server was asked to serve


class FrameSerde(serde.GenericSerde, serde.Serde):
    """Reads and writes the bodies of a method that takes a list of items and answers one."""

    media_type = MEDIA_TYPE

    def serialize_model(self, model: Any) -> serde.Payload:
        """The one argument of a call, or its answer, as a frame."""
        data = model.model_dump()
        if isinstance(data, list):  # an answer
            return serde.Payload((encode(data),))
        [items] = data.values()
        return serde.Payload((encode(items),), _credential().headers())

    def deserialize_model(self, payload: serde.Payload, cls: Any) -> Any:
        """The model `cls` of a frame; BadInput (400) for a body that is none."""
        try:
            items = decode(b"".join(payload.data))
        except MalformedRequest as error:
            raise BadInput(error.message) from error
        names = [name for name in cls.model_fields if name != "root"]
        return cls.model_validate({names[0]: items} if names else items)


@cache
def _credential() -> Credential:
    return Credential()


def framed(runner: Service[Runner]) -> Service[Runner]:
    """Have a runner read frames, and nothing else, of those only who have a key, where one is set."""
    cast("MutableMapping[str, Any]", serde.ALL_SERDE)[MEDIA_TYPE] = FrameSerde
    runner.add_asgi_middleware(OnlyFrames)  # type: ignore[arg-type]
    keys = Keys.from_environment()
    if keys is not None:
        runner.add_asgi_middleware(KeyGuard, keys=keys)  # type: ignore[arg-type]
    return runner


def warn_if_open_alone() -> None:
    """Say loudly that a runner which is served alone can be reached from beyond this machine without a key."""
    if server_context.service_type == ENTRY:
        warn_if_open(Keys.from_environment())


class _FramedDependency(Dependency[Runner]):
    def get(self, **_: Any) -> Any:
        from _bentoml_impl.client import RemoteProxy  # in the gateway's process alone

        url = self.url
        if url is None and self.on is not None:
            url = BentoMLContainer.remote_runner_mapping.get().get(self.on.name)
        if url is None:
            raise BentoMLException(f"{self.on} is not served; start it with `bentoml serve`.")
        return RemoteProxy(url, service=self.on, media_type=MEDIA_TYPE)


def depends(runner: Service[Runner], url: str | None = None) -> Any:
    """``bentoml.depends`` in frames: the runner beside the gateway, or the one that is served alone at `url`."""
    return _FramedDependency(runner, url=url)
