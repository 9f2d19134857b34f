"""The HTTP server of a detector: a page to drop images on, and an endpoint for programs. Needs fastapi and uvicorn."""

import asyncio
import ipaddress
import logging
import socket
from collections.abc import AsyncIterator, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, TypeVar

import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.responses import HTMLResponse
from PIL import Image
from pydantic import BaseModel, Field
from starlette.requests import ClientDisconnect

from dat.detection.access import Access, page_policy
from dat.detection.detector import Detector
from dat.detection.points import Points, detect_with_points, has_points
from dat.detection.upload import FORMATS, DecodeLimits, DecodePool, Refused
from dat.utils.errors import ConfigError, UserError
from dat.utils.text import printable

logger = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("page.html")
# Processes that decode images, and the most decoded images in memory.
DECODERS = 4
# Seconds that open requests have to end once the server is to stop.
STOPPING = 3
T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """Limits beyond which requests are refused.

    Attributes:
        upload: bytes of an image file.
        pixels: width times height of an image.
        waiting: requests that are being received, wait or run.
        seconds: duration of an upload.
        held: bytes of all uploads that are being received, wait or run.
        decoding: seconds that decoding an image may take.
        rate: requests of a client per second, on average; twice as many may come at once.
    """

    upload: int = 16 * 2**20
    pixels: int = 40_000_000
    waiting: int = 256
    seconds: float = 60.0
    held: int = 2**29
    decoding: float = 10.0
    rate: float = 100.0


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
        401: "the token is absent or wrong",
        403: "the Host is unknown, or the Origin another site",
        408: "the upload took too long",
        413: "too many bytes or pixels, or decoding takes too long",
        415: "not an image of a supported format",
        429: "too many requests are waiting, or come from this client",
        500: "the model fails on this image",
        503: "too many bytes are waiting, no process starts to decode, or the server is stopping",
    }.items()
}
UPLOAD = {
    "requestBody": {
        "required": True,
        "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in FORMATS.values()},
    }
}


def serve(
    detector: Detector,
    host: str,
    port: int,
    limits: Limits,
    hosts: Collection[str] = (),
    token: str | None = None,
) -> None:
    """Serves until it is interrupted; prints its address once it accepts connections.

    Args:
        detector: trained, or an exported file.
        host: address to listen at.
        port: 0 takes a free one.
        limits: see Limits.
        hosts: further names under which the server is reached, by a proxy for instance.
        token: that requests must hold; None: none is needed.

    Raises:
        OSError: the address cannot be used.
        ConfigError: `host` is no name.
    """
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    # Names that cannot be encoded raise one of these.
    except (TypeError, UnicodeError) as error:
        raise ConfigError(f"--host {host!r} is no name or address of this machine") from error
    found, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    if token is None and not ipaddress.ip_address(found).is_loopback:
        everybody = "whoever reaches this machine may use the server"
        logger.warning(f"warning: --host {host}: {everybody}; DAT_SERVE_TOKEN or --token asks for a token")

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            print(printable(f"{address}: {detector.path}, {len(detector.categories)} classes"), flush=True)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            # uvicorn would take a second Ctrl-C as a reason to leave the processes that decode, with a traceback.
            if not self.should_exit:
                super().handle_exit(sig, frame)

    app = create_app(detector, limits, (host, *hosts), token)
    # Interrupting is the way to stop a server.
    with listener, suppress(KeyboardInterrupt):
        Server(server_config(app)).run([listener])


def server_config(app: FastAPI) -> uvicorn.Config:
    """How uvicorn serves; its warnings are of requests that are no HTTP, a line or two for each."""
    return uvicorn.Config(app, log_level="error", ws="none", server_header=False, timeout_graceful_shutdown=STOPPING)


