"""Every answer carries the id of its request, whatever became of it."""

import re
import secrets

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cortex.core.web import dialect_of

REQUEST_ID = "cortex.request_id"
HEADER = "x-request-id"
# Where clients of the other dialect look for it.
ANTHROPIC_HEADER = "request-id"
# A caller's own id is kept if it can stand in a log line and in a path.
_USABLE = re.compile(r"[A-Za-z0-9._:=+@-]{1,128}")


def request_id_of(scope: Scope) -> str:
    """Return the id of a request."""
    request_id: str = scope[REQUEST_ID]
    return request_id


class RequestIds:
    """Names each request, by its own `x-request-id` where that is usable, and says so back."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        request_id = given if _USABLE.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        scope[REQUEST_ID] = request_id
        names = [HEADER]
        if dialect_of(scope) == "anthropic":
            names.append(ANTHROPIC_HEADER)
        headers = [(name.encode(), request_id.encode()) for name in names]

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *headers]
            await send(message)

        await self.app(scope, receive, named)
