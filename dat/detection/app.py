"""The HTTP server of a detector: a page to drop images on, and an endpoint for programs. Needs fastapi and uvicorn."""

import asyncio
import io
import socket
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.responses import FileResponse
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, Field

from dat.detection.detector import Detector
from dat.detection.points import Points, detect_with_points, has_points
from dat.utils.errors import DataError, UserError
from dat.utils.images import UNREADABLE, check_size, read_image

FORMATS = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "BMP": "image/bmp", "GIF": "image/gif"}
PAGE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Limits:
    """Limits beyond which requests are refused.

    Attributes:
        upload: bytes of an image file.
        pixels: width times height of an image.
        waiting: requests that are being received, wait or run.
        seconds: duration of an upload.
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
    bbox: list[float] = Field(description="x, y, width, height in pixels of the upright image")
    reference: list[float] | None = Field(None, description="x, y of its reference point, with points=true")
    points: list[list[list[float]]] | None = Field(
        None, description="with points=true, for each level the samples of all heads: x, y, weight"
    )


class Answer(BaseModel):
    """The objects of an image."""

    width: int = Field(description="of the upright image, in pixels")
    height: int
    detections: list[Detection] = Field(description="by decreasing score")


class Description(BaseModel):
    """The model and the limits of the server."""

    classes: list[str]
    points: bool = Field(description="whether sampling points are available")
    max_bytes: int
    max_pixels: int


class Problem(BaseModel):
    """The reason why a request was refused."""

    detail: str


PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": text}
    for status, text in {
        400: "empty, truncated or damaged image",
        408: "the upload took too long",
        413: "too many bytes or pixels",
        415: "not an image of a supported format",
        429: "too many requests are waiting",
        500: "the model fails on this image",
    }.items()
}
UPLOAD = {
    "requestBody": {
        "required": True,
        "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in FORMATS.values()},
    }
}


def serve(detector: Detector, host: str, port: int, limits: Limits) -> None:
    """Serves until it is interrupted; prints its address once it accepts connections.

    Args:
        detector: trained, or an exported file.
        host: address to listen at.
        port: 0 takes a free one.
        limits: see Limits.

    Raises:
        OSError: the address cannot be used.
    """
    listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            print(f"{address}: {detector.path}, {len(detector.categories)} classes", flush=True)

    # Interrupting is the way to stop a server.
    with listener, suppress(KeyboardInterrupt):
        Server(uvicorn.Config(create_app(detector, limits), log_level="warning")).run([listener])


def create_app(detector: Detector, limits: Limits | None = None) -> FastAPI:
    """The application. Images are decoded and searched one after the other, in one thread."""
    allowed = limits or Limits()
    worker = ThreadPoolExecutor(1, "detect")
    waiting = 0

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        worker.shutdown(cancel_futures=True)

    # Without /docs and /redoc, whose pages load scripts from other servers.
    app = FastAPI(title="Detector", description=__doc__ or "", lifespan=lifespan, docs_url=None, redoc_url=None)

    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(PAGE, media_type="text/html")

    @app.get("/model")
    def model() -> Description:
        """The classes and limits."""
        names = [category.name for category in detector.categories]
        return Description(
            classes=names, points=has_points(detector), max_bytes=allowed.upload, max_pixels=allowed.pixels
        )

    @app.post("/detect", responses=PROBLEMS, openapi_extra=UPLOAD)
    async def detect(
        request: Request,
        threshold: Annotated[float, Query(ge=0, le=1, description="least score")] = 0.0,
        points: Annotated[bool, Query(description="return the sampling points of each detection")] = False,
    ) -> Answer:
        """Detects objects in the image that is the body of the request."""
        nonlocal waiting
        if points and not has_points(detector):
            raise HTTPException(400, "points=true: this model has no sampling points, or searches tiles")
        if waiting >= allowed.waiting:
            raise HTTPException(429, f"{waiting} requests are waiting, try again later", {"Retry-After": "5"})
        waiting += 1
        try:
            body = await receive(request, allowed)
            return await asyncio.get_running_loop().run_in_executor(
                worker, answer, detector, body, allowed, threshold, points
            )
        except UserError as error:
            raise HTTPException(500, str(error)) from error
        finally:
            waiting -= 1

    return app


async def receive(request: Request, limits: Limits) -> bytes:
    """The body of a request. Raises HTTPException for one that is too large or takes too long."""
    too_large = HTTPException(413, f"the image file has more than {limits.upload} bytes")
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
        raise HTTPException(400, "the body is empty, should be an image file")
    return bytes(body)


def decode(body: bytes, limits: Limits) -> Image.Image:
    """An image file in RGB. Raises HTTPException before anything large is decoded."""
    try:
        # Reads the header only.
        with Image.open(io.BytesIO(body), formats=list(FORMATS)) as head:
            width, height = head.size
    except UnidentifiedImageError as error:
        raise HTTPException(415, f"not an image of a supported format: {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise HTTPException(413, f"the image has more than {limits.pixels} pixels") from error
    except UNREADABLE as error:
        raise HTTPException(400, f"the image is damaged: {error}") from error
    if width * height > limits.pixels:
        raise HTTPException(413, f"the image has {width} x {height} pixels, more than {limits.pixels}")
    try:
        image = read_image(io.BytesIO(body))
        check_size(image)
        return image
    except DataError as error:
        raise HTTPException(400, str(error)) from error


def answer(detector: Detector, body: bytes, limits: Limits, threshold: float, points: bool) -> Answer:
    """The objects of an image file."""
    image = decode(body, limits)
    samples: Points | None = None
    if points:
        found, samples = detect_with_points(detector, image)
    else:
        found = detector.predict(image, threshold=0.0)
    detections = [
        Detection(
            category=name,
            **{key: result[key] for key in ("category_id", "score", "bbox")},
            **({} if samples is None else _describe(samples, i)),
        )
        for i, (name, result) in enumerate(zip(found.class_names, found.to_coco(), strict=True))
        if result["score"] >= threshold
    ]
    return Answer(width=image.width, height=image.height, detections=detections)


def _describe(points: Points, detection: int) -> dict[str, Any]:
    """The reference point and, for each level, [x, y, weight] of all samples of one detection."""
    locations = points.locations[detection].transpose(0, 1).flatten(1, 2).tolist()
    weights = points.weights[detection].transpose(0, 1).flatten(1, 2).tolist()
    levels = [
        [[round(x, 1), round(y, 1), round(weight, 4)] for (x, y), weight in zip(*level, strict=True)]
        for level in zip(locations, weights, strict=True)
    ]
    return {"reference": [round(value, 1) for value in points.references[detection].tolist()], "points": levels}
