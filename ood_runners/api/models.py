"""What the service answers; the OpenAPI page is made from these."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

Verdict = Literal["normal", "anomalous"]


class ErrorBody(BaseModel):
    """What went wrong: a code for programs, a sentence for people."""

    code: str = Field(examples=["not_a_picture"])
    message: str = Field(examples=["The file is empty; send a JPEG, PNG, BMP, TIFF or WebP picture."])


class ErrorAnswer(BaseModel):
    """Every answer that is not a success, and the place of a bad picture in a batch."""

    error: ErrorBody


class DetectorAnswer(BaseModel):
    """One detector's view of the picture."""

    score: float = Field(description="raw score; larger is stranger; comparable within one version only")
    p_value: float = Field(description="share of normal pictures that score at least as high")


class RegionAnswer(BaseModel):
    """A connected part of the picture where the calibrated anomaly map exceeds its threshold."""

    box: tuple[int, int, int, int] = Field(
        description="left, top, right, bottom in pixels of the picture that was sent; right and bottom exclusive"
    )
    p_value: float = Field(description="share of normal pictures whose highest point is at least as high")
    area: int = Field(description="pixels of the picture that was sent")


class Detection(BaseModel):
    """Whether a picture belongs to what the product was fitted on, how sure that is, and where it does not."""

    product: str
    version: str
    verdict: Verdict = Field(description="anomalous where p_value <= alpha")
    p_value: float = Field(description="share of normal pictures at least as strange as this one")
    score: float = Field(description="fused score; continuous, so it ranks pictures with equal p-values")
    alpha: float = Field(description="false-alarm rate on normal pictures that the verdict was made with")
    detectors: dict[str, DetectorAnswer]
    regions: list[RegionAnswer] = Field(description="strongest first; empty where no detector localises")
    predicted_class: str | None = Field(None, description="the known class it looks most like, where there are classes")
    timing_ms: dict[str, float] = Field(description="milliseconds by stage; stages overlap")


class ProductAnswer(BaseModel):
    """A product and its versions."""

    product: str
    version: str | None = Field(description="the version that answers; null where none can be served")
    production: str | None = Field(description="the version that the production record, or a pin, names")
    versions: list[str] = Field(description="every version in the store, oldest first")
    alpha: float | None = None
    detectors: list[str] = []
    refused: str | None = Field(None, description="why the version in production is not the one that answers")


class ProductsAnswer(BaseModel):
    """All products in the store."""

    products: list[ProductAnswer]
