"""Which node has seen which prefix: a hash chain per request and a bounded index of chains.

The gateway has no tokenizer, so a prefix is the text that a chat template lays out: the system
messages, the tools, then message by message. It is hashed once, with a link where a cached prefix
may end: at the end of each message, and inside long ones at every block. Models with a recurrent
state can be continued only where a snapshot was taken, so for them only message ends count.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Collection
from typing import TypeVar

import msgspec

from cortex.gateway.costs import Replica

BLOCK_BYTES = 2048
MAX_HASHED_BYTES = 1 << 20
# Of a longer chain the first links stay, which many conversations share, and the last ones, where
# the next turn goes on.
MAX_FIRST_LINKS = 32
MAX_LAST_LINKS = 64
MAX_LINKS = 1 << 15  # in the index
MAX_SESSIONS = 1 << 13
MAX_KEY_CHARS = 256
MAX_REPLICAS = 1024
# A session's earlier prompt is only likely to begin the next one.
SESSION_SHARE = 0.5
MIN_EXPECTED_TOKENS = 256
MIN_CACHED_TOKENS = 64
# A replica that hardly ever has what it should have keeps no prefixes at all.
MIN_TRUST = 0.1
_WEIGHT_OF_NEW = 0.3
_DIGEST_BYTES = 8
# What closes a text or a list; where the text itself ends like that, no harm is done.
_JSON_ENDS = b'"] '


class _Part(msgspec.Struct, kw_only=True):
    type: str = ""
    text: str | None = None
    image_url: msgspec.Raw = msgspec.Raw(b"")


class _Message(msgspec.Struct, kw_only=True):
    role: str = ""
    content: str | list[_Part] | None = None
    reasoning_content: str | None = None
    tool_calls: msgspec.Raw = msgspec.Raw(b"")


class _Function(msgspec.Struct, kw_only=True):
    name: str = ""
    description: str | None = None
    parameters: msgspec.Raw = msgspec.Raw(b"")


class _Tool(msgspec.Struct, kw_only=True):
    function: _Function | None = None


class _Prompt(msgspec.Struct, kw_only=True):
    messages: list[_Message] = []
    tools: list[_Tool] | None = None
    prompt: msgspec.Raw = msgspec.Raw(b"")
    prompt_cache_key: str | None = None


_decoder = msgspec.json.Decoder(_Prompt)
V = TypeVar("V", int, float)


class Link(msgspec.Struct, frozen=True, gc=False):
    """A place where a cached prefix may end.

    Attributes:
        digest: of everything up to here.
        at: bytes of text up to here.
        is_end: whether a message ends here.
    """

    digest: int
    at: int
    is_end: bool


class Chain(msgspec.Struct, frozen=True):
    """The prefix of one request; `num_bytes` counts all of its text, hashed or not."""

    links: tuple[Link, ...] = ()
    num_bytes: int = 0
    cache_key: str | None = None


EMPTY = Chain()


def chain_of(body: bytes) -> Chain:
    """Return the chain of a request; an unreadable one has none, and its node will say so."""
    try:
        prompt = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return EMPTY
    builder = _Builder()
    num_system = 0
    for message in prompt.messages:
        if message.role not in ("system", "developer"):
            break
        num_system += 1
        builder.message(message)
    for tool in prompt.tools or ():
        builder.tool(tool)
    if num_system or prompt.tools:
        builder.end()
    for message in prompt.messages[num_system:]:
        builder.message(message)
        builder.end()
    if not prompt.messages and prompt.prompt:
        builder.prompt(bytes(prompt.prompt))
        builder.end()
    return Chain(_thinned(builder.links), builder.num_bytes, prompt.prompt_cache_key)


class _Builder:
    """One running hash over the text, and its links so far."""

    def __init__(self) -> None:
        self.links: list[Link] = []
        self.num_bytes = 0
        self._hash = hashlib.blake2b(digest_size=_DIGEST_BYTES)

    def message(self, message: _Message) -> None:
        self._take(b"\x00" + message.role.encode())
        if message.reasoning_content:
            self._take(message.reasoning_content.encode())
        if isinstance(message.content, str):
            # The same text as one part of a list means the same.
            self._take(message.content.encode())
        else:
            for part in message.content or ():
                if part.text is not None:
                    self._take(part.text.encode())
                else:
                    self._take(part.type.encode() + bytes(part.image_url))
        if message.tool_calls:
            self._take(bytes(message.tool_calls))

    def prompt(self, raw: bytes) -> None:
        # The JSON of a longer text, or of more ids, begins with that of a shorter one.
        self._take(b"\x02" + raw.rstrip(_JSON_ENDS))

    def tool(self, tool: _Tool) -> None:
        function = tool.function or _Function()
        self._take(b"\x01" + function.name.encode())
        self._take((function.description or "").encode())
        self._take(bytes(function.parameters))

    def end(self) -> None:
        if self.num_bytes <= MAX_HASHED_BYTES:
            self._link(self.num_bytes, is_end=True)

    def _take(self, text: bytes) -> None:
        """Hash text, with a link at every block boundary that it crosses."""
        begin = self.num_bytes
        self.num_bytes += len(text)
        if begin >= MAX_HASHED_BYTES:
            return
        done = 0
        boundary = begin - begin % BLOCK_BYTES + BLOCK_BYTES
        last = min(self.num_bytes, MAX_HASHED_BYTES)
        while boundary <= last:
            self._hash.update(text[done : boundary - begin])
            done = boundary - begin
            self._link(boundary, is_end=False)
            boundary += BLOCK_BYTES
        self._hash.update(text[done:])

    def _link(self, at: int, *, is_end: bool) -> None:
        digest = int.from_bytes(self._hash.copy().digest(), "little")
        self.links.append(Link(digest, at, is_end))


def _thinned(links: list[Link]) -> tuple[Link, ...]:
    if len(links) <= MAX_FIRST_LINKS + MAX_LAST_LINKS:
        return tuple(links)
    # The ends of the last messages first: that is where a next turn and a snapshot are.
    middle = links[MAX_FIRST_LINKS:]
    ends = [each for each in middle if each.is_end][-MAX_LAST_LINKS // 2 :]
    blocks = [each for each in middle if not each.is_end][len(ends) - MAX_LAST_LINKS :]
    return (*links[:MAX_FIRST_LINKS], *sorted([*ends, *blocks], key=lambda each: each.at))


class Match(msgspec.Struct, frozen=True, gc=False):
    """What a replica is believed to hold of a prompt.

    Attributes:
        share: of the prompt, from 0 to 1, as the index has it.
        stamp: when the replica last saw that prefix, in the index' own count.
        trust: how much of such a share has proven true at this replica.
    """

    share: float = 0.0
    stamp: int = -1
    trust: float = 1.0

    def tokens(self, prompt_tokens: int) -> int:
        """Return how many tokens of a prompt to count on; less than a block is not cached."""
        tokens = int(self.share * self.trust * prompt_tokens)
        return tokens if self.trust >= MIN_TRUST and tokens >= MIN_CACHED_TOKENS else 0


class _Held(msgspec.Struct, frozen=True, gc=False):
    """When a replica last saw a prefix, and from when on it is computed there."""

    stamp: int
    ready_s: float


class PrefixIndex:
    """Who saw which prefix, bounded; what was used longest ago is forgotten first."""

    def __init__(self, max_links: int = MAX_LINKS, max_sessions: int = MAX_SESSIONS) -> None:
        self._max_links = max_links
        self._max_sessions = max_sessions
        # Who holds the prefix up to a link.
        self._holders: OrderedDict[int, dict[Replica, _Held]] = OrderedDict()
        self._sessions: OrderedDict[str, tuple[Replica, int, int]] = OrderedDict()
        self._stamp = 0
        # What a replica saw before this stamp is gone from its cache.
        self._floor: dict[Replica, int] = {}
        self._trust: dict[Replica, float] = {}
        # When each replica last got a prompt, in stamps.
        self.last_used: dict[Replica, int] = {}

    def __len__(self) -> int:
        return len(self._holders)

    def match(
        self,
        chain: Chain,
        replicas: Collection[Replica],
        ends_only: Collection[Replica] = (),
        *,
        now_s: float,
    ) -> dict[Replica, Match]:
        """Return the longest known prefix at each replica that holds any.

        One that is still being computed is none: who comes before its end computes it again.

        Args:
            ends_only: replicas that can continue only where a message ended.
        """
        found: dict[Replica, Match] = {}
        wanted = set(replicas)
        for link in reversed(chain.links):
            holders = self._holders.get(link.digest)
            if holders is None:
                continue
            for replica in wanted & holders.keys():
                held = holders[replica]
                if (not link.is_end and replica in ends_only) or held.ready_s > now_s:
                    continue
                if held.stamp >= self._floor.get(replica, 0):
                    share = link.at / max(1, chain.num_bytes)
                    found[replica] = Match(share, held.stamp, self._trust.get(replica, 1.0))
                    wanted.discard(replica)
            if not wanted:
                break
        return found

    def session(self, key: str, prompt_bytes: int) -> tuple[Replica, Match] | None:
        """Return where a session was last, and what is likely still there of its prompt."""
        known = self._sessions.get(key[:MAX_KEY_CHARS])
        if known is None:
            return None
        replica, stamp, num_bytes = known
        if stamp < self._floor.get(replica, 0):
            return None
        share = SESSION_SHARE * min(num_bytes, prompt_bytes) / max(1, prompt_bytes)
        return replica, Match(share, stamp, self._trust.get(replica, 1.0))

    def add(
        self, replica: Replica, chain: Chain, session: str = "", *, ready_s: float = 0.0
    ) -> int:
        """Note that a replica gets this prompt; return the stamp of it.

        Args:
            ready_s: when it is likely to have been computed.
        """
        self._stamp += 1
        _keep(self.last_used, replica, self._stamp)
        floor = self._floor.get(replica, 0)
        for link in chain.links:
            holders = self._holders.setdefault(link.digest, {})
            held = holders.get(replica)
            known_s = held.ready_s if held is not None and held.stamp >= floor else ready_s
            holders[replica] = _Held(self._stamp, min(known_s, ready_s))
            self._holders.move_to_end(link.digest)
        while len(self._holders) > self._max_links:
            self._holders.popitem(last=False)
        if session:
            key = session[:MAX_KEY_CHARS]
            self._sessions[key] = (replica, self._stamp, chain.num_bytes)
            self._sessions.move_to_end(key)
            if len(self._sessions) > self._max_sessions:
                self._sessions.popitem(last=False)
        return self._stamp

    def retract(self, replica: Replica, chain: Chain, stamp: int) -> None:
        """Undo an `add` whose request came to nothing before its prompt was worked on."""
        for link in chain.links:
            holders = self._holders.get(link.digest)
            held = holders.get(replica) if holders is not None else None
            if holders is not None and held is not None and held.stamp == stamp:
                del holders[replica]

    def ready(self, replica: Replica, chain: Chain, now_s: float) -> None:
        """Note that a prompt is computed, earlier than was expected."""
        for link in chain.links:
            holders = self._holders.get(link.digest)
            held = holders.get(replica) if holders is not None else None
            if holders is not None and held is not None and held.ready_s > now_s:
                holders[replica] = _Held(held.stamp, now_s)

    def learn(self, replica: Replica, match: Match, prompt_tokens: int, cached_tokens: int) -> None:
        """Take in how much of a believed share was really cached.

        Where it was little, the replica has dropped the prefix, and with it all it used before.
        """
        expected = match.share * prompt_tokens
        if expected < MIN_EXPECTED_TOKENS:
            return
        truth = min(1.0, cached_tokens / expected)
        old = self._trust.get(replica, 1.0)
        _keep(self._trust, replica, old + _WEIGHT_OF_NEW * (truth - old))
        if truth < 0.5:
            _keep(self._floor, replica, max(self._floor.get(replica, 0), match.stamp + 1))

    def drop(self, replica: Replica) -> None:
        """Forget all of a replica: its caches ended with its engine."""
        _keep(self._floor, replica, self._stamp + 1)
        self._trust.pop(replica, None)
        self.last_used.pop(replica, None)


def _keep(known: dict[Replica, V], replica: Replica, value: V) -> None:
    """Set what is known of a replica; of too many, the one set longest ago is forgotten."""
    known.pop(replica, None)
    known[replica] = value
    if len(known) > MAX_REPLICAS:
        del known[next(iter(known))]
