"""The neuron's outermost layer: callers without the fleet secret reach no route."""

import hmac
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from cortex.core.errors import FleetSecretError
from cortex.core.web import error_response, json_response

HEALTH_PATH = "/health"


class FleetGuard:
    """Lets in whoever shows the fleet secret as bearer.

    Everybody else may ask for `/health`, and is told the status and nothing more.

    Args:
        status: the one word that anybody may hear.
    """

    def __init__(self, app: ASGIApp, secret: str, status: Callable[[], str]) -> None:
        self.app = app
        self._expected = f"Bearer {secret}".encode()
        self._status = status

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan" or self._is_trusted(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["path"] == HEALTH_PATH and scope["method"] in ("GET", "HEAD"):
            await json_response({"status": self._status()})(scope, receive, send)
        else:
            exc = FleetSecretError(
                "this neuron answers only to gateways that show its fleet secret; set fleet_secret "
                "in cortex.toml to the one in its neuron.toml"
            )
            await error_response(exc, "openai")(scope, receive, send)

    def _is_trusted(self, scope: Scope) -> bool:
        sent = [value for name, value in scope["headers"] if name == b"authorization"]
        return any(hmac.compare_digest(value, self._expected) for value in sent)