def create_app(
    detector: Detector, limits: Limits | None = None, hosts: Collection[str] = (), token: str | None = None
) -> FastAPI:
    """The application; see serve for the arguments. Images are searched one after the other, in one thread."""
    allowed = limits or Limits()
    searches = Searches(detector, allowed)
    text = PAGE.read_text(encoding="utf-8")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        searches.decoders.start()
        yield
        searches.close()

    # Without /docs and /redoc, whose pages load scripts from other servers.
    app = FastAPI(title="Detector", description=__doc__ or "", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Access, hosts=hosts, token=token, rate=allowed.rate, policy=page_policy(text))

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(text)

    @app.get("/model")
    async def model() -> Description:
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
        if points and not has_points(detector):
            raise HTTPException(400, "points=true: this model has no sampling points, or searches tiles")
        try:
            return await searches.answer(request, threshold, points)
        except Refused as error:
            later = {"Retry-After": "5"} if error.status in (429, 503) else None
            raise HTTPException(error.status, str(error), later) from error
        except UserError as error:
            raise HTTPException(500, str(error)) from error
        except ClientDisconnect as error:
            raise HTTPException(400, "the upload was cut off") from error
        except asyncio.CancelledError as error:
            raise HTTPException(503, "the server is stopping") from error

    return app


class Searches:
    """The requests that are being received, wait or run."""

    def __init__(self, detector: Detector, limits: Limits) -> None:
        self.detector, self.limits = detector, limits
        self.decoders = DecodePool(DECODERS, DecodeLimits(limits.pixels, limits.decoding))
        self.decode_threads, self.model_thread = ThreadPoolExecutor(DECODERS, "decode"), ThreadPoolExecutor(1, "detect")
        # Turns end with the work in the thread, slots with the request.
        self.decode_turns, self.model_turns = asyncio.Semaphore(DECODERS), asyncio.Semaphore(1)
        self.slots = asyncio.Semaphore(DECODERS)
        self.waiting = self.held = 0

    def close(self) -> None:
        """Ends the processes; what the model computes is left alone."""
        self.decoders.close()
        for threads in (self.decode_threads, self.model_thread):
            threads.shutdown(wait=False, cancel_futures=True)

    async def answer(self, request: Request, threshold: float, points: bool) -> Answer:
        """The objects in the image that is the body of a request.

        Raises:
            Refused: the request exceeds a limit, or is not of an image.
            UserError: the model fails.
            ClientDisconnect: nobody waits for the answer.
        """
        if self.waiting >= self.limits.waiting:
            raise Refused(429, f"{self.waiting} requests are waiting, try again later")
        self.waiting += 1
        body = bytearray()
        try:
            await self._receive(request, body)
            search = asyncio.ensure_future(self._search(body, threshold, points))
            gone = asyncio.ensure_future(_leave(request))
            try:
                await asyncio.wait({search, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not search.done():
                    raise ClientDisconnect
                return search.result()
            finally:
                search.cancel()
                gone.cancel()
        finally:
            self.waiting -= 1
            self.held -= len(body)

    async def _receive(self, request: Request, body: bytearray) -> None:
        """Appends the body of a request to `body`. Raises Refused for one that is too large or takes too long."""
        limits = self.limits
        too_large = Refused(413, f"the image file has more than {limits.upload} bytes")
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > limits.upload:
            raise too_large

        async def read() -> None:
            async for chunk in request.stream():
                body.extend(chunk)
                self.held += len(chunk)
                if len(body) > limits.upload:
                    raise too_large
                if self.held > limits.held:
                    raise Refused(503, f"{self.held} bytes are waiting, try again later")

        try:
            await asyncio.wait_for(read(), limits.seconds)
        except asyncio.TimeoutError as error:
            raise Refused(408, f"the upload took more than {limits.seconds:g} seconds") from error
        if not body:
            raise Refused(400, "the body is empty, should be an image file")

    async def _search(self, body: bytearray, threshold: float, points: bool) -> Answer:
        async with self.slots:
            image = await self._run(self.decode_threads, self.decode_turns, lambda: self.decoders.decode(body))
            return await self._run(
                self.model_thread, self.model_turns, lambda: find(self.detector, image, threshold, points)
            )

    @staticmethod
    async def _run(threads: ThreadPoolExecutor, turns: asyncio.Semaphore, function: Callable[[], T]) -> T:
        """Calls a function in a thread once it is its turn; one that has begun ends, even if nobody waits any more."""

        def end(future: asyncio.Future[T]) -> None:
            turns.release()
            # An error that nobody waits for would be logged.
            if not future.cancelled():
                future.exception()

        await turns.acquire()
        future = asyncio.get_running_loop().run_in_executor(threads, function)
        future.add_done_callback(end)
        return await asyncio.shield(future)


async def _leave(request: Request) -> None:
    """Returns when the client of a request, whose body was received, has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def find(detector: Detector, image: Image.Image, threshold: float, points: bool) -> Answer:
    """The objects of an image."""
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
