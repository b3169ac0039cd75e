import msgspec
import pytest

from cortex.core.errors import (
    BadRequestError,
    EngineDiedError,
    MissingModelError,
    RemoteError,
    UpstreamMalformedError,
)
from cortex.core.openai import Usage
from cortex.neuron.command.rewrite import StreamRewriter, answer, parse_head, upstream_request

TOLD = b'{"prompt_tokens":7,"completion_tokens":2,"total_tokens":9,"own":{"x":1}}'


def sent(body, name="its/own"):
    return msgspec.json.decode(upstream_request(body, parse_head(body), name))


def chunk(delta, finish="null", tail=b""):
    return (
        b'data: {"id":"c1","object":"chat.completion.chunk","created":1,"model":"its/own",'
        b'"choices":[{"index":0,"delta":%b,"finish_reason":%b}]%b}\n\n'
        % (delta, finish.encode(), tail)
    )


def rewritten(*pieces, include_usage=False):
    rewriter = StreamRewriter("org/m", include_usage=include_usage)
    return rewriter, b"".join([rewriter.feed(each) for each in pieces])


def test_only_the_name_changes_and_every_other_field_is_kept_as_it_was_written():
    body = b'{"model": "org/m", "seed": 1.0e2, "x": {"b": [null, 1]}, "messages": []}'
    request = upstream_request(body, parse_head(body), "its/own")
    assert request == (b'{"model":"its/own","seed":1.0e2,"x":{"b": [null, 1]},"messages":[]}')


def test_a_field_that_is_null_is_left_out_for_engines_that_do_not_know_it():
    assert sent(b'{"model":"m","top_k":null,"messages":[]}') == {"model": "its/own", "messages": []}


def test_a_stream_asks_for_usage_beside_what_the_caller_asks_for():
    body = b'{"model":"m","stream":true,"stream_options":{"continuous_usage_stats":true}}'
    assert sent(body)["stream_options"] == {"continuous_usage_stats": True, "include_usage": True}
    assert sent(b'{"model":"m","stream":true,"stream_options":null}')["stream_options"] == {
        "include_usage": True
    }


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b'{"messages": []}', MissingModelError),
        (b'{"model": "m", "stream": "yes"}', BadRequestError),
        (b'{"model": "m", "n": 0}', BadRequestError),
        (b"[]", BadRequestError),
    ],
)
def test_a_head_that_cannot_be_read_is_the_callers_fault(body, error):
    with pytest.raises(error):
        parse_head(body)


def test_a_whole_answer_gets_our_name_and_tells_its_usage():
    body = b'{"id":"c","model":"its/own","choices":[{"x":1}],"usage":' + TOLD + b"}"
    completion, usage = answer(body, "org/m")
    assert completion == b'{"id":"c","model":"org/m","choices":[{"x":1}],"usage":' + TOLD + b"}"
    assert usage == Usage(prompt_tokens=7, completion_tokens=2, total_tokens=9)


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'"x"'])
def test_an_answer_that_is_no_completion_is_the_engines_fault(body):
    with pytest.raises(UpstreamMalformedError, match="'org/m' answered something"):
        answer(body, "org/m")


def test_usage_that_cannot_be_read_counts_as_none():
    assert answer(b'{"choices":[],"usage":{"prompt_tokens":"many"}}', "m")[1] is None


def test_a_chunk_gets_our_name_and_keeps_fields_that_nobody_knows():
    _, out = rewritten(chunk(b'{"content":"a","own":[1]}', tail=b',"usage":null,"extra":{"y":2}'))
    assert out == (
        b'data: {"id":"c1","object":"chat.completion.chunk","created":1,"model":"org/m","choices":'
        b'[{"index":0,"delta":{"content":"a","own":[1]},"finish_reason":null}],"extra":{"y":2}}\n\n'
    )


def test_a_stream_may_be_cut_anywhere():
    stream = chunk(b'{"content":"a"}') + b": ping\r\n\r\n" + chunk(b"{}", '"stop"')
    _, whole = rewritten(stream)
    _, bytewise = rewritten(*(stream[at : at + 1] for at in range(len(stream))))
    assert bytewise == whole
    assert b"ping" not in whole


def test_the_first_token_is_told_apart_from_a_role_and_from_a_quotation():
    rewriter = StreamRewriter("m", include_usage=False)
    rewriter.feed(chunk(b'{"role":"assistant","content":""}'))
    assert not rewriter.has_content
    rewriter.feed(chunk(b'{"tool_calls":[{"index":0}]}'))
    assert rewriter.has_content


def test_usage_of_the_last_chunk_is_told_once_before_the_end():
    rewriter, out = rewritten(chunk(b"{}", '"stop"', b',"usage":' + TOLD), include_usage=True)
    assert b"usage" not in out
    comment, last, done, rest = rewriter.end().split(b"\n\n")
    assert comment.startswith(b': usage {"prompt_tokens":7,"completion_tokens":2')
    assert last == (
        b'data: {"id":"c1","object":"chat.completion.chunk","created":1,"model":"org/m","choices":'
        b'[],"usage":' + TOLD + b"}"
    )
    assert (done, rest) == (b"data: [DONE]", b"")


def test_running_usage_counts_as_it_was_told_last():
    first = b',"usage":{"prompt_tokens":7,"completion_tokens":1}'
    rewriter, _ = rewritten(
        chunk(b'{"content":"a"}', tail=first), chunk(b"{}", '"stop"', b',"usage":' + TOLD)
    )
    assert rewriter.usage is not None
    assert rewriter.usage.completion_tokens == 2


def test_usage_that_comes_with_the_first_chunk_is_told_once_before_it():
    first = b',"usage":{"prompt_tokens":7,"completion_tokens":1}'
    _, out = rewritten(chunk(b'{"content":"a"}', tail=first), chunk(b'{"content":"b"}', tail=first))
    assert out.startswith(b': usage {"prompt_tokens":7,"completion_tokens":1')
    assert out.count(b": usage") == 1


def test_an_engine_that_tells_no_usage_ends_without_any():
    rewriter, _ = rewritten(chunk(b"{}", '"stop"'), include_usage=True)
    assert rewriter.end() == b"data: [DONE]\n\n"


def test_a_stream_without_an_end_is_broken_off():
    text = b'{"content":"he said \\"finish_reason\\": \\"stop\\""}'
    rewriter, _ = rewritten(chunk(text))
    with pytest.raises(EngineDiedError):
        rewriter.end()


@pytest.mark.parametrize(
    "event",
    [
        b'{"error":{"message":"out of memory","code":500}}',
        b'{"error":"out of memory"}',
        b'{"object":"error","message":"out of memory"}',
    ],
)
def test_an_error_in_a_stream_is_raised_with_the_engines_words(event):
    with pytest.raises(RemoteError, match="says: out of memory") as caught:
        rewritten(b"data: " + event + b"\n\n")
    assert (caught.value.status, caught.value.code) == (502, "engine_error")


@pytest.mark.parametrize("event", [b"hello", b"[1]"])
def test_an_event_that_is_no_chunk_is_the_engines_fault(event):
    with pytest.raises(UpstreamMalformedError):
        rewritten(b"data: " + event + b"\n\n")
