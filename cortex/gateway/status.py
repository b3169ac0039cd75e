"""What `cortex status` shows: a gateway's health and models, as data and as table rows."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import aiohttp
import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cortex.core.openai import ModelCard, ModelList
from cortex.gateway.inquiry import InquiryError, get_body
from cortex.gateway.views import HealthReport, NodeReport

PIPE_COLUMNS = 160

EXIT_OK = 0
EXIT_DEGRADED = 1
EXIT_UNREACHABLE = 2

_health_decoder = msgspec.json.Decoder(HealthReport)
_models_decoder = msgspec.json.Decoder(ModelList)


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusReport:
    """A gateway's state, or why it could not be had.

    Attributes:
        error: why the gateway, or its model list, could not be read; None when all is there.
        exit_code: 0 ok, 1 impaired or degraded, 2 unreachable.
    """

    endpoint: str
    exit_code: int
    health: HealthReport | None = None
    models: list[ModelCard] = field(default_factory=list)
    error: str | None = None

    @property
    def summary(self) -> str:
        """One line for the top of the table."""
        if self.health is None:
            return f"{self.endpoint}: unreachable: {self.error}"
        nodes = self.health.nodes
        return f"{self.endpoint}: {self.health.status}, {nodes.healthy}/{nodes.total} nodes healthy"

    @property
    def config_lines(self) -> list[str]:
        """What is to be said of the gateway's configuration; nothing where all is in use."""
        lines = []
        if self.health is not None and self.health.config.error is not None:
            lines.append(f"configuration not in use: {self.health.config.error}")
        if self.health is not None and self.health.config.restart_for:
            keys = ", ".join(self.health.config.restart_for)
            lines.append(f"restart the gateway for: {keys}")
        return lines

    @property
    def node_rows(self) -> list[tuple[str, str, str, str, str]]:
        """(node, state, in flight, queued, models) for every node."""
        return [
            (
                node.name,
                _node_state(node),
                str(node.in_flight),
                str(node.queue_depth),
                ", ".join(f"{each.id} ({each.state})" for each in node.models) or "-",
            )
            for node in (self.health.details if self.health is not None else [])
        ]

    @property
    def model_rows(self) -> list[tuple[str, str, str, str]]:
        """(model, status, where, context) for every model."""
        return [
            (
                card.id,
                card.status or "unknown",
                ", ".join(f"{each.node} ({each.status})" for each in card.locations) or "-",
                str(card.max_model_len) if card.max_model_len is not None else "-",
            )
            for card in self.models
        ]

    def to_json(self) -> bytes:
        """Return the whole report as one JSON object."""
        health = self.health
        return msgspec.json.encode(
            {
                "endpoint": self.endpoint,
                "status": health.status if health is not None else "unreachable",
                "error": self.error,
                "nodes": health.nodes if health is not None else None,
                "unservable": health.unservable if health is not None else [],
                "details": health.details if health is not None else [],
                "config": health.config if health is not None else None,
                "models": self.models,
            }
        )


def print_status(report: StatusReport, *, as_json: bool) -> None:
    """Print a report: one JSON object, or tables; an unreachable gateway goes to stderr."""
    # A pipe has no width of its own; names must not be cut there.
    out = Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS, highlight=False)
    if as_json:
        out.print(report.to_json().decode(), soft_wrap=True, markup=False)
        return
    if report.health is None:
        Console(stderr=True, highlight=False).print(report.summary, soft_wrap=True, markup=False)
        return
    out.print(report.summary, markup=False)
    for line in report.config_lines:
        out.print(line, markup=False, soft_wrap=True)
    if report.node_rows or not report.health.nodes.total:
        out.print(_table(("node", "state", "in flight", "queued", "models"), report.node_rows))
    else:
        out.print("nodes: shown to a key that may use all models; give one with --key")
    if report.error is not None:
        out.print(f"models: {report.error}", markup=False)
    else:
        out.print(_table(("model", "status", "where", "context"), report.model_rows))


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, no_wrap=number == 0, overflow="fold")
    for row in rows:
        # Names come from other machines and are not markup.
        table.add_row(*(Text(cell) for cell in row))
    return table


async def fetch_status(endpoint: str, key: str | None = None) -> StatusReport:
    """Ask a gateway how it is; what goes wrong is in the report.

    Args:
        key: sent as bearer where the gateway asks for one; `/health` needs none.
    """
    base = endpoint.rstrip("/")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with aiohttp.ClientSession(headers=headers) as session:
        try:
            health = _health_decoder.decode(await get_body(session, f"{base}/health"))
        except (InquiryError, msgspec.DecodeError, UnicodeDecodeError) as exc:
            return StatusReport(endpoint=base, exit_code=EXIT_UNREACHABLE, error=_words(exc))
        exit_code = EXIT_OK if health.status == "ok" else EXIT_DEGRADED
        try:
            models = _models_decoder.decode(await get_body(session, f"{base}/v1/models")).data
        except (InquiryError, msgspec.DecodeError, UnicodeDecodeError) as exc:
            return StatusReport(
                endpoint=base, exit_code=exit_code, health=health, error=_words(exc)
            )
    return StatusReport(endpoint=base, exit_code=exit_code, health=health, models=models)


def _words(exc: Exception) -> str:
    return str(exc) if isinstance(exc, InquiryError) else f"not a gateway's answer: {exc}"


def _node_state(node: NodeReport) -> str:
    if not node.healthy:
        return f"down: {node.error}" if node.error else "down"
    if node.draining:
        return "draining"
    return "healthy" if node.breaker == "closed" else "failing"
