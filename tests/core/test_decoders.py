"""Whatever bytes come, a decoder takes them or says what is wrong with them.

Many more rounds by hand: `python -m tests.fuzz.decoders`.
"""

from typing import Any

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.decoders import SEEDS, read_all, run

# Of the conversations, the text completion and their damaged copies, so many are still requests.
ROUNDS = 5000
MIN_TAKEN = 1000

NAMES = st.sampled_from(
    [
        *("model", "messages", "role", "content", "type", "text", "tools", "tool_choice"),
        *("source", "stream", "max_tokens", "system", "prompt", "n", "stop", "error"),
        *("choices", "usage", "x", "input", "dimensions"),
    ]
)
VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=8),
        st.sampled_from(["m", "user", "system", "tool", "text", "image", "document", "auto"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(NAMES, inner, max_size=5)),
    max_leaves=12,
)


def test_the_seeds_are_requests_that_are_taken():
    assert [read_all(seed) for seed in SEEDS[:3]] == [3, 2, 2]


def test_damaged_requests_and_answers_are_taken_or_refused_in_words():
    assert run(ROUNDS, at=20) > MIN_TAKEN


@settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.binary(max_size=200))
def test_any_bytes_are_taken_or_refused_in_words(data: bytes):
    read_all(data)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(value=VALUES, fields=st.dictionaries(NAMES, VALUES, max_size=6))
def test_any_json_is_taken_or_refused_in_words(value: Any, fields: dict[str, Any]):
    user = [{"role": "user", "content": "hi"}]
    body = {"model": "m", "messages": user, "max_tokens": 1, "prompt": "x", **fields}
    read_all(msgspec.json.encode(value))
    read_all(msgspec.json.encode(body))
