"""What was found, and how checks are run: side by side, each bounded in time."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

# `note`: as it may well be meant. `warn`: it serves, but badly or not all. `fail`: it does not.
Level = Literal["ok", "note", "warn", "fail"]

# A file system, a name server or the driver may not answer at all.
LIMIT_S = 15.0


class Finding(msgspec.Struct, kw_only=True, frozen=True):
    """One thing that was looked at.

    Attributes:
        check: what was looked at, in a word.
        remedy: what to do about it; None where there is nothing to do.
    """

    check: str
    level: Level
    message: str
    remedy: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Something to look at; `look` blocks, and may hang for ever.

    Attributes:
        if_it_hangs: the remedy then.
    """

    name: str
    look: Callable[[], Sequence[Finding]]
    limit_s: float
    if_it_hangs: str


def run_checks(checks: Sequence[Check]) -> list[Finding]:
    """Run checks side by side and return their findings in the order of the checks.

    What hangs (a driver, a file system, a name server) keeps its thread, which ends with the
    process.
    """
    found: dict[int, Sequence[Finding]] = {}

    def look(index: int, check: Check) -> None:
        found[index] = check.look()

    threads = [
        threading.Thread(target=look, args=(index, check), name=check.name, daemon=True)
        for index, check in enumerate(checks)
    ]
    began_s = time.monotonic()
    for thread in threads:
        thread.start()
    findings: list[Finding] = []
    for index, (check, thread) in enumerate(zip(checks, threads, strict=True)):
        thread.join(max(0.0, began_s + check.limit_s - time.monotonic()))
        findings += found[index] if index in found else [_unanswered(check, thread.is_alive())]
    return findings


def _unanswered(check: Check, is_hanging: bool) -> Finding:
    if is_hanging:
        message = f"no answer within {check.limit_s:g} s"
        return Finding(check=check.name, level="fail", message=message, remedy=check.if_it_hangs)
    # Its thread has printed the traceback.
    return Finding(
        check=check.name,
        level="fail",
        message="the check itself failed",
        remedy="report the traceback above as a fault of Cortex",
    )
