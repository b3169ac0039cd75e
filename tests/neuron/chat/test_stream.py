"""Token events to chunks and completions."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex.core.errors import BadRequestError, EngineDiedError
from cortex.core.openai import read_usage_comment
from cortex.neuron.chat.model import ChatModel
from cortex.neuron.chat.prepare import Prepared, prepare
from cortex.neuron.chat.stream import ChatCollector, ChatStream
from cortex.neuron.engine.protocol import FinishReason, Logprob, TokenEvent
from tests.support.chat_models import END_ID, PROPERTY, WEATHER, chat_request, make_chat_model

NO_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}
CALL = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n"
    "</function>\n</tool_call>"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    return make_chat_model(tmp_path_factory.mktemp("model"))


def events(
    prepared: Prepared, text: str, *, finish: FinishReason | None = "stop", size: int = 1
) -> list[TokenEvent]:
    """The tokens of a text as an engine would send them, with the end token if it stopped."""
    ids = prepared.tokenizer.encode(text) + ([END_ID] if finish == "stop" else [])
    cuts = [ids[at : at + size] for at in range(0, len(ids), size)] or [[]]
    return [
        TokenEvent(request_id=1, token_ids=cut, finish=finish if at == len(cuts) - 1 else None)
        for at, cut in enumerate(cuts)
    ]


def chunks(data: bytes) -> list[Any]:
    """Parse server-sent events and check their framing; comments are left out."""
    frames = data.split(b"\n\n")
    assert frames.pop() == b""
    frames = [frame for frame in frames if not frame.startswith(b": ")]
    assert all(frame.startswith(b"data: ") for frame in frames)
    return [json.loads(frame[6:]) for frame in frames]


def make_stream(prepared: Prepared) -> ChatStream:
    return ChatStream(prepared, completion_id="chatcmpl-1", created=1700000000, model="m")


def make_collector(prepared: Prepared) -> ChatCollector:
    return ChatCollector(prepared, completion_id="chatcmpl-1", created=1700000000, model="m")


def run_stream(prepared: Prepared, sent: list[TokenEvent]) -> list[Any]:
    stream = make_stream(prepared)
    data = stream.start() + b"".join(stream.feed(0, event) for event in sent)
    assert stream.is_complete
    return chunks(data + stream.end())


def run_collector(prepared: Prepared, sent: list[TokenEvent]) -> Any:
    collector = make_collector(prepared)
    for event in sent:
        collector.feed(0, event)
    assert collector.is_complete
    return collector.completion()


def deltas(sent: list[Any]) -> list[Any]:
    return [chunk["choices"][0]["delta"] for chunk in sent if chunk["choices"]]


def text_of(sent: list[Any], field: str = "content") -> str:
    return "".join(delta.get(field, "") for delta in deltas(sent))


def test_a_stream_is_role_then_text_then_finish(model: ChatModel) -> None:
    prepared = prepare(chat_request(**NO_THINKING), model)
    sent = run_stream(prepared, events(prepared, "the sky", size=99))
    assert sent == [
        {
            "id": "chatcmpl-1",
            "object": "chat.completion.chunk",
            "created": 1700000000,
            "model": "m",
            "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
        }
        for delta, finish in [
            ({"role": "assistant", "content": ""}, None),
            ({"content": "the sky"}, None),
            ({}, "stop"),
        ]
    ]


def test_a_comment_tells_the_gateway_the_usage_at_both_ends(model: ChatModel) -> None:
    prepared = prepare(chat_request(stream=True, **NO_THINKING), model)
    stream = make_stream(prepared)
    sent = stream.start()
    told = read_usage_comment(sent.split(b"\n\n")[0])
    assert told is not None
    assert (told.prompt_tokens, told.completion_tokens) == (len(prepared.prompt_ids), 0)
    for event in events(prepared, "Hi"):
        stream.feed(0, event)
    told = read_usage_comment(stream.end().strip())
    assert told == stream.usage()


def test_usage_comes_last_and_only_if_asked_for(model: ChatModel) -> None:
    request = chat_request(stream=True, stream_options={"include_usage": True}, **NO_THINKING)
    prepared = prepare(request, model)
    sent = events(prepared, "the sky")
    sent[0] = TokenEvent(request_id=1, token_ids=sent[0].token_ids, cached_tokens=16)
    last = run_stream(prepared, sent)[-1]
    num_prompt, num_completion = len(prepared.prompt_ids), len(sent)
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "prompt_tokens_details": {"cached_tokens": 16},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def test_reasoning_comes_in_its_own_field_and_is_counted(model: ChatModel) -> None:
    request = chat_request(stream=True, stream_options={"include_usage": True})
    prepared = prepare(request, model)
    sent = run_stream(prepared, events(prepared, "blue\n</think>\n\nthe sky"))
    assert text_of(sent, "reasoning_content") == "blue"
    assert text_of(sent) == "the sky"
    num_reasoning = len(prepared.tokenizer.encode("blue\n</think>"))
    details = sent[-1]["usage"]["completion_tokens_details"]
    assert details == {"reasoning_tokens": num_reasoning}


def calls_in(sent: list[Any]) -> list[Any]:
    """Every piece of a tool call, in order."""
    return [call for delta in deltas(sent) for call in delta.get("tool_calls", ())]


def test_a_tool_call_is_told_as_it_is_generated(model: ChatModel) -> None:
    prepared = prepare(chat_request(tools=[WEATHER], **NO_THINKING), model)
    sent = run_stream(prepared, events(prepared, "Sure.\n\n" + CALL))
    assert text_of(sent) == "Sure."
    first, *others = calls_in(sent)
    assert first.pop("id").startswith("call_")
    assert first["type"] == "function"
    assert first["function"]["name"] == "weather"
    assert len(others) > 2
    assert all(set(each) == {"index", "function"} for each in others)
    pieces = [each["function"]["arguments"] for each in (first, *others)]
    assert "".join(pieces) == '{"city":"Rome"}'
    assert sent[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_an_unconstrained_tool_call_is_one_whole_delta(model: ChatModel) -> None:
    free = replace(model, constrain_tools=False)
    prepared = prepare(chat_request(tools=[WEATHER], **NO_THINKING), free)
    assert prepared.constraint is None
    sent = run_stream(prepared, events(prepared, "Sure.\n\n" + CALL))
    [call] = calls_in(sent)
    assert call.pop("id").startswith("call_")
    assert call == {
        "index": 0,
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city":"Rome"}'},
    }


def test_a_call_that_only_looks_like_one_is_not_told_before_its_end(model: ChatModel) -> None:
    prepared = prepare(chat_request(tools=[WEATHER], **NO_THINKING), model)
    tokenizer = prepared.tokenizer
    spelled = [at for each in "<tool_call>" for at in tokenizer.encode(each)]
    ids = [*spelled, *tokenizer.encode("\n<function=weather>\n<parameter=city>\nRo")]
    sent = [TokenEvent(request_id=1, token_ids=[at]) for at in ids]
    end = TokenEvent(request_id=1, token_ids=[END_ID], finish="stop")
    told = run_stream(prepared, [*sent, end])
    assert calls_in(told) == []
    assert text_of(told) == "<tool_call>\n<function=weather>\n<parameter=city>\nRo"


def test_a_streamed_call_cut_at_the_limit_stays_incomplete(model: ChatModel) -> None:
    prepared = prepare(chat_request(tools=[WEATHER], **NO_THINKING), model)
    begun = CALL[: CALL.index("Rome") + 3]
    sent = run_stream(prepared, events(prepared, begun, finish="length"))
    pieces = [each["function"]["arguments"] for each in calls_in(sent)]
    assert "".join(pieces) == '{"city":"Rom'
    assert text_of(sent) == ""
    assert sent[-1]["choices"][0]["finish_reason"] == "length"


def test_an_answer_at_its_limit_ends_with_length(model: ChatModel) -> None:
    prepared = prepare(chat_request(**NO_THINKING), model)
    sent = run_stream(prepared, events(prepared, "the sky", finish="length"))
    assert text_of(sent) == "the sky"
    assert sent[-1]["choices"][0]["finish_reason"] == "length"


def test_a_call_cut_at_the_limit_is_text_and_not_a_call(model: ChatModel) -> None:
    prepared = prepare(chat_request(tools=[WEATHER], **NO_THINKING), model)
    completion = run_collector(prepared, events(prepared, CALL[:60], finish="length"))
    assert completion.choices[0].message.tool_calls is None
    assert completion.choices[0].message.content == CALL[:60]
    assert completion.choices[0].finish_reason == "length"


def test_the_end_token_is_counted_and_never_shown(model: ChatModel) -> None:
    prepared = prepare(chat_request(**NO_THINKING), model)
    completion = run_collector(
        prepared, [TokenEvent(request_id=1, token_ids=[END_ID], finish="stop")]
    )
    assert completion.choices[0].message.content == ""
    assert completion.usage.completion_tokens == 1


def test_a_stop_string_finishes_before_the_engine_does(model: ChatModel) -> None:
    prepared = prepare(chat_request(stop="blue", **NO_THINKING), model)
    stream = make_stream(prepared)
    sent = events(prepared, "the sky is blue and", finish=None)
    data, used = b"", 0
    for event in sent:
        data += stream.feed(0, event)
        used += 1
        if stream.is_finished(0):
            break
    assert used < len(sent)
    last = chunks(data)[-1]["choices"][0]
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", "blue")
    assert text_of(chunks(data)) == "the sky is "
    assert stream.feed(0, TokenEvent(request_id=1, token_ids=[], finish="cancelled")) == b""
    assert stream.usage().completion_tokens == used


def test_a_single_call_finishes_before_the_engine_does(model: ChatModel) -> None:
    request = chat_request(tools=[WEATHER], parallel_tool_calls=False, **NO_THINKING)
    prepared = prepare(request, model)
    collector = make_collector(prepared)
    for event in events(prepared, CALL + CALL, finish=None):
        collector.feed(0, event)
    choice = collector.completion().choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert len(choice.message.tool_calls or []) == 1


def test_a_completion_holds_the_same_as_the_stream(model: ChatModel) -> None:
    prepared = prepare(chat_request(tools=[WEATHER]), model)
    completion = run_collector(prepared, events(prepared, "blue</think>the sky\n" + CALL))
    message = completion.choices[0].message
    assert message.reasoning_content == "blue"
    assert message.content == "the sky"
    assert [(c.function.name, c.function.arguments) for c in message.tool_calls] == [
        ("weather", '{"city":"Rome"}')
    ]
    assert completion.choices[0].finish_reason == "tool_calls"
    assert (completion.id, completion.created, completion.model) == ("chatcmpl-1", 1700000000, "m")


def test_choices_are_told_apart_and_counted_together(model: ChatModel) -> None:
    prepared = prepare(chat_request(n=2, **NO_THINKING), model)
    stream = make_stream(prepared)
    roles = chunks(stream.start())
    assert [chunk["choices"][0]["index"] for chunk in roles] == [0, 1]
    first, second = events(prepared, "sky", size=99), events(prepared, "blue", size=99)
    one = chunks(stream.feed(1, second[0]))
    assert one[0]["choices"][0] == {"index": 1, "delta": {"content": "blue"}, "finish_reason": None}
    assert stream.is_finished(1)
    assert not stream.is_complete
    stream.feed(0, first[0])
    assert stream.is_complete
    total = len(first[0].token_ids) + len(second[0].token_ids)
    assert stream.usage().completion_tokens == total
    assert stream.usage().prompt_tokens == len(prepared.prompt_ids)


def test_an_answer_that_the_engine_refuses_is_the_requests_fault(model: ChatModel) -> None:
    stream = make_stream(prepare(chat_request(**NO_THINKING), model))
    refused = TokenEvent(request_id=1, finish="error", error="no such luck", is_refusal=True)
    with pytest.raises(BadRequestError, match="no such luck") as caught:
        stream.feed(0, refused)
    assert caught.value.param is None


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [WEATHER], "tool_choice": "required"}, "tools"),
    ],
)
def test_a_grammar_that_cannot_be_followed_names_the_field_it_came_from(
    model: ChatModel, asked: dict[str, Any], param: str
) -> None:
    stream = make_stream(prepare(chat_request(**NO_THINKING, **asked), model))
    refused = TokenEvent(
        request_id=1, finish="error", error="a dead end", is_refusal=True, code="invalid_grammar"
    )
    with pytest.raises(BadRequestError, match=f"a dead end; change {param}") as caught:
        stream.feed(0, refused)
    assert caught.value.param == param


@pytest.mark.parametrize("finish", ["error", "cancelled"])
def test_a_failing_engine_raises_and_finishes_nothing(
    model: ChatModel, finish: FinishReason
) -> None:
    prepared = prepare(chat_request(**NO_THINKING), model)
    stream = make_stream(prepared)
    stream.feed(0, events(prepared, "the", finish=None)[0])
    with pytest.raises(EngineDiedError, match="out of memory"):
        stream.feed(0, TokenEvent(request_id=1, finish=finish, error="out of memory"))
    assert not stream.is_complete


def logprob_events(prepared: Prepared, text: str) -> list[TokenEvent]:
    ids = [*prepared.tokenizer.encode(text), END_ID]
    return [
        TokenEvent(
            request_id=1,
            token_ids=[at],
            logprobs=[Logprob(token_id=at, logprob=-0.5, top=[(at, -0.5), (300, float("-inf"))])],
            finish="stop" if at == END_ID else None,
        )
        for at in ids
    ]


def test_logprobs_cover_the_content_s_tokens(model: ChatModel) -> None:
    request = chat_request(logprobs=True, top_logprobs=2, **NO_THINKING)
    prepared = prepare(request, model)
    completion = run_collector(prepared, logprob_events(prepared, "é"))
    content = completion.choices[0].logprobs.content
    assert [(entry.token, entry.bytes) for entry in content] == [
        ("\ufffd", [195]),
        ("\ufffd", [169]),
    ]
    assert content[0].logprob == -0.5
    assert [top.logprob for top in content[0].top_logprobs] == [-0.5, -9999.0]


def test_logprobs_leave_out_the_reasoning(model: ChatModel) -> None:
    prepared = prepare(chat_request(logprobs=True), model)
    sent = run_stream(prepared, logprob_events(prepared, "blue</think>sky"))
    tokens = [
        entry["token"]
        for chunk in sent
        for entry in (chunk["choices"][0].get("logprobs") or {"content": []})["content"]
    ]
    assert "".join(tokens) == "sky"


def test_every_logprob_is_streamed_even_when_its_text_waits(model: ChatModel) -> None:
    prepared = prepare(chat_request(logprobs=True, **NO_THINKING), model)
    sent = run_stream(prepared, logprob_events(prepared, "aé"))
    counts = [
        len(chunk["choices"][0]["logprobs"]["content"])
        for chunk in sent
        if "logprobs" in chunk["choices"][0]
    ]
    assert counts == [1, 1, 1]
    assert text_of(sent) == "aé"


PIECES = ["<think>", "</think>", CALL, "<tool_call>", "</tool_call>", "\n", " ", "sky", "é🎉", "ST"]


@PROPERTY
@given(
    st.lists(st.sampled_from(PIECES), max_size=8).map("".join),
    st.booleans(),
    st.sampled_from(["stop", "length"]),
    st.integers(1, 9),
)
def test_the_grouping_of_tokens_does_not_matter(
    model: ChatModel, text: str, thinks: bool, finish: FinishReason, size: int
) -> None:
    request = chat_request(
        tools=[WEATHER],
        stop=["STS", "\n\n\n"],
        stream_options={"include_usage": True},
        chat_template_kwargs={"enable_thinking": thinks},
    )
    prepared = prepare(request, model)
    one = run_collector(prepared, events(prepared, text, finish=finish))
    many = run_collector(prepared, events(prepared, text, finish=finish, size=size))
    streamed = run_stream(prepared, events(prepared, text, finish=finish, size=size))
    assert many.usage == one.usage
    assert many.choices[0].finish_reason == one.choices[0].finish_reason
    assert many.choices[0].message.content == one.choices[0].message.content
    assert text_of(streamed) == (one.choices[0].message.content or "")
    assert text_of(streamed, "reasoning_content") == (
        one.choices[0].message.reasoning_content or ""
    )
    assert streamed[-1]["usage"]["completion_tokens"] == one.usage.completion_tokens
