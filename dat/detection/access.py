"""Decides which requests reach the server: hosts, origins, tokens, rates; and what browsers may do with its answers."""

import base64
import hashlib
import hmac
import ipaddress
import math
import re
import time
from collections import OrderedDict
from collections.abc import Collection
from contextlib import suppress

from h11 import LocalProtocolError
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Clients whose rates are remembered, those seen last.
MOST_CLIENTS = 4096
# Paths that need no token: the page reads it from its own address.
OPEN_PATHS = ("/", "/openapi.json")


class Access:
    """An ASGI application that passes on the requests that are allowed, and adds headers to all answers.

    Args:
        app: the application.
        hosts: names under which the server is reached. Addresses and "localhost" are always allowed: a page of another
            site that makes its own name lead here (DNS rebinding) has neither.
        token: that "Authorization: Bearer TOKEN" should hold; None: none is needed.
        rate: most requests of a client per second, on average; twice as many may come at once.
        policy: the Content-Security-Policy.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str], token: str | None, rate: float, policy: str) -> None:
        self.app, self.token, self.rate = app, token, rate
        self.hosts = {"localhost", *(host.lower() for host in hosts)}
        self.headers = {
            "Content-Security-Policy": policy,
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
        }
        # For each client how many requests it may send at once, and when that was so.
        self.clients: OrderedDict[str, tuple[float, float]] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
            # The rest of the request is no HTTP: nobody reads an answer, and the connection is closed.
            with suppress(LocalProtocolError):
                await send(message)

        refused = self._refuse(scope["path"], Headers(scope=scope), (scope.get("client") or [""])[0])
        await (refused or self.app)(scope, receive, send_with_headers)

    def _refuse(self, path: str, headers: Headers, client: str) -> JSONResponse | None:
        wait = self._wait(client)
        if wait > 0:
            reason = f"more than {self.rate:g} requests per second"
            return _refusal(429, reason, {"Retry-After": str(math.ceil(wait))})
        host = headers.get("host", "")
        if not self._is_known(host):
            return _refusal(403, f"the host {host[:100]!r} is unknown; --allow-host NAME allows one")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            return _refusal(403, f"a page of {origin[:100]!r} may not use this server")
        if self.token is not None and path not in OPEN_PATHS:
            given = headers.get("authorization", "").encode()
            if not hmac.compare_digest(given, f"Bearer {self.token}".encode()):
                reason = "the token is absent or wrong; the page takes it as /#token=TOKEN"
                return _refusal(401, reason, {"WWW-Authenticate": "Bearer"})
        return None

    def _is_known(self, host: str) -> bool:
        """Whether a Host header, with or without a port, is an address or a known name."""
        found = re.fullmatch(r"\[([0-9a-fA-F:.]+)\](:\d+)?|([^:\[\]]+)(:\d+)?", host)
        if found is None:
            return False
        name = (found[1] or found[3]).lower()
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self.hosts
        return True

    def _wait(self, client: str) -> float:
        """Seconds until a client may send a request; 0: it may now, and this one is counted."""
        now, most = time.monotonic(), max(2 * self.rate, 1)
        allowed, then = self.clients.pop(client, (most, now))
        allowed = min(allowed + (now - then) * self.rate, most)
        self.clients[client] = (allowed - 1 if allowed >= 1 else allowed), now
        while len(self.clients) > MOST_CLIENTS:
            self.clients.popitem(last=False)
        return 0 if allowed >= 1 else (1 - allowed) / self.rate


def _refusal(status: int, reason: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": reason}, status, headers)


def page_policy(page: str) -> str:
    """A Content-Security-Policy with which a page runs its own script and style, and asks only its own server."""

    def digest(tag: str) -> str:
        found = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert found is not None
        return base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()

    return (
        f"default-src 'none'; script-src 'sha256-{digest('script')}'; style-src 'sha256-{digest('style')}'; "
        "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
