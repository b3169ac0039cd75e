"""Requests drawn from `/openapi.json` against `cortex up`: a few here, many by tests/fuzz."""

import pytest

from cortex.gateway.openapi import OPERATIONS
from tests.fuzz.api import MODES, fuzz, operations
from tests.support.processes import Cortex

# Bodies with the schemas of a conversation take long to draw.
EXAMPLES = 25
EXAMPLES_OF_CONVERSATIONS = 10


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("asked", OPERATIONS, ids=lambda each: f"{each.method} {each.path}")
def test_no_request_that_the_document_allows_or_not_ends_in_a_fault(up: Cortex, asked, mode: str):
    (operation,) = [
        each
        for each in operations(up.url)
        if (each.method.upper(), each.path) == (asked.method, asked.path)
    ]
    is_long = asked.body is not None and "messages" in asked.body.__struct_fields__
    examples = EXAMPLES_OF_CONVERSATIONS if is_long else EXAMPLES
    sent = fuzz(operation, up.url, mode=mode, model="cortex-tiny", examples=examples)
    assert sent > 0 or mode == "invalid"
