"""Requests drawn from the OpenAPI document that a gateway serves: none may end in a fault of ours.

By hand, against a running `cortex up` (or any gateway that has the model):

    python -m tests.fuzz.api http://127.0.0.1:31313 --examples 2000 --model cortex-tiny
"""

import argparse
import random
from typing import Any

import msgspec
import requests
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case
from schemathesis.generation import GenerationMode
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from cortex.core.sse import SseSplitter

MODES = {"valid": GenerationMode.POSITIVE, "invalid": GenerationMode.NEGATIVE}
CHECKS = [content_type_conformance, response_schema_conformance, status_code_conformance]
TIMEOUT_S = 60
# Answers are kept short: it is the way in that is tried.
MAX_TOKENS = 2
_ENDS = (
    b"message_stop",
    b"response.completed",
    b"response.incomplete",
    b"response.failed",
)
_BOUNDS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


def operations(url: str) -> list[APIOperation]:
    """Return what the gateway at a URL says that it can do."""
    document = msgspec.json.decode(requests.get(f"{url}/openapi.json", timeout=TIMEOUT_S).content)
    found = schemathesis.openapi.from_dict(document).get_all_operations()
    return [each.ok() for each in found]


def fuzz(operation: APIOperation, url: str, *, mode: str, model: str, examples: int, at: int = 0):
    """Send requests of one operation; raises at the smallest one that is answered with a fault.

    Args:
        mode: `valid` by the document, or `invalid`.
        at: where the random numbers begin.
    """
    sent = 0

    @seed(at)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=MODES[mode]))
    def each(case: Case) -> None:
        nonlocal sent
        sent += 1
        case.body = shaped(case.body, model)
        response = case.call(base_url=url, timeout=TIMEOUT_S)
        said = f"{response.status_code}: {response.text[:500]} to {case.query} {case.body!r}"
        assert response.status_code < 500, said
        if response.headers.get("content-type", [""])[0].startswith("text/event-stream"):
            check_stream(response.content)
        else:
            case.validate_response(response, checks=CHECKS)

    try:
        each()
    except Unsatisfiable:
        # What takes no body and no parameter cannot be asked wrongly.
        assert not sent
    return sent


def shaped(body: Any, model: str) -> Any:
    """Return a body that asks for a model that is there, and for little of it."""
    if not isinstance(body, dict):
        return body
    body = dict(body)
    if isinstance(body.get("model"), str):
        body["model"] = model
    for bound in _BOUNDS:
        asked = body.get(bound)
        if isinstance(asked, int) and not isinstance(asked, bool) and asked > 0:
            body[bound] = min(asked, MAX_TOKENS)
    if "messages" in body:
        body.setdefault("max_tokens", MAX_TOKENS)
    if "input" in body:
        body.setdefault("max_output_tokens", MAX_TOKENS)
    return body


def check_stream(stream: bytes) -> None:
    """Fail unless a stream came to its end in its dialect's way, without an internal error."""
    splitter = SseSplitter()
    events = [event for event in splitter.feed(stream) if not event.is_comment]
    assert not splitter.has_rest
    last = events[-1]
    is_error = last.name == b"error" or b'"error"' in last.data[:10]
    is_end = last.data == b"[DONE]" or last.name in _ENDS
    assert is_error or is_end, last
    assert b"internal error" not in last.data


def main() -> None:
    """Fuzz every operation of a gateway with numbers of its own, and tell how it went."""
    arguments = argparse.ArgumentParser(description=main.__doc__)
    arguments.add_argument("url")
    arguments.add_argument("--examples", type=int, default=500)
    arguments.add_argument("--model", default="cortex-tiny")
    arguments.add_argument("--seed", type=int, default=random.getrandbits(32))
    asked = arguments.parse_args()
    print(f"seed {asked.seed}")
    for operation in operations(asked.url):
        for mode in MODES:
            sent = fuzz(
                operation,
                asked.url,
                mode=mode,
                model=asked.model,
                examples=asked.examples,
                at=asked.seed,
            )
            print(f"{operation.method.upper()} {operation.path}: {sent} {mode} requests, no fault")


if __name__ == "__main__":
    main()
