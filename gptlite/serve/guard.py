"""Who may ask, and how much: what stands before every request.

A page of another site must neither read nor write here: its requests carry an Origin or a Host that
is not ours (the latter after it has made its own name point to this machine), or Sec-Fetch-Site.
"""

import asyncio
import hmac
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN = ("/", "/health")
"""Paths that need no token: they tell nothing of a run."""
HEADERS = {
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
SECONDS_FOR_A_BODY = 10.0
"""For a client to send what it asks."""


@dataclass
class Refusal(Exception):
    """A request that is answered with an error."""

    status: int
    message: str
    kind: str = "invalid_request_error"
    param: str | None = None

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI's clients expect it."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": None}
        return {"error": error}


@dataclass(frozen=True)
class Guard:
    """ASGI middleware. With `hosts` the server has only these names, with `token` only who sends it
    is answered."""

    app: ASGIApp
    hosts: Sequence[str] | None
    token: str | None
    most_body_bytes: int

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *own]
            await send(message)

        try:
            self.check(scope["path"], scope["method"], Headers(scope=scope))
            body = await self.read_body(Headers(scope=scope), receive)
        except Refusal as refusal:
            await refuse(refusal, send_with_headers)
            return
        await self.app(scope, replay(body, receive), send_with_headers)

    def check(self, path: str, method: str, headers: Mapping[str, str]) -> None:
        """Raises Refusal."""
        host = headers.get("host", "")
        if self.hosts is not None and host_name(host) not in self.hosts:
            raise Refusal(421, f"Host: {host:.100} is not a name of this server")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise Refusal(403, f"Origin: {origin:.100} is another site; its pages may not ask here")
        site = headers.get("sec-fetch-site", "none")
        if site not in ("none", "same-origin") and (path, method) != ("/", "GET"):
            raise Refusal(403, "Sec-Fetch-Site: the page of another site may not ask here")
        if self.token is not None and path not in OPEN:
            given = headers.get("authorization", "").encode("utf-8", "replace")
            if not hmac.compare_digest(given, f"Bearer {self.token}".encode()):
                why = "the token is missing or wrong: send Authorization: Bearer TOKEN"
                raise Refusal(401, why, "authentication_error")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if method == "POST" and kind != "application/json":
            raise Refusal(415, "Content-Type: must be application/json")

    async def read_body(self, headers: Mapping[str, str], receive: Receive) -> bytes:
        """Raises Refusal for a body that is too large, or too slow."""
        most = self.most_body_bytes
        too_large = Refusal(413, f"body: more than {most:,} bytes")
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > most:
            raise too_large
        parts, total = [], 0
        try:
            async with asyncio.timeout(SECONDS_FOR_A_BODY):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refusal(400, "the client left")
                    parts.append(message.get("body", b""))
                    total += len(parts[-1])
                    if total > most:
                        raise too_large
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise Refusal(408, f"body: not here in {SECONDS_FOR_A_BODY:g} seconds") from None


def host_name(host: str) -> str:
    """Without the port, in lower case."""
    if host.startswith("["):
        return host.partition("]")[0].lower() + "]"
    return host.partition(":")[0].lower()


def replay(body: bytes, receive: Receive) -> Receive:
    """The body once, then what the connection says."""
    sent = False

    async def receive_again() -> Message:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return receive_again


async def refuse(refusal: Refusal, send: Send) -> None:
    body = json.dumps(refusal.body).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    headers.append((b"content-length", str(len(body)).encode()))
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    start = {"type": "http.response.start", "status": refusal.status, "headers": headers}
    await send(start)
    await send({"type": "http.response.body", "body": body})
