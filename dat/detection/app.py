"""The HTTP application of detection.serve: a page, and an endpoint that detects in a picture. Needs fastapi."""

import asyncio
import io
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.responses import FileResponse
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, Field

from dat.detection.evaluation import to_results
from dat.detection.points import Points, check_points, detect_with_points
from dat.detection.predictor import Predictor
from dat.utils.errors import ConfigError, DataError, UserError
from dat.utils.images import UNREADABLE, read_image

FORMATS = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "BMP": "image/bmp", "GIF": "image/gif"}
PAGE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Limits:
    """What is refused.

    Attributes:
        upload: bytes of a picture file.
        pixels: of a picture, width times height.
        waiting: requests that are being received, wait or run.
        seconds: that an upload may take.
    """

    upload: int = 16 * 2**20
    pixels: int = 40_000_000
    waiting: int = 256
    seconds: float = 60.0


class Detection(BaseModel):
    """One object."""

    category: str = Field(description="name of its class")
    category_id: int
    score: float = Field(ge=0, le=1)
    bbox: list[float] = Field(description="x, y, width, height in pixels of the upright picture")
    reference: list[float] | None = Field(None, description="x, y of its query, with points=true")
    points: list[list[list[float]]] | None = Field(
        None, description="with points=true, for each level the samples of all heads: x, y, weight"
    )


class Answer(BaseModel):
    """What was found in a picture."""

    width: int = Field(description="of the upright picture, in pixels")
    height: int
    detections: list[Detection] = Field(description="by falling score")


class Description(BaseModel):
    """What is served."""

    classes: list[str]
    points: bool = Field(description="whether sampling points can be asked for")
    max_bytes: int
    max_pixels: int


class Problem(BaseModel):
    """Why a request was refused."""

    detail: str


PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": text}
    for status, text in {
        400: "empty, truncated or damaged picture",
        408: "the upload took too long",
        413: "too many bytes or pixels",
        415: "not a picture of a type that is read",
        429: "too many requests are waiting",
        500: "the model cannot be used for this picture",
    }.items()
}
UPLOAD = {
    "requestBody": {
        "required": True,
        "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in FORMATS.values()},
    }
}


def create_app(predictor: Predictor, limits: Limits | None = None) -> FastAPI:
    """The application. Pictures are decoded and searched one after the other, in one thread."""
    allowed = limits or Limits()
    worker = ThreadPoolExecutor(1, "detect")
    waiting = 0

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        worker.shutdown(cancel_futures=True)

    # no /docs: FastAPI's pages of the description fetch their scripts from elsewhere
    app = FastAPI(title="Detector", description=__doc__ or "", lifespan=lifespan, docs_url=None, redoc_url=None)

    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(PAGE, media_type="text/html")

    @app.get("/model")
    def model() -> Description:
        """What is served."""
        names = [category.name for category in predictor.categories]
        return Description(
            classes=names, points=has_points(predictor), max_bytes=allowed.upload, max_pixels=allowed.pixels
        )

    @app.post("/detect", responses=PROBLEMS, openapi_extra=UPLOAD)
    async def detect(
        request: Request,
        threshold: Annotated[float, Query(ge=0, le=1, description="least score")] = 0.0,
        points: Annotated[bool, Query(description="tell where each detection sampled")] = False,
    ) -> Answer:
        """Detects objects in the picture that is the body of the request."""
        nonlocal waiting
        if points and not has_points(predictor):
            raise HTTPException(400, "points=true: this model has no sampling points")
        if waiting >= allowed.waiting:
            raise HTTPException(429, f"{waiting} requests are waiting, try again later", {"Retry-After": "5"})
        waiting += 1
        try:
            body = await receive(request, allowed)
            return await asyncio.get_running_loop().run_in_executor(
                worker, answer, predictor, body, allowed, threshold, points
            )
        except UserError as error:
            raise HTTPException(500, str(error)) from error
        finally:
            waiting -= 1

    return app


def has_points(predictor: Predictor) -> bool:
    """Whether the queries of a predictor have sampling points."""
    try:
        check_points(predictor)
    except ConfigError:
        return False
    return True


async def receive(request: Request, limits: Limits) -> bytes:
    """The body of a request. Raises HTTPException for one that is too large or takes too long."""
    too_large = HTTPException(413, f"the picture file has more than {limits.upload} bytes")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limits.upload:
        raise too_large

    async def read() -> bytearray:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limits.upload:
                raise too_large
        return body

    try:
        body = await asyncio.wait_for(read(), limits.seconds)
    except asyncio.TimeoutError as error:
        raise HTTPException(408, f"the upload took more than {limits.seconds:g} seconds") from error
    if not body:
        raise HTTPException(400, "the body is empty, should be a picture file")
    return bytes(body)


def decode(body: bytes, limits: Limits) -> Image.Image:
    """A picture file in RGB. Raises HTTPException before anything large is decoded."""
    try:
        # the head alone
        with Image.open(io.BytesIO(body), formats=list(FORMATS)) as head:
            width, height = head.size
    except UnidentifiedImageError as error:
        raise HTTPException(415, f"not a picture of a type that is read: {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise HTTPException(413, f"the picture has more than {limits.pixels} pixels") from error
    except UNREADABLE as error:
        raise HTTPException(400, f"the picture is damaged: {error}") from error
    if width * height > limits.pixels:
        raise HTTPException(413, f"the picture has {width} x {height} pixels, more than {limits.pixels}")
    try:
        return read_image(io.BytesIO(body))
    except DataError as error:
        raise HTTPException(400, str(error)) from error


def answer(predictor: Predictor, body: bytes, limits: Limits, threshold: float, points: bool) -> Answer:
    """What is found in a picture file."""
    picture = decode(body, limits)
    samples: Points | None = None
    if points:
        found, samples = detect_with_points(predictor, picture)
    else:
        (found,) = predictor([picture])
    names = {category.id: category.name for category in predictor.categories}
    results = to_results(0, (picture.height, picture.width), found, predictor.categories)
    detections = [
        Detection(
            category=names[result["category_id"]],
            category_id=result["category_id"],
            score=result["score"],
            bbox=result["bbox"],
            **({} if samples is None else _samples(samples, i)),
        )
        for i, result in enumerate(results)
        if result["score"] >= threshold
    ]
    return Answer(width=picture.width, height=picture.height, detections=detections)


def _samples(points: Points, detection: int) -> dict[str, Any]:
    locations = points.locations[detection].transpose(0, 1).flatten(1, 2).tolist()
    weights = points.weights[detection].transpose(0, 1).flatten(1, 2).tolist()
    levels = [
        [[round(x, 1), round(y, 1), round(weight, 4)] for (x, y), weight in zip(*level, strict=True)]
        for level in zip(locations, weights, strict=True)
    ]
    return {"reference": [round(value, 1) for value in points.references[detection].tolist()], "points": levels}
