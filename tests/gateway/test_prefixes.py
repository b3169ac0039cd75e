"""Hash chains of prompts and the index of who has seen them."""

import msgspec
import pytest

from cortex.gateway.prefixes import (
    MAX_FIRST_LINKS,
    MAX_HASHED_BYTES,
    MAX_LAST_LINKS,
    MAX_REPLICAS,
    Chain,
    Match,
    PrefixIndex,
    chain_of,
)

A, B = ("a", "m"), ("b", "m")
NOW = 100.0
SYSTEM = {"role": "system", "content": "You are terse."}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def body(*messages: object, **fields: object) -> bytes:
    return msgspec.json.encode({"model": "m", "messages": list(messages), **fields})


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def digests(chain: Chain) -> list[int]:
    return [link.digest for link in chain.links]


def test_a_longer_conversation_goes_on_from_the_shorter_ones_chain() -> None:
    first = chain_of(body(SYSTEM, user("one")))
    second = chain_of(body(SYSTEM, user("one"), {"role": "assistant", "content": "1"}, user("2")))
    assert digests(second)[:2] == digests(first)
    assert len(second.links) == 4
    assert all(link.is_end for link in second.links)


def test_system_messages_and_tools_come_first_wherever_the_body_has_them() -> None:
    early = chain_of(b'{"tools":[%s],"messages":[%s]}' % (_json(TOOL), _json(SYSTEM)))
    late = chain_of(body(SYSTEM, tools=[TOOL]))
    assert digests(early) == digests(late)
    assert len(late.links) == 1


def test_text_as_a_string_and_as_one_part_are_the_same_prefix() -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "one"}]}
    assert digests(chain_of(body(parts))) == digests(chain_of(body(user("one"))))


@pytest.mark.parametrize(
    "other",
    [
        body({"role": "assistant", "content": "one"}),
        body(user("One")),
        body(SYSTEM, user("one")),
        body(user("one"), tools=[TOOL]),
        body({**user("one"), "reasoning_content": "hm"}),
        body({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}),
    ],
)
def test_whatever_the_model_would_see_changes_the_chain(other: bytes) -> None:
    assert not set(digests(chain_of(other))) & set(digests(chain_of(body(user("one")))))


@pytest.mark.parametrize(
    ("shorter", "longer"),
    [("a " * 2000, "a " * 2000 + "more"), ([7] * 3000, [7] * 3000 + [8]), (["ab"], ["abc"])],
)
def test_a_longer_text_goes_on_from_the_shorter_ones_chain(shorter: object, longer: object) -> None:
    first, second = (
        chain_of(msgspec.json.encode({"model": "m", "prompt": each})) for each in (shorter, longer)
    )
    inside = [link.digest for link in first.links if not link.is_end]
    assert [link.digest for link in second.links][: len(inside)] == inside
    assert first.links[-1].is_end
    assert second.links[-1] not in first.links
    assert second.num_bytes > first.num_bytes


def test_a_long_message_has_links_at_every_block_besides_its_end() -> None:
    chain = chain_of(body(user("x" * 5000)))
    assert [(link.at, link.is_end) for link in chain.links] == [
        (2048, False),
        (4096, False),
        (5005, True),  # with the role before it
    ]
    longer = chain_of(body(user("x" * 5000 + "y")))
    assert digests(longer)[:2] == digests(chain)[:2]
    assert digests(longer)[2] != digests(chain)[2]


def test_a_chain_is_bounded_and_keeps_its_beginning_and_its_end() -> None:
    many = [user(f"message {number} " + "x" * 3000) for number in range(100)]
    chain = chain_of(body(*many))
    assert len(chain.links) == MAX_FIRST_LINKS + MAX_LAST_LINKS
    assert chain.links[0].at == 2048
    assert chain.links[-1].at == chain.num_bytes
    assert [link.at for link in chain.links] == sorted(link.at for link in chain.links)


def test_no_more_than_the_bound_is_hashed_but_all_is_counted() -> None:
    chain = chain_of(body(user("x" * (MAX_HASHED_BYTES + 10_000)), user("more")))
    assert chain.links[-1].at <= MAX_HASHED_BYTES
    assert chain.num_bytes == MAX_HASHED_BYTES + 10_000 + 4 + 2 * 5


@pytest.mark.parametrize("junk", [b"", b"[]", b'{"messages": 3}', b"\xff", b"[" * 100_000])
def test_what_cannot_be_read_has_no_chain(junk: bytes) -> None:
    assert chain_of(junk).links == ()


def test_the_longest_prefix_at_each_replica_is_found() -> None:
    index = PrefixIndex()
    short, long = (
        chain_of(body(SYSTEM, user("one"))),
        chain_of(body(SYSTEM, user("one"), user("2"))),
    )
    index.add(A, short)
    index.add(B, long)
    found = index.match(long, [A, B], now_s=NOW)
    assert found[B].share == 1.0
    assert found[A].share == pytest.approx(short.num_bytes / long.num_bytes)
    assert index.match(chain_of(body(user("else"))), [A, B], now_s=NOW) == {}


