"""What would happen to a request for a model: the dry run behind `GET /plan` and `cortex plan`."""

import msgspec

from cortex.core.neuron_api import LoadRequest
from cortex.gateway.decisions import Action, OptionReport, RejectionReport, option_reports
from cortex.gateway.router import ColdLoad, Considered, Refuse, Route


class PlanReport(msgspec.Struct, kw_only=True, frozen=True):
    """`GET /plan?model=`.

    Attributes:
        models: what the name stands for, the preferred one first.
        options: what the choice would be made from, the chosen one first.
        placements: where the model could be loaded beside that, the cheapest first.
        load: what the chosen node would be asked; whom it displaces is in its option.
    """

    name: str
    models: list[str]
    action: Action
    model: str | None = None
    node: str | None = None
    error: str | None = None
    load: LoadRequest | None = None
    options: list[OptionReport] = []
    rejected: list[RejectionReport] = []
    placements: list[OptionReport] = []
    not_placed: list[RejectionReport] = []


def plan_report(
    name: str, models: tuple[str, ...], route: Route, further: Considered
) -> PlanReport:
    """Return a choice that was not acted on, in words.

    Args:
        further: where else the model could be loaded, where it is loaded already.
    """
    options, rejected = option_reports(route.considered)
    placements, not_placed = option_reports(further)
    if isinstance(route, Refuse):
        return PlanReport(
            name=name,
            models=list(models),
            action="refuse",
            error=route.error.message,
            rejected=rejected,
        )
    cold = route if isinstance(route, ColdLoad) else None
    return PlanReport(
        name=name,
        models=list(models),
        action="load" if cold is not None else "serve",
        model=route.model_id,
        node=options[0].node,
        load=cold.plans[0].request if cold is not None else None,
        options=options,
        rejected=rejected,
        placements=placements,
        not_placed=not_placed,
    )
