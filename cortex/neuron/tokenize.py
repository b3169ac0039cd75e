"""Wire structs of `POST /v1/tokenize`."""

from typing import Literal

import msgspec

from cortex.core.openai import Message, Tool


class TokenizeRequest(msgspec.Struct, kw_only=True, frozen=True):
    """Body of `POST /v1/tokenize`: messages as for a chat, or a plain prompt."""

    model: str
    messages: list[Message] | None = None
    prompt: str | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    chat_template_kwargs: dict[str, object] | None = None
    return_tokens: bool = False


class TokenizeResponse(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """Answer of `POST /v1/tokenize`."""

    count: int
    tokens: list[int] | None = None
    max_model_len: int | None = None
