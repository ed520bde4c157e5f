"""What an operator may set: the Bento arguments, checked once.

``bentoml serve --arg device=cpu --arg products=hazelnut:v3`` sets them for one run, ``bentoml build --arg …``
writes them into the Bento, which then overrules those of its ``bentoml serve``. What neither sets may be set by
the environment: ``OOD_DEVICE=cpu``.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any, Literal
from urllib.parse import urlsplit

import bentoml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

# A server's large products run in OpenVINO. What NumPy's BLAS gets is small, and its threads cost more than they give
# where several processes share the cores. Read by the processes that BentoML starts from the one that reads this.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# The client of a dependency closes its session, with the requests in flight, after 100 requests or 300 s
# unless told otherwise; a broken connection is noticed and replaced without that.
RUNNER_CONNECTION = {"max_requests": 2_000_000_000, "max_age": 1e9}
MARGIN_S = 5.0
ENVIRONMENT = "OOD_"
RUNNERS = ("resnet50", "vae", "nearest_neighbour", "mahalanobis")


class Settings(BaseModel):
    """The Bento arguments with their defaults; an unknown name is refused when the server starts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    products: str = Field("", description="name:version,… pins exactly these; empty follows the production records")
    profile: Literal["graph", "fused"] = Field(
        "graph", description="graph: each runner a process of its own; fused: all in one, for small machines"
    )
    gateways: int = Field(
        1, ge=1, le=64, description="gateway processes; several pay on a machine with a GPU or many cores"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto uses a GPU where there is one")
    deadline_s: float = Field(20.0, gt=0, le=600, description="a request is answered within this time")
    upload_s: float = Field(30.0, gt=0, le=600, description="a body must have arrived within this time")
    max_pending: int = Field(256, ge=1, description="pictures on their way at once; more are answered 503")
    max_pictures: int = Field(64, ge=1, le=1024, description="pictures in one batch request")
    max_batch: int | None = Field(
        None, ge=2, le=256, description="pictures a runner computes at once; by default as many as versions gain from"
    )
    memory_mb: int = Field(2048, ge=64, description="what each runner may hold in loaded versions")
    runner_urls: str = Field("", description="name=url,… of runners that are served alone; the others start beside")
    log_format: Literal["text", "json"] = Field("text", description="json writes one object a line")

    @model_validator(mode="before")
    @classmethod
    def _from_environment(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        named = {name: os.environ.get(ENVIRONMENT + name.upper()) for name in cls.model_fields}
        return {name: value for name, value in named.items() if value is not None} | arguments

    @field_validator("products")
    @classmethod
    def _check_products(cls, value: str) -> str:
        _parse_pins(value)
        return value

    @field_validator("runner_urls")
    @classmethod
    def _check_runner_urls(cls, value: str) -> str:
        _parse_urls(value)
        return value

    @model_validator(mode="after")
    def _check_profile(self) -> Settings:
        if self.profile == "fused" and self.runner_urls:
            raise ValueError("runner_urls names runners that are served alone; profile fused has none")
        return self

    @property
    def pins(self) -> dict[str, str]:
        """Product to version, where versions are pinned."""
        return _parse_pins(self.products)

    @property
    def urls(self) -> dict[str, str]:
        """Runner to the URL at which it is served alone."""
        return _parse_urls(self.runner_urls)

    @property
    def memory_bytes(self) -> int:
        """`memory_mb` in bytes."""
        return self.memory_mb * 2**20


def _parse_pins(text: str) -> dict[str, str]:
    pins: dict[str, str] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        product, _, version = entry.partition(":")
        if not product or not version:
            raise ValueError(f"products wants name:version,name:version, not {entry!r}")
        if product in pins:
            raise ValueError(f"products names {product!r} twice")
        pins[product] = version
    return pins


def _parse_urls(text: str) -> dict[str, str]:
    urls: dict[str, str] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, _, url = entry.partition("=")
        if name not in RUNNERS:
            raise ValueError(f"runner_urls knows {', '.join(RUNNERS)}, not {name!r}")
        if name in urls:
            raise ValueError(f"runner_urls names {name!r} twice")
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/"):
            raise ValueError(f"runner_urls wants {name}=http://host:port, not {entry!r}")
        urls[name] = url.rstrip("/")
    return urls


def has_gpu() -> bool:
    """Whether an NVIDIA GPU and torch are here, found out without importing torch."""
    if find_spec("torch") is None:
        return False
    import pynvml

    try:
        pynvml.nvmlInit()
        return bool(pynvml.nvmlDeviceGetCount() > 0)
    except pynvml.NVMLError:
        return False


def runner_config(*, gpu: bool) -> dict[str, Any]:
    """The BentoML settings of a runner; one that can use a GPU asks for half of one, where there is one."""
    config: dict[str, Any] = {
        "traffic": {"timeout": settings.deadline_s + MARGIN_S},
        "runner_connection": RUNNER_CONNECTION,
        "logging": {"access": {"enabled": False}},  # the gateway logs each request once
    }
    if gpu and (settings.device == "cuda" or (settings.device == "auto" and has_gpu())):
        config["resources"] = {"gpu": 0.5}  # features and VAE share one
    return config


def gateway_config() -> dict[str, Any]:
    """The BentoML settings of the gateway.

    Its own limits are the ones that answer: BentoML's time-out is a last resort behind them, and its probe of the
    runners, which ends in a 500 after ten seconds, is replaced by the gateway's. Its access log would decode the
    request's Content-Type as UTF-8 and, where it is none, end the connection in the place of the answer.
    """
    return {
        "workers": settings.gateways,
        "traffic": {"timeout": settings.upload_s + settings.deadline_s + 2 * MARGIN_S},
        "logging": {"access": {"request_content_type": False}},
        "runner_probe": {"enabled": False},
    }


def batching(pictures: int) -> dict[str, Any]:
    """The settings of a batchable runner method that computes `pictures` at once.

    BentoML drops a call that would wait longer than `max_latency_ms`; what is worth waiting for is decided by
    the gateway's deadline, so the two agree.
    """
    return {
        "batchable": True,
        "max_batch_size": pictures,
        "max_latency_ms": int(settings.deadline_s * 1000),
    }


settings = bentoml.use_arguments(Settings)
