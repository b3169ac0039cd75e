"""Bad input gets one clear error in the caller's dialect, and nothing is lost by it."""

import io

import aiohttp
import pytest

from tests.support.processes import Cortex

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
MESSAGES = "/v1/messages"
OK = {"model": "cortex-tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}


async def post(up: Cortex, path: str, body: object) -> tuple[int, dict]:
    data = io.BytesIO(body) if isinstance(body, bytes) else None
    async with (
        aiohttp.ClientSession() as session,
        session.post(up.url + path, json=None if data is not None else body, data=data) as reply,
    ):
        return reply.status, await reply.json(content_type=None)


OPENAI_CASES = [
    (b"{not json", 400, "malformed_json", "JSON"),
    (b"", 400, "malformed_json", "empty"),
    (b"[1, 2]", 400, "invalid_request", "object"),
    ({"messages": OK["messages"]}, 400, "missing_model_field", "model"),
    ({**OK, "model": 5}, 400, "invalid_request", "model"),
    ({**OK, "model": "no-such-model"}, 404, "model_not_found", "no-such-model"),
    ({"model": "cortex-tiny"}, 400, "invalid_request", "messages"),
    ({**OK, "messages": []}, 400, "invalid_request", "messages"),
    ({**OK, "messages": "hi"}, 400, "invalid_request", "messages"),
    ({**OK, "messages": [{"role": "boss", "content": "hi"}]}, 400, "invalid_request", "role"),
    ({**OK, "temperature": "hot"}, 400, "invalid_request", "temperature"),
    ({**OK, "temperature": 9}, 400, "invalid_request", "temperature"),
    ({**OK, "max_tokens": 0}, 400, "invalid_request", "max_tokens"),
    ({**OK, "stop": 4}, 400, "invalid_request", "stop"),
    ({**OK, "tools": [{"type": "function"}]}, 400, "unsupported_field", "function"),
    (
        {
            **OK,
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "data:image/png;,x"}}],
                }
            ],
        },
        400,
        "unsupported_field",
        "image",
    ),
]


@pytest.mark.parametrize(("body", "status", "code", "word"), OPENAI_CASES)
async def test_the_openai_dialect_says_what_is_wrong(
    up: Cortex, body: object, status: int, code: str, word: str
):
    got, answer = await post(up, CHAT, body)
    assert got == status
    assert answer["error"]["code"] == code
    assert word in answer["error"]["message"] + str(answer["error"]["param"])
    assert answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [case[:3] for case in OPENAI_CASES if isinstance(case[0], dict)],
)
async def test_the_same_faults_on_a_stream_are_plain_http_errors(
    up: Cortex, body: dict, status: int, code: str
):
    got, answer = await post(up, CHAT, {**body, "stream": True})
    assert got == status
    assert answer["error"]["code"] == code


TEXT_CASES = [
    (b"{not json", 400, "malformed_json", "JSON"),
    ({"prompt": "hi"}, 400, "missing_model_field", "model"),
    ({"model": "no-such-model", "prompt": "hi"}, 404, "model_not_found", "no-such-model"),
    ({"model": "cortex-tiny"}, 400, "invalid_request", "prompt"),
    ({"model": "cortex-tiny", "prompt": {"text": "hi"}}, 400, "invalid_request", "prompt"),
    ({"model": "cortex-tiny", "prompt": ["a", 1]}, 400, "invalid_request", "prompt"),
    ({"model": "cortex-tiny", "prompt": [-1]}, 400, "invalid_request", "prompt"),
    ({"model": "cortex-tiny", "prompt": ""}, 400, "invalid_request", "prompt"),
    ({"model": "cortex-tiny", "prompt": "hi", "stop": 4}, 400, "invalid_request", "stop"),
    ({"model": "cortex-tiny", "prompt": "hi", "suffix": "x"}, 400, "unsupported_field", "suffix"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("body", "status", "code", "word"), TEXT_CASES)
async def test_text_completions_say_what_is_wrong(
    up: Cortex, body: object, status: int, code: str, word: str, stream: bool
):
    got, answer = await post(
        up, TEXT, {**body, "stream": stream} if isinstance(body, dict) else body
    )
    assert got == status
    assert answer["error"]["code"] == code
    assert word in answer["error"]["message"] + str(answer["error"]["param"])
    assert answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "status", "kind", "word"),
    [
        (b"{not json", 400, "invalid_request_error", "JSON"),
        ({"messages": OK["messages"], "max_tokens": 4}, 400, "invalid_request_error", "model"),
        ({**OK, "model": "no-such-model"}, 404, "not_found_error", "no-such-model"),
        ({**OK, "messages": []}, 400, "invalid_request_error", "messages"),
        (
            {"model": "cortex-tiny", "messages": OK["messages"]},
            400,
            "invalid_request_error",
            "max_",
        ),
        ({**OK, "max_tokens": "many"}, 400, "invalid_request_error", "max_tokens"),
        (
            {**OK, "messages": [{"role": "user", "content": "word " * 40_000}]},
            400,
            "invalid_request_error",
            "> 65536 maximum",
        ),
    ],
)
async def test_the_anthropic_dialect_says_what_is_wrong(
    up: Cortex, body: object, status: int, kind: str, word: str
):
    got, answer = await post(up, MESSAGES, body)
    assert got == status
    assert answer["type"] == "error"
    assert answer["error"]["type"] == kind
    assert word in answer["error"]["message"]


@pytest.mark.parametrize(("path", "key"), [(CHAT, "code"), (MESSAGES, "type")])
async def test_a_wrong_method_is_a_405_in_the_dialect(up: Cortex, path: str, key: str):
    async with aiohttp.ClientSession() as session, session.get(up.url + path) as reply:
        answer = await reply.json()
        assert reply.status == 405
    assert answer["error"][key] in ("method_not_allowed", "invalid_request_error")
    assert "POST" in answer["error"]["message"]


async def test_an_unknown_path_is_a_404_in_the_envelope(up: Cortex):
    async with aiohttp.ClientSession() as session, session.get(up.url + "/v2/chat") as reply:
        assert reply.status == 404
        assert (await reply.json())["error"]["code"] == "route_not_found"


async def test_an_oversized_body_is_a_413(up: Cortex):
    huge = b'{"model": "cortex-tiny", "messages": "' + b"x" * (65 << 20) + b'"}'
    status, answer = await post(up, CHAT, huge)
    assert status == 413
    assert answer["error"]["code"] == "body_too_large"


async def test_after_all_that_the_service_answers(up: Cortex):
    status, answer = await post(up, CHAT, OK)
    assert status == 200
    assert answer["choices"][0]["message"]["role"] == "assistant"
