"""What `cortex usage` shows: the limits of a key and what it has spent, as tables."""

import sys

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cortex.gateway.inquiry import inquire
from cortex.gateway.usage import LimitUsage, UsageReport

PIPE_COLUMNS = 160

_decoder = msgspec.json.Decoder(UsageReport)


async def fetch_usage(endpoint: str, key: str | None) -> UsageReport:
    """Ask a gateway what a key may still spend; raises its error."""
    return await inquire(endpoint, "/v1/usage", _decoder, key)


def print_usage(report: UsageReport, *, as_json: bool) -> None:
    """Print a report: one JSON object, or tables."""
    # A pipe has no width of its own; names must not be cut there.
    out = Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS, highlight=False)
    if as_json:
        out.print(msgspec.json.encode(report).decode(), soft_wrap=True, markup=False)
        return
    out.print(f"key {report.key_id} of account {report.account_id}", markup=False)
    limits = Table("limit", "used", "of", "left", "free again", box=None, pad_edge=False)
    for each in report.limits:
        row = (each.name, str(each.used), str(each.limit), str(each.remaining), _window(each))
        limits.add_row(*(Text(cell) for cell in row))
    models = Table("model", "requests", "prompt", "cached", "answer", box=None, pad_edge=False)
    for spent in report.models:
        counts = (spent.requests, spent.prompt_tokens, spent.cached_tokens, spent.completion_tokens)
        models.add_row(Text(spent.model), *(Text(str(count)) for count in counts))
    if report.limits:
        out.print(limits)
    else:
        out.print("no limits")
    if report.models:
        out.print(models)


def _window(limit: LimitUsage) -> str:
    return "never" if limit.window_s is None else f"within {limit.window_s} s"
