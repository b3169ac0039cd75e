"""What an operator may change while the gateway runs: which nodes take new work."""

import logging

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cortex.core.errors import NodeNotFoundError
from cortex.core.web import json_response
from cortex.gateway.fleet import Fleet
from cortex.gateway.views import node_report

_logger = logging.getLogger(__name__)


class Management:
    """The endpoints of whoever runs the fleet; `gateway.edge` lets only them in."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def routes(self) -> list[Route]:
        """Return the routes of the API listener that change the gateway itself."""
        return [
            Route("/nodes/{name:path}/drain", self._drain, methods=["POST"]),
            Route("/nodes/{name:path}/undrain", self._undrain, methods=["POST"]),
        ]

    async def _drain(self, request: Request) -> Response:
        return self._set(request, drained=True)

    async def _undrain(self, request: Request) -> Response:
        return self._set(request, drained=False)

    def _set(self, request: Request, *, drained: bool) -> Response:
        name: str = request.path_params["name"]
        if self._fleet.snapshot().node(name) is None:
            names = ", ".join(node.name for node in self._fleet.snapshot().nodes) or "none"
            raise NodeNotFoundError(f"there is no node '{name}'; there are: {names}")
        self._fleet.record_drained(name, drained)
        _logger.info("node %s %s", name, "drains" if drained else "takes work again")
        snapshot = self._fleet.snapshot()
        node = snapshot.node(name)
        assert node is not None
        return json_response(node_report(snapshot, node))
