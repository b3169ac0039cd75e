"""`GET /v1/usage`: what the caller's key may still spend, and what it has spent here."""

from collections.abc import Iterable
from typing import Literal

import msgspec

from cortex.gateway.auth import Caller
from cortex.gateway.windows import Standing


class LimitUsage(msgspec.Struct, kw_only=True, frozen=True):
    """One limit of the key; a budget without a window does not come back."""

    name: str
    unit: Literal["requests", "tokens"]
    limit: int
    used: int
    remaining: int
    window_s: int | None = None
    reset_s: float | None = None


class ModelUsage(msgspec.Struct, kw_only=True):
    """What the key has spent on one model since this gateway started."""

    model: str
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class UsageReport(msgspec.Struct, kw_only=True, frozen=True):
    """The answer: limits as all gateways count them, models as this one does."""

    account_id: str
    key_id: str
    limits: list[LimitUsage]
    models: list[ModelUsage]


def usage_report(
    caller: Caller, standings: Iterable[Standing], models: Iterable[ModelUsage]
) -> UsageReport:
    """Put a key's usage together."""
    return UsageReport(
        account_id=caller.account_id,
        key_id=caller.key_id,
        limits=[_limit(each) for each in standings],
        models=sorted(models, key=lambda each: each.model),
    )


def _limit(standing: Standing) -> LimitUsage:
    rule = standing.rule
    return LimitUsage(
        name=rule.name,
        unit=rule.unit,
        limit=rule.amount,
        used=standing.used,
        remaining=standing.remaining,
        window_s=rule.window_s,
        reset_s=None if rule.window_s is None else round(standing.reset_s, 1),
    )
