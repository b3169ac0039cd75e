"""What real clients send, reduced: their shapes and headers without their words.

`python -m tests.support.client_recorder` records anew what a client sends.
"""

import copy
import re
from pathlib import Path
from typing import Any

import msgspec

FOLDER = Path(__file__).parents[1] / "transcripts"
MODEL = "cortex-tiny"
MAX_TOOLS = 3

# They belong to one connection, or to the recording.
_OWN_HEADERS = frozenset({"host", "connection", "content-length", "transfer-encoding"})
_KEYS = {"authorization": "Bearer none", "x-api-key": "none"}
_ZEROS = "00000000-0000-0000-0000-000000000000"
_IDENTITIES = (
    (re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"), _ZEROS),
    (re.compile(r"\bses_[0-9A-Za-z]+"), "ses_0"),
    (re.compile(r"\b[0-9a-f]{32,}\b"), "0" * 64),
    (re.compile(r"/(?:tmp|root|home)/[^\s\"'<>]*"), "/work"),
)
_BILLING = "x-anthropic-billing-header"
_REMINDER = "<system-reminder>"


class Exchange(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One request of a client."""

    method: str = "POST"
    path: str
    headers: dict[str, str]
    body: dict[str, Any] | None = None


class Transcript(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What one run of a client sent, in order.

    Attributes:
        settings: how it was configured, where that decides what it sends.
    """

    client: str
    package: str
    version: str
    settings: str
    requests: list[Exchange]


def load(name: str) -> Transcript:
    """Read one transcript by its file's name."""
    return msgspec.json.decode((FOLDER / name).read_bytes(), type=Transcript)


def names() -> list[str]:
    """Return the names of all transcripts."""
    return sorted(path.name for path in FOLDER.glob("*.json"))


def write(path: Path, transcript: Transcript) -> None:
    """Write one transcript, readable."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(transcript), indent=1) + b"\n")


def reduced(exchanges: list[Exchange], prompts: tuple[str, ...]) -> list[Exchange]:
    """Return exchanges without names, paths, keys and the words of a vendor.

    Args:
        prompts: what was typed; a text that holds one of them keeps that.
    """
    called = {name for each in exchanges for name in called_tools(each.body or {})}
    return [_reduced(each, prompts, called) for each in exchanges]


def _reduced(exchange: Exchange, prompts: tuple[str, ...], called: set[str]) -> Exchange:
    headers = {
        name.lower(): _KEYS.get(name.lower(), _anonymous(value))
        for name, value in exchange.headers.items()
        if name.lower() not in _OWN_HEADERS
    }
    body = exchange.body
    if body is not None:
        body = copy.deepcopy(body)
        if body.get("tools"):
            body["tools"] = _fewer_tools(body["tools"], called)
        for key in ("system", "instructions"):
            if key in body:
                body[key] = _content(body[key], "system", prompts)
        for key in ("messages", "input"):
            body[key] = [_turn(turn, prompts) for turn in body.get(key, [])] or None
        body = _anonymous({key: value for key, value in body.items() if value is not None})
    return Exchange(
        method=exchange.method, path=_anonymous(exchange.path), headers=headers, body=body
    )


def _anonymous(value: Any) -> Any:
    if isinstance(value, str):
        for pattern, plain in _IDENTITIES:
            value = pattern.sub(plain, value)
        return value
    if isinstance(value, list):
        return [_anonymous(each) for each in value]
    if isinstance(value, dict):
        return {key: _anonymous(each) for key, each in value.items()}
    return value


def _turn(turn: dict[str, Any], prompts: tuple[str, ...]) -> dict[str, Any]:
    role = turn.get("role") or ("tool" if str(turn.get("type")).endswith("_output") else "system")
    return {
        key: _content(value, role, prompts) if key in ("content", "output", "summary") else value
        for key, value in turn.items()
    }


def _content(value: Any, role: str, prompts: tuple[str, ...]) -> Any:
    if isinstance(value, str):
        return _text(value, role, prompts) if value else value
    if not isinstance(value, list):
        return value
    blocks = []
    for block in value:
        inner = "tool" if str(block.get("type")) == "tool_result" else role
        blocks.append(
            {
                key: _content(part, inner, prompts)
                if key in ("text", "content") and part is not None
                else part
                for key, part in block.items()
            }
        )
    return blocks


def _text(text: str, role: str, prompts: tuple[str, ...]) -> str:
    """Return own words in place of a vendor's, of the same form."""
    prompt = next((each for each in prompts if each in text), None)
    if role == "user" and prompt is not None:
        return f'"{prompt}"' if text.startswith('"') else prompt
    if text.startswith(_BILLING):
        return text
    if text.startswith(_REMINDER):
        return f"{_REMINDER}\nToday is a fine day.\n</system-reminder>\n\n"
    own = {
        "tool": "The file has one line.",
        "assistant": "I have read it.",
        "user": "This is the project.",
    }
    return own.get(role, "You are a coding agent. Be brief.")


def called_tools(body: dict[str, Any]) -> list[str]:
    """Return the names of the tools that a conversation has called, in order."""
    found: list[str] = []
    for turn in [*body.get("messages", []), *body.get("input", [])]:
        found += [call["function"]["name"] for call in turn.get("tool_calls") or []]
        if turn.get("type") == "function_call":
            found.append(turn["name"])
        if isinstance(turn.get("content"), list):
            found += [each["name"] for each in turn["content"] if each.get("type") == "tool_use"]
    return found


def _fewer_tools(tools: list[dict[str, Any]], called: set[str]) -> list[dict[str, Any]]:
    """Keep the called tools, one of each type, and the first ones; say nothing of their purpose."""
    kept, types = [], set()
    for tool in tools:
        kind, name = tool.get("type"), tool.get("name") or tool.get("function", {}).get("name")
        if name in called or kind not in types or len(kept) < MAX_TOOLS:
            types.add(kind)
            kept.append(_undescribed(tool))
    return kept


def _undescribed(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: "What it is."
            if key == "description" and isinstance(each, str)
            else _undescribed(each)
            for key, each in value.items()
        }
    if isinstance(value, list):
        return [_undescribed(each) for each in value]
    return value
