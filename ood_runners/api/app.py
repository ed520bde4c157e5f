"""The HTTP surface: forms in, JSON or PNG out.

It is a mounted FastAPI application and not a set of BentoML API methods, for what those do with a request before our
code sees it: a picture-typed parameter answers 500 for bytes that are no picture, and text in a file field makes the
server fetch that URL. BentoML's metrics, access log and tracing wrap mounted applications as well.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, FastAPI, File, Form, Request, Security, UploadFile
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, Response
from fastapi.security import APIKeyHeader, HTTPBearer

from ood_runners import __version__
from ood_runners.api import answers, errors
from ood_runners.api.door import Door
from ood_runners.api.limits import BodyLimits
from ood_runners.api.models import Detection, ErrorAnswer, ErrorBody, ProductAnswer, ProductsAnswer
from ood_runners.errors import OODError
from ood_runners.gateway.gateway import Ask, Gateway, Judged
from ood_runners.gateway.served import Served
from ood_runners.gateway.timing import Timing

STATUSES = {
    400: "the form cannot be read",
    401: "no valid API key; only where one is set",
    404: "no such product or version",
    408: "the body came too slowly",
    413: "too many bytes, pixels or pictures",
    415: "not a picture that is read here",
    422: "a parameter is out of range",
    503: "overloaded, or a runner is away; see Retry-After",
    504: "past the deadline",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": text} for status, text in STATUSES.items()
}
MAX_BODY = 128 * 2**20  # a batch of pictures; one picture has its own, lower limit
NPY = "application/x-npy"
# For the page only: by then the key has been checked and taken out of the request.
BEARER = HTTPBearer(auto_error=False)
API_KEY = APIKeyHeader(name="X-API-Key", auto_error=False)

Image = Annotated[UploadFile, File(description="JPEG, PNG, BMP, TIFF or WebP")]
Images = Annotated[list[UploadFile], File(description="one or more pictures")]
Product = Annotated[str | None, Form(description="may be left out where exactly one product is served")]
Version = Annotated[str | None, Form(description="a stored version other than the one in production")]
Alpha = Annotated[float | None, Form(gt=0, lt=1, description="false-alarm rate; the product's own if left out")]


def _file(media_type: str) -> dict[int | str, dict[str, Any]]:
    return {200: {"content": {media_type: {}}}, **ERRORS}


def _gateway(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


def _ask(product: Product = None, version: Version = None, alpha: Alpha = None) -> Ask:
    return Ask(product, version, alpha)


Serving = Annotated[Gateway, Depends(_gateway)]
Asked = Annotated[Ask, Depends(_ask)]


def create_app(upload_s: float, guarded: bool = False) -> FastAPI:
    """The application; ``app.state.gateway`` must be set before the first request.

    With `guarded`, its OpenAPI page says how to send the API key, which `KeyGuard` checks before anything comes here.
    """
    app = FastAPI(
        title="ood-runners",
        version=__version__,
        description="Does this picture belong to what I was shown as normal, how sure is that, and where does it not?",
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        dependencies=[Security(BEARER), Security(API_KEY)] if guarded else [],
    )
    errors.install(app)
    app.add_middleware(BodyLimits, max_bytes=MAX_BODY, upload_s=upload_s)
    app.add_middleware(Door, refusal=lambda: app.state.gateway.refusal(), upload_s=upload_s)

    @app.post("/detect", responses=ERRORS, response_model_exclude_none=True)
    async def detect(gateway: Serving, image: Image, ask: Asked) -> Detection:
        """Verdict, p-values and regions of one picture."""
        timing = Timing()
        served, judged = await _one(gateway, image, ask, timing)
        return answers.detection(served, judged, timing.finish())

    @app.post("/detect_batch", responses=ERRORS, response_model_exclude_none=True)
    async def detect_batch(gateway: Serving, images: Images, ask: Asked) -> list[Detection | ErrorAnswer]:
        """One answer a picture, in order; an error object in the place of a bad one."""
        timing = Timing()
        served, judged = await gateway.judge([await image.read() for image in images], ask, timing)
        stages = timing.finish()
        return [
            ErrorAnswer(error=ErrorBody(**one.to_dict()))
            if isinstance(one, OODError)
            else answers.detection(served, one, stages)
            for one in judged
        ]

    @app.post("/heatmap", responses=_file("image/png"), response_class=Response)
    async def heatmap(gateway: Serving, image: Image, ask: Asked) -> Response:
        """The picture, at its own size, under a fixed scale: blue is normal, red is anomalous.

        The headers ``X-OOD-Verdict``, ``X-OOD-P-Value``, ``X-OOD-Version`` say the rest.
        """
        served, judged = await _one(gateway, image, ask, Timing(), keep=True)
        png = await gateway.run(lambda: answers.heatmap(served, judged))
        return Response(png, media_type="image/png", headers=answers.headers(served, judged))

    @app.post("/anomaly_map", responses=_file(NPY), response_class=Response)
    async def anomaly_map(gateway: Serving, image: Image, ask: Asked) -> Response:
        """The calibrated map as a NumPy file: float32 (height, width) at the product's input size.

        0 is typical of normal pictures; 1 is what the highest point of a normal picture exceeds with probability
        alpha. Read it with ``numpy.load(io.BytesIO(answer), allow_pickle=False)``.
        """
        served, judged = await _one(gateway, image, ask, Timing())
        npy = answers.anomaly_map(served, judged)
        return Response(npy, media_type=NPY, headers=answers.headers(served, judged))

    @app.get("/products")
    async def products(gateway: Serving) -> ProductsAnswer:
        """Products, their versions, and which of them answers."""
        lines = await gateway.run(gateway.versions.listing)
        return ProductsAnswer(products=[ProductAnswer.model_validate(line) for line in lines])

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        # The scripts come from BentoML's own folder: the page works without a way to the internet.
        return get_swagger_ui_html(
            openapi_url="./openapi.json",
            title="ood-runners",
            swagger_js_url="./static_content/swagger-ui-bundle.js",
            swagger_css_url="./static_content/swagger-ui.css",
            swagger_favicon_url="./static_content/favicon-light-32x32.png",
        )

    return app


async def _one(
    gateway: Gateway, image: UploadFile, ask: Ask, timing: Timing, *, keep: bool = False
) -> tuple[Served, Judged]:
    served, [judged] = await gateway.judge([await image.read()], ask, timing, keep=keep)
    if isinstance(judged, OODError):
        raise judged
    return served, judged
