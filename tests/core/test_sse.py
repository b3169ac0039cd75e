import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex.core.errors import UpstreamMalformedError
from cortex.core.sse import MAX_EVENT_BYTES, SseEvent, SseSplitter

STREAM = b': hello\n\nevent: ping\ndata: {"a": 1}\n\ndata: one\ndata: two\n\ndata:x\n\nid: 4\n\n'
EVENTS = [
    SseEvent(b"", b": hello", is_comment=True),
    SseEvent(b"ping", b'{"a": 1}'),
    SseEvent(b"", b"one\ntwo"),
    SseEvent(b"", b"x"),
]


@given(
    cuts=st.lists(st.integers(0, len(STREAM) * 2)),
    ending=st.sampled_from([b"\n", b"\r\n", b"\r"]),
)
def test_events_are_the_same_however_the_stream_is_cut_and_its_lines_end(
    cuts: list[int], ending: bytes
):
    stream = STREAM.replace(b"\n", ending)
    edges = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    splitter = SseSplitter()
    found = []
    for start, stop in itertools.pairwise(edges):
        found += splitter.feed(stream[start:stop])
    assert found == EVENTS
    assert not splitter.has_rest


def test_an_event_that_has_not_ended_waits():
    splitter = SseSplitter()
    assert splitter.feed(b"data: half") == []
    assert splitter.has_rest
    assert splitter.feed(b" done\n\n") == [SseEvent(b"", b"half done")]


def test_line_ends_may_be_mixed_and_a_carriage_return_may_end_a_chunk():
    splitter = SseSplitter()
    assert splitter.feed(b"data: a\r") == []
    assert splitter.feed(b"\n") == []
    assert splitter.feed(b"") == []
    assert splitter.feed(b"\n") == [SseEvent(b"", b"a")]
    assert splitter.feed(b"data: b\r\r") == [SseEvent(b"", b"b")]
    assert splitter.feed(b"\ndata: c\n\n") == [SseEvent(b"", b"c")]


def test_a_name_and_several_data_lines_belong_to_one_event():
    assert SseSplitter().feed(b"event: error\ndata: {\ndata: }\n\n") == [
        SseEvent(b"error", b"{\n}")
    ]


def test_an_event_in_single_bytes_comes_out_whole():
    splitter = SseSplitter()
    found = [
        each
        for byte in b"data: \n\ndata\n\n:c\ndata: x\n\n"
        for each in splitter.feed(bytes([byte]))
    ]
    assert found == [SseEvent(b"", b""), SseEvent(b"", b""), SseEvent(b"", b"x")]


def test_an_endless_event_is_refused():
    with pytest.raises(UpstreamMalformedError):
        SseSplitter().feed(b"data: " + b"x" * MAX_EVENT_BYTES)