def test_a_model_with_a_state_hits_at_the_end_of_a_message_only() -> None:
    index = PrefixIndex()
    index.add(A, chain_of(body(SYSTEM, user("x" * 5000))))
    asked = chain_of(body(SYSTEM, user("x" * 5000 + "y")))
    assert index.match(asked, [A], now_s=NOW)[A].share == pytest.approx(4096 / asked.num_bytes)
    only_ends = index.match(asked, [A], ends_only=[A], now_s=NOW)[A]
    assert only_ends.share == pytest.approx(asked.links[0].at / asked.num_bytes)


def test_what_an_engine_held_is_forgotten_with_it() -> None:
    index = PrefixIndex()
    chain = chain_of(body(user("one")))
    index.add(A, chain, "session")
    index.drop(A)
    assert index.match(chain, [A], now_s=NOW) == {}
    assert index.session("session", 10) is None
    index.add(A, chain)
    assert index.match(chain, [A], now_s=NOW)[A].share == 1.0


def test_a_prefix_that_was_not_cached_after_all_takes_the_older_ones_with_it() -> None:
    index = PrefixIndex()
    chains = [chain_of(body(user(name))) for name in ("old", "mid", "new")]
    for chain in chains:
        index.add(A, chain)
    index.learn(A, index.match(chains[1], [A], now_s=NOW)[A], prompt_tokens=1000, cached_tokens=0)
    assert [bool(index.match(chain, [A], now_s=NOW)) for chain in chains] == [False, False, True]


def test_trust_in_a_replica_follows_what_it_reports() -> None:
    index = PrefixIndex()
    chain = chain_of(body(user("one")))
    index.add(A, chain)
    match = index.match(chain, [A], now_s=NOW)[A]
    assert match.trust == 1.0
    index.learn(A, match, prompt_tokens=1000, cached_tokens=900)
    assert index.match(chain, [A], now_s=NOW)[A].trust == pytest.approx(0.97)
    for _ in range(20):
        index.add(A, chain)
        index.learn(A, index.match(chain, [A], now_s=NOW)[A], prompt_tokens=1000, cached_tokens=0)
    index.add(A, chain)
    assert index.match(chain, [A], now_s=NOW)[A].trust < 0.01


def test_a_short_expectation_teaches_nothing() -> None:
    index = PrefixIndex()
    index.learn(A, Match(share=1.0, stamp=5), prompt_tokens=100, cached_tokens=0)
    chain = chain_of(body(user("one")))
    index.add(A, chain)
    assert index.match(chain, [A], now_s=NOW)[A].trust == 1.0


def test_a_request_that_came_to_nothing_is_taken_back() -> None:
    index = PrefixIndex()
    chain = chain_of(body(user("one")))
    index.retract(A, chain, index.add(A, chain))
    assert index.match(chain, [A], now_s=NOW) == {}


def test_the_index_is_bounded_and_forgets_the_oldest() -> None:
    index = PrefixIndex(max_links=3, max_sessions=2)
    chains = [chain_of(body(user(str(number)))) for number in range(5)]
    for number, chain in enumerate(chains):
        index.add(A, chain, f"session {number}")
    assert len(index) == 3
    assert [bool(index.match(chain, [A], now_s=NOW)) for chain in chains] == [
        False,
        False,
        True,
        True,
        True,
    ]
    assert [index.session(f"session {n}", 2) is not None for n in range(5)] == [
        False,
        False,
        False,
        True,
        True,
    ]


def test_a_session_is_likely_to_begin_with_half_of_its_last_prompt() -> None:
    index = PrefixIndex()
    index.add(A, Chain(num_bytes=1000), "s")
    found = index.session("s", 4000)
    assert found is not None
    assert (found[0], found[1].share) == (A, 0.125)


def _json(value: object) -> bytes:
    return msgspec.json.encode(value)


def test_a_prefix_counts_once_it_is_computed() -> None:
    index = PrefixIndex()
    chain = chain_of(body(user("one")))
    index.add(A, chain, ready_s=5.0)
    assert index.match(chain, [A], now_s=4.9) == {}
    assert index.match(chain, [A], now_s=5.0)[A].share == 1.0
    index.add(A, chain, ready_s=9.0)  # it is there already
    assert A in index.match(chain, [A], now_s=6.0)
    index.add(B, chain, ready_s=9.0)
    index.ready(B, chain, now_s=6.0)
    assert B in index.match(chain, [B], now_s=6.0)


def test_replicas_that_came_and_went_are_not_kept_for_ever() -> None:
    index = PrefixIndex()
    for number in range(MAX_REPLICAS + 50):
        replica = (f"n{number}", "m")
        index.add(replica, chain_of(body(user("one"))))
        index.learn(replica, Match(share=1.0, stamp=number), 1000, 0)
    assert len(index.last_used) == len(index._trust) == len(index._floor) == MAX_REPLICAS
    assert ("n0", "m") not in index.last_used
