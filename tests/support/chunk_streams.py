"""Random OpenAI chunk streams, with what each of them says."""

import random
from dataclasses import dataclass, field
from typing import Any

import msgspec

ALPHABET = 'ab {}[]"\\:,\n\r\u00e9\u4e16\U0001f642<>'
FINISHES = ["stop", "length", "tool_calls", "content_filter"]
STOP_STRINGS = [None, None, "END", 151645]
NUM_CALLS = (0, 0, 1, 2, 3)


@dataclass(slots=True)
class Said:
    """What a stream says, block by block as it first comes to each.

    Attributes:
        blocks: `[kind, text]` of thinking and text, `["tool_use", id, name, arguments]` of calls.
        has_ids: whether the source names every call, so that no id has to be made up.
    """

    blocks: list[list[Any]] = field(default_factory=list)
    finish: str = "stop"
    stop: str | int | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    has_ids: bool = True

    def text(self, kind: str, text: str) -> None:
        """Note a piece of text or thinking."""
        if not text:
            return
        if self.blocks and self.blocks[-1][0] == kind:
            self.blocks[-1][1] += text
        else:
            self.blocks.append([kind, text])


@dataclass(slots=True)
class _Call:
    index: int
    call_id: str
    name: str
    arguments: str
    pieces: list[str]
    begun: bool = False


def random_text(rng: random.Random) -> str:
    """Return a short text of characters that are easily broken."""
    return "".join(rng.choices(ALPHABET, k=rng.randint(0, 6)))


def random_value(rng: random.Random, depth: int = 2) -> Any:
    """Return a JSON value."""
    kind = rng.randrange(7 if depth else 5)
    if kind == 5:
        return [random_value(rng, depth - 1) for _ in range(rng.randint(0, 2))]
    if kind == 6:
        return random_object(rng, depth - 1)
    return [None, True, rng.randint(-9, 10**12), rng.random(), random_text(rng)][kind]


def random_object(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    """Return a JSON object."""
    return {random_text(rng): random_value(rng, depth) for _ in range(rng.randint(0, 3))}


def random_stream(rng: random.Random) -> tuple[bytes, Said]:
    """Return a whole stream's bytes, and what it says."""
    said = Said(prompt_tokens=rng.randint(0, 99), completion_tokens=rng.randint(0, 99))
    said.cached_tokens = rng.randint(0, said.prompt_tokens)
    calls = _calls(rng, rng.choice(NUM_CALLS))
    # Calls that the source does not number come one after the other.
    numbering = rng.choice(("index", "index", "same", "none"))
    said.has_ids = numbering != "none"
    events: list[bytes] = []
    if rng.random() < 0.7:
        events.append(_chunk(rng, {"role": "assistant", "content": ""}))
    waiting = list(calls)
    while waiting or rng.random() < 0.7:
        if waiting and rng.random() < 0.5:
            call = rng.choice(waiting) if numbering == "index" else waiting[0]
            events.append(_chunk(rng, {"tool_calls": [_piece(call, said, numbering)]}))
            waiting = [each for each in waiting if each.pieces]
        else:
            kind = rng.choice(("text", "thinking"))
            text = random_text(rng)
            name = {"text": "content", "thinking": rng.choice(("reasoning_content", "reasoning"))}
            said.text(kind, text)
            events.append(_chunk(rng, {name[kind]: text}))
        if rng.random() < 0.1:
            events.append(rng.choice((b": keep-alive", b": ", b"event: note")))
    said.finish = rng.choice(FINISHES)
    said.stop = rng.choice(STOP_STRINGS)
    events.append(_chunk(rng, {}, said.finish, said.stop))
    events.append(_usage(said))
    if rng.random() < 0.8:
        events.append(b"data: [DONE]")
    end = rng.choice((b"\n\n", b"\r\n\r\n"))
    return b"".join(each + end for each in events), said


def random_pieces(rng: random.Random, source: bytes) -> list[bytes]:
    """Cut bytes anywhere, now and then one by one."""
    if rng.random() < 0.02:
        return [source[at : at + 1] for at in range(len(source))]
    cuts = sorted(rng.choices(range(len(source) + 1), k=rng.randint(0, 12)))
    edges = [0, *cuts, len(source)]
    return [source[edges[at] : edges[at + 1]] for at in range(len(edges) - 1)]


def _calls(rng: random.Random, number: int) -> list[_Call]:
    calls = []
    for index in range(number):
        arguments = msgspec.json.encode(random_object(rng)).decode()
        cuts = sorted(rng.choices(range(len(arguments) + 1), k=rng.randint(0, 3)))
        edges = [0, *cuts, len(arguments)]
        pieces = [arguments[edges[at] : edges[at + 1]] for at in range(len(edges) - 1)]
        calls.append(_Call(index, f"call_{index}", f"f{index}", arguments, pieces))
    return calls


def _piece(call: _Call, said: Said, numbering: str) -> dict[str, Any]:
    told: dict[str, Any] = {"function": {"arguments": call.pieces.pop(0)}}
    if numbering != "none":
        told["index"] = call.index if numbering == "index" else 0
    if not call.begun:
        call.begun = True
        said.blocks.append(["tool_use", call.call_id, call.name, call.arguments])
        told["function"]["name"] = call.name
        if numbering != "none":
            told |= {"id": call.call_id, "type": "function"}
    return told


def _chunk(
    rng: random.Random,
    delta: dict[str, Any],
    finish: str | None = None,
    stop: str | int | None = None,
) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish, "stop_reason": stop}
    choices = [choice]
    if rng.random() < 0.1:
        choices.append({"index": 1, "delta": {"content": "another"}, "finish_reason": "stop"})
    body = {"id": "chatcmpl-7", "object": "chat.completion.chunk", "choices": choices}
    if rng.random() < 0.2:
        body |= {"usage": None, "system_fingerprint": "x", "later": [1]}
    return b"data: " + msgspec.json.encode(body)


def _usage(said: Said) -> bytes:
    usage = {
        "prompt_tokens": said.prompt_tokens,
        "completion_tokens": said.completion_tokens,
        "total_tokens": said.prompt_tokens + said.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": said.cached_tokens},
    }
    return b"data: " + msgspec.json.encode({"id": "chatcmpl-7", "choices": [], "usage": usage})
