"""What `cortex plan` and `cortex why` show: a choice with its costs and rejections, in words."""

import sys
from collections.abc import Sequence
from urllib.parse import quote

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cortex.gateway.decisions import OptionReport, RejectionReport, StepReport, WhyReport
from cortex.gateway.inquiry import inquire
from cortex.gateway.plans import PlanReport

PIPE_COLUMNS = 160

_plan_decoder = msgspec.json.Decoder(PlanReport)
_why_decoder = msgspec.json.Decoder(WhyReport)


async def fetch_plan(endpoint: str, model: str, key: str | None) -> PlanReport:
    """Ask a gateway what it would do with a request for a model; raises its error."""
    return await inquire(endpoint, f"/plan?model={quote(model, safe='')}", _plan_decoder, key)


async def fetch_why(endpoint: str, request_id: str, key: str | None) -> WhyReport:
    """Ask a gateway what it did with a request; raises its error."""
    return await inquire(endpoint, f"/why/{quote(request_id, safe='')}", _why_decoder, key)


def print_plan(report: PlanReport, *, as_json: bool) -> None:
    """Print a plan: one JSON object, or tables."""
    out = _console()
    if as_json:
        _print_json(out, report)
        return
    stands_for = f" ({', '.join(report.models)})" if report.models != [report.name] else ""
    out.print(f"{report.name}{stands_for}: {_summary(report)}", markup=False)
    _print_options(out, report.options)
    _print_rejected(out, report.rejected)
    if report.placements:
        out.print("it could be loaded beside that:", markup=False)
        _print_options(out, report.placements)
    _print_rejected(out, report.not_placed)


def print_why(report: WhyReport, *, as_json: bool) -> None:
    """Print a decision: one JSON object, or tables."""
    out = _console()
    if as_json:
        _print_json(out, report)
        return
    out.print(f"{report.request_id}: {report.name}, {report.state}", markup=False)
    for line in _facts(report):
        out.print(f"  {line}", markup=False)
    for number, step in enumerate(report.steps, 1):
        out.print(f"{number}. at {step.at_ms:g} ms: {_step(step)}", markup=False)
        _print_options(out, step.options)
        _print_rejected(out, step.rejected)


def _console() -> Console:
    # A pipe has no width of its own; names must not be cut there.
    return Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS, highlight=False)


def _print_json(out: Console, report: PlanReport | WhyReport) -> None:
    out.print(msgspec.json.encode(report).decode(), soft_wrap=True, markup=False)


def _summary(report: PlanReport) -> str:
    if report.action == "refuse":
        return f"would be refused: {report.error}"
    if report.action == "serve":
        return f"would be served by {report.node}"
    best = report.options[0]
    displaced = f", displacing {', '.join(best.victims)}" if best.victims else ""
    doubt = f"; doubtful: it {best.doubt}" if best.doubt else ""
    return f"would be loaded on {report.node}{displaced}{doubt}"


def _facts(report: WhyReport) -> list[str]:
    facts = []
    if report.node is not None:
        facts.append(f"served by {report.node} as {report.model}")
    if report.error is not None:
        facts.append(f"error: {report.error}")
    waits = [
        f"{name} {value:g} ms"
        for name, value in (
            ("queue", report.queue_ms),
            ("load", report.load_ms or None),
            ("first token", report.ttft_ms),
            ("all", report.duration_ms),
        )
        if value is not None
    ]
    if waits:
        facts.append(", ".join(waits))
    if report.prompt_tokens:
        facts.append(
            f"{report.prompt_tokens} prompt tokens, {report.cached_tokens} of them cached; "
            f"{report.completion_tokens} answered"
        )
    if report.retries:
        facts.append(f"tried {report.retries + 1} times")
    return facts


def _step(step: StepReport) -> str:
    if step.action == "refuse":
        return f"refused: {step.outcome}"
    outcome = f" -> {step.outcome}" if step.outcome else ""
    waited = f" after {step.waited_ms:g} ms" if step.waited_ms is not None else ""
    if step.action == "load":
        how = "joined the load" if step.load == "joined" else "began the load"
        return f"{how} of {step.model} on {step.node}{outcome}{waited}"
    further = f" (a further replica is loaded on {step.further})" if step.further else ""
    return f"sent to {step.node}{further}{outcome}{waited}"


def _print_options(out: Console, options: Sequence[OptionReport]) -> None:
    if not options:
        return
    parts = ("queue", "prefill", "others", "load", "victims")
    columns = ("node", "model", "state", "cost s", *parts, "notes")
    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, no_wrap=number == 0, overflow="fold")
    for each in options:
        cost = each.cost
        figures = [cost.total_s, cost.queue_s, cost.prefill_s]
        figures += [cost.others_s, cost.load_s, cost.victims_s]
        cells = (
            each.node,
            each.model,
            each.status or "not listed",
            *(f"{value:.3f}" for value in figures),
            _notes(each),
        )
        # Names come from other machines and are not markup.
        table.add_row(*(Text(cell) for cell in cells))
    out.print(table)


def _notes(option: OptionReport) -> str:
    notes = []
    if option.cached_tokens:
        notes.append(f"{option.cached_tokens} tokens cached")
    if option.victims:
        notes.append(f"displaces {', '.join(option.victims)}")
    if option.doubt:
        notes.append(option.doubt)
    return "; ".join(notes)


def _print_rejected(out: Console, rejected: Sequence[RejectionReport]) -> None:
    for each in rejected:
        out.print(f"  not {each.node} for {each.model}: {each.reason}", markup=False)
