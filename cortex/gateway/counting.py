"""How many tokens a conversation has: the node that knows the model's tokenizer is asked."""

from typing import Any

import msgspec
from starlette.requests import Request

from cortex.core.openai import ChatRequest, Message, Tool
from cortex.core.web import cancel_on_disconnect
from cortex.gateway.dispatch import Ask, Dispatcher
from cortex.gateway.edge import visit_of
from cortex.gateway.intake import decode_answer

TOKENIZE_PATH = "/v1/tokenize"


class _TokenizeRequest(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Body of a neuron's `POST /v1/tokenize`."""

    model: str
    messages: list[Message]
    tools: list[Tool] | None = None
    tool_choice: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class _TokenizeResponse(msgspec.Struct, kw_only=True):
    """Its answer."""

    count: int


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(_TokenizeResponse)


async def count_tokens(request: Request, dispatcher: Dispatcher, chat: ChatRequest) -> int:
    """Return the tokens of a chat request's prompt; nothing is loaded for it.

    Raises:
        CortexError: as `Dispatcher.tokenize`, or the client left.
    """
    asked = _TokenizeRequest(
        model=chat.model,
        messages=chat.messages,
        tools=chat.tools,
        # The one choice that changes a prompt: it hides the tools.
        tool_choice="none" if chat.tool_choice == "none" else None,
        chat_template_kwargs=_template_kwargs(chat) or None,
    )
    ask = Ask(
        name=chat.model,
        path=TOKENIZE_PATH,
        body=_encoder.encode(asked),
        caller=visit_of(request.scope).caller,
    )
    answer = await cancel_on_disconnect(request, dispatcher.tokenize(ask))
    return decode_answer(_decoder, answer).count


def _template_kwargs(chat: ChatRequest) -> dict[str, Any]:
    """Return all that a node would tell the template of this request."""
    told: dict[str, Any] = {}
    if chat.verbosity is not None:
        told["verbosity"] = chat.verbosity
    if chat.reasoning_effort is not None:
        told["reasoning_effort"] = chat.reasoning_effort
        told["enable_thinking"] = chat.reasoning_effort != "none"
    return told | (chat.chat_template_kwargs or {})
