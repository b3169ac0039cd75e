import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex.core.errors import UpstreamMalformedError
from cortex.core.sse import COMMENT, MAX_EVENT_BYTES, SseEvent, SseSplitter

STREAM = b': hello\n\nevent: ping\ndata: {"a": 1}\n\ndata: one\ndata: two\n\ndata:x\n\nid: 4\n\n'
EVENTS = [
    COMMENT,
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


def test_an_endless_event_is_refused():
    with pytest.raises(UpstreamMalformedError):
        SseSplitter().feed(b"data: " + b"x" * MAX_EVENT_BYTES)
