"""Text completions: prompts to what the engine needs, token events to the reply."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from cortex.core.completions import CompletionRequest
from cortex.core.errors import BadRequestError, ContextLengthExceededError
from cortex.core.openai import StreamOptions
from cortex.neuron.chat.completion import (
    CompletionCollector,
    CompletionStream,
    PreparedTexts,
    prepare_texts,
)
from cortex.neuron.chat.model import ChatModel
from cortex.neuron.chat.tokenizer import ChatTokenizer
from cortex.neuron.engine.protocol import Logprob, TokenEvent
from tests.support.chat_models import END_ID, PROPERTY, make_chat_model, train_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    """A model without a chat template."""
    return make_chat_model(tmp_path_factory.mktemp("model"), template=None)


def request(prompt: Any = "the sky", **fields: Any) -> CompletionRequest:
    return CompletionRequest(model="m", prompt=prompt, **fields)


def events(model: ChatModel, text: str, logprob: float | None = None) -> list[TokenEvent]:
    """The tokens of a text and the end token, one event each."""
    ids = [*model.tokenizer.encode(text), END_ID]
    return [
        TokenEvent(
            request_id=1,
            token_ids=[at],
            finish="stop" if at == END_ID else None,
            logprobs=None
            if logprob is None
            else [Logprob(token_id=at, logprob=logprob, top=[(at, logprob), (300, -9.0)])],
        )
        for at in ids
    ]


def collected(prepared: PreparedTexts, *answers: list[TokenEvent]) -> Any:
    collector = CompletionCollector(prepared, completion_id="cmpl-1", created=17, model="m")
    for at, answer in enumerate(answers):
        for event in answer:
            collector.feed(at, event)
    assert collector.is_complete
    return collector.completion()


def streamed(prepared: PreparedTexts, *answers: list[TokenEvent]) -> list[Any]:
    stream = CompletionStream(prepared, completion_id="cmpl-1", created=17, model="m")
    data = stream.start()
    for at, answer in enumerate(answers):
        data += b"".join(stream.feed(at, event) for event in answer)
    frames = (data + stream.end()).split(b"\n\n")
    return [json.loads(each[6:]) for each in frames if each.startswith(b"data: ")]


def text_of(chunks: list[Any], index: int = 0) -> str:
    choices = [each["choices"][0] for each in chunks if each["choices"]]
    return "".join(each["text"] for each in choices if each["index"] == index)


def test_a_text_goes_to_the_engine_as_it_is_with_sixteen_tokens_by_default(
    model: ChatModel,
) -> None:
    prepared = prepare_texts(request("the <think>sky"), model)
    submit = prepared.submit(3)
    assert submit.prompt_ids == model.tokenizer.encode("the <think>sky")
    assert submit.max_tokens == 16
    assert submit.stop_ids == [0, 2]
    assert submit.constraint is None
    assert submit.sampling.num_logprobs is None


def test_every_prompt_has_its_own_choices_in_the_order_of_the_prompts(model: ChatModel) -> None:
    prepared = prepare_texts(request([[50, 51], [60]], n=2, seed=5), model)
    submits = [prepared.submit(0, at) for at in range(prepared.num_choices)]
    assert [each.prompt_ids for each in submits] == [[50, 51], [50, 51], [60], [60]]
    assert [each.sampling.seed for each in submits] == [5, 6, 5, 6]
    reply = collected(prepared, *[events(model, text) for text in "abcd"])
    assert [(each.index, each.text) for each in reply.choices] == [
        (0, "a"),
        (1, "b"),
        (2, "c"),
        (3, "d"),
    ]
    assert reply.usage.prompt_tokens == 3
    assert reply.usage.completion_tokens == 8


def test_a_texts_begin_token_is_added_once(tmp_path: Path, model: ChatModel) -> None:
    raw = train_tokenizer()
    raw.post_processor = processors.TemplateProcessing(
        single=["<|endoftext|>", "$A"], special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer = ChatTokenizer(raw, path=str(tmp_path), bos_token="<|endoftext|>")
    begins = replace(model, tokenizer=tokenizer)
    plain = tokenizer.encode("sky")
    for prompt in ("sky", "<|endoftext|>sky"):
        assert prepare_texts(request(prompt), begins).submit(0).prompt_ids == [0, *plain]
    assert prepare_texts(request(plain), begins).submit(0).prompt_ids == plain


@pytest.mark.parametrize(
    ("prompt", "words"),
    [("", "empty"), (["sky", ""], "empty"), ([5, 100_000], "token 100000"), ([-1], "token -1")],
)
def test_prompts_that_no_model_can_read_are_refused(
    model: ChatModel, prompt: Any, words: str
) -> None:
    with pytest.raises(BadRequestError) as caught:
        prepare_texts(request(prompt), model)
    assert caught.value.param == "prompt"
    assert words in caught.value.message


def test_a_prompt_beyond_the_context_is_refused_and_a_long_answer_is_cut(
    tmp_path: Path,
) -> None:
    small = make_chat_model(tmp_path, template=None, max_model_len=8)
    assert prepare_texts(request([5] * 6, max_tokens=100), small).submit(0).max_tokens == 2
    for prompt in ([5] * 8, "x" * 1000):
        with pytest.raises(ContextLengthExceededError) as caught:
            prepare_texts(request(prompt), small)
        assert caught.value.param == "prompt"
        assert "8 tokens, but the prompt has" in caught.value.message


def test_a_stream_is_the_whole_reply_in_pieces(model: ChatModel) -> None:
    options = StreamOptions(include_usage=True)
    prepared = prepare_texts(request(stream=True, stream_options=options), model)
    answer = events(model, " is blue é🎉")
    chunks = streamed(prepared, answer)
    whole = collected(prepared, answer)
    assert text_of(chunks) == whole.choices[0].text == " is blue é🎉"
    assert {each["object"] for each in chunks} == {"text_completion"}
    assert {each["id"] for each in chunks} == {"cmpl-1"}
    assert chunks[0]["choices"] == [
        {"index": 0, "text": "", "logprobs": None, "finish_reason": None}
    ]
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == whole.usage.total_tokens


def test_a_stream_tells_usage_only_to_who_asks(model: ChatModel) -> None:
    chunks = streamed(prepare_texts(request(stream=True), model), events(model, "a"))
    assert all(each["choices"] and "usage" not in each for each in chunks)


def test_echo_repeats_the_prompt_as_text_also_where_it_came_as_ids(model: ChatModel) -> None:
    ids = [1, *model.tokenizer.encode("the sky")]
    prepared = prepare_texts(request([[*ids], model.tokenizer.encode("or")], echo=True), model)
    answers = [events(model, " is"), events(model, " not")]
    reply = collected(prepared, *answers)
    assert [each.text for each in reply.choices] == ["<|im_start|>the sky is", "or not"]
    chunks = streamed(prepared, *answers)
    assert [text_of(chunks, at) for at in (0, 1)] == ["<|im_start|>the sky is", "or not"]


def test_a_stop_text_ends_the_answer_before_it_and_is_named(model: ChatModel) -> None:
    prepared = prepare_texts(request(stop=["bl", "x"]), model)
    answer = events(model, " is blue")
    (choice,) = collected(prepared, answer).choices
    assert (choice.text, choice.finish_reason, choice.stop_reason) == (" is ", "stop", "bl")
    chunks = streamed(prepared, answer)
    last = chunks[-1]["choices"][0]
    assert text_of(chunks) == " is "
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", "bl")


PIECES = ["a", "b", "é", "🎉", " ", "<think>", "STOP", "ST"]


@PROPERTY
@given(
    text=st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
    size=st.integers(1, 5),
    stops=st.sampled_from([None, "STOP", ["STOP", "🎉"]]),
    is_cut=st.booleans(),
)
def test_however_tokens_come_a_stream_adds_up_to_the_whole_reply(
    model: ChatModel, text: str, size: int, stops: Any, is_cut: bool
) -> None:
    prepared = prepare_texts(request(stop=stops), model)
    ids = model.tokenizer.encode(text) + ([] if is_cut else [END_ID])
    cuts = [ids[at : at + size] for at in range(0, len(ids), size)] or [[]]
    finish = "length" if is_cut else "stop"
    sent = [TokenEvent(request_id=1, token_ids=each) for each in cuts[:-1]]
    sent.append(TokenEvent(request_id=1, token_ids=cuts[-1], finish=finish))
    (choice,) = collected(prepared, sent).choices
    chunks = streamed(prepared, sent)
    assert text_of(chunks) == choice.text
    reasons = [each["choices"][0]["finish_reason"] for each in chunks]
    assert [each for each in reasons if each] == [choice.finish_reason]
    wanted = [stops] if isinstance(stops, str) else stops or []
    assert not any(stop in choice.text for stop in wanted)
    assert text.startswith(choice.text)
    assert choice.stop_reason is not None or choice.text == text


def test_thoughts_and_calls_are_text_like_any_other(model: ChatModel) -> None:
    answer = events(model, "<think>so</think><tool_call>x</tool_call>")
    reply = collected(prepare_texts(request(), model), answer)
    assert reply.choices[0].text == "<think>so</think><tool_call>x</tool_call>"


def test_logprobs_name_every_token_and_where_it_stands(model: ChatModel) -> None:
    prepared = prepare_texts(request(logprobs=2), model)
    assert prepared.submit(0).sampling.num_logprobs == 2
    answer = events(model, "aé🎉b", logprob=-0.5)
    told = collected(prepared, answer).choices[0].logprobs
    assert told.tokens[:3] == ["a", "bytes:\\xc3", "bytes:\\xa9"]
    assert told.tokens[-1] == "b"
    assert told.text_offset[:3] == [0, 1, 1]
    assert told.text_offset[-1] == 3
    assert set(told.token_logprobs) == {-0.5}
    assert told.top_logprobs[0]["a"] == -0.5
    assert len(told.top_logprobs[0]) == 2
    pieces = [each["choices"][0]["logprobs"] for each in streamed(prepared, answer)]
    assert [token for each in pieces if each for token in each["tokens"]] == told.tokens
    assert [at for each in pieces if each for at in each["text_offset"]] == told.text_offset


def test_logprobs_of_zero_tell_the_token_alone(model: ChatModel) -> None:
    prepared = prepare_texts(request(logprobs=0), model)
    assert prepared.submit(0).sampling.num_logprobs == 0
    at = model.tokenizer.encode("a")[0]
    event = TokenEvent(
        request_id=1, token_ids=[at], finish="length", logprobs=[Logprob(token_id=at, logprob=-1.0)]
    )
    (choice,) = collected(prepared, [event]).choices
    assert choice.finish_reason == "length"
    assert choice.logprobs.top_logprobs == [{"a": -1.0}]


def test_best_of_returns_the_likeliest_first_and_counts_all(model: ChatModel) -> None:
    prepared = prepare_texts(request("sky", n=2, best_of=3), model)
    assert prepared.num_choices == 3
    assert prepared.submit(0).sampling.num_logprobs == 0
    reply = collected(
        prepared,
        events(model, "a", logprob=-2.0),
        events(model, "b", logprob=-3.0),
        events(model, "cc", logprob=-1.5),
    )
    assert [(each.index, each.text, each.logprobs) for each in reply.choices] == [
        (0, "cc", None),
        (1, "a", None),
    ]
    assert reply.usage.completion_tokens == 7
