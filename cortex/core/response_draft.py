"""A Responses answer in the making: its items, and what it looks like at any moment."""

from dataclasses import dataclass, field

import msgspec
from msgspec import UNSET

from cortex.core.errors import CortexError, UpstreamMalformedError
from cortex.core.openai import ChatCompletion, FunctionCall, TokenLogprob
from cortex.core.openai import Usage as ChatUsage
from cortex.core.response_tools import CUSTOM_INPUT, ToolName, ToolSet
from cortex.core.responses import (
    RESPONSE_PREFIX,
    CustomCallItem,
    FunctionCallItem,
    IncompleteDetails,
    InputTokensDetails,
    ItemStatus,
    OutputItem,
    OutputMessage,
    OutputText,
    OutputTokensDetails,
    Reasoning,
    ReasoningItem,
    ReasoningText,
    Response,
    ResponseError,
    ResponsesRequest,
    Status,
    SummaryText,
    TextConfig,
    TextFormat,
    Usage,
)
from cortex.core.translate_responses import pack_reasoning

CANCELLED = "cancelled"

_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}


@dataclass(slots=True)
class Draft:
    """Makes the parts of one response.

    Args:
        response_id: `resp_` and what makes it unique.
        created_at: in Unix seconds.

    Attributes:
        output: the items that are complete, or as complete as they will be.
    """

    request: ResponsesRequest
    tools: ToolSet
    response_id: str
    created_at: int
    output: list[OutputItem] = field(default_factory=list)
    usage: Usage | None = None

    def item_id(self, prefix: str, index: int) -> str:
        """Return the id of the item at a place of the output."""
        return f"{prefix}_{self.response_id.removeprefix(RESPONSE_PREFIX)}{index:04x}"

    def tool(self, chat_name: str) -> ToolName:
        """Return what the caller calls a tool; a name that it did not declare stands for itself."""
        return self.tools.names.get(chat_name) or ToolName("function", chat_name)

    def message(
        self, index: int, text: str, logprobs: list[TokenLogprob], status: ItemStatus = "completed"
    ) -> OutputMessage:
        """Return the item of a text."""
        content = [OutputText(text=text, logprobs=logprobs)]
        return OutputMessage(id=self.item_id("msg", index), status=status, content=content)

    def reasoning(self, index: int, text: str) -> ReasoningItem:
        """Return the item of what the model thought: told whole, as a summary if one was asked."""
        is_summary = self.request.wants_summary
        return ReasoningItem(
            id=self.item_id("rs", index),
            summary=[SummaryText(text=text)] if is_summary else [],
            content=[] if is_summary else [ReasoningText(text=text)],
            encrypted_content=pack_reasoning(text) if self.request.wants_encrypted else UNSET,
        )

    def call(
        self,
        index: int,
        name: str,
        call_id: str | None,
        arguments: str,
        status: ItemStatus = "completed",
    ) -> FunctionCallItem | CustomCallItem:
        """Return the item of a call.

        Args:
            name: as the model said it.
            call_id: None where it came without one.
            arguments: as they came; a function that is told none has an empty object.
        """
        tool = self.tool(name)
        call_id = call_id or self.item_id("call", index)
        namespace = UNSET if tool.namespace is None else tool.namespace
        if tool.kind == "custom":
            return CustomCallItem(
                id=self.item_id("ctc", index),
                call_id=call_id,
                name=tool.name,
                namespace=namespace,
                input=custom_input(arguments),
                status=status,
            )
        return FunctionCallItem(
            id=self.item_id("fc", index),
            call_id=call_id,
            name=tool.name,
            namespace=namespace,
            arguments=arguments or "{}",
            status=status,
        )

    def take_usage(self, usage: ChatUsage | None) -> None:
        """Note the tokens that it took."""
        if usage is not None:
            self.usage = usage_of(usage)

    def ended(self, finish_reason: str | None, *, is_stored: bool) -> Response:
        """Return the response at the end of its source."""
        reason = _INCOMPLETE.get(finish_reason or "")
        if reason is not None:
            details = IncompleteDetails(reason=reason)
            return self.response("incomplete", details=details, is_stored=is_stored)
        return self.response("completed", is_stored=is_stored)

    def failed(self, exc: CortexError) -> Response:
        """Return the response that a fault ended."""
        error = ResponseError(code=error_code(exc), message=exc.message)
        return self.response("failed", error=error, is_stored=False)

    def response(
        self,
        status: Status,
        *,
        error: ResponseError | None = None,
        details: IncompleteDetails | None = None,
        is_stored: bool | None = None,
    ) -> Response:
        """Return the response as it is; `is_stored` None says what was asked for."""
        request, choice = self.request, self.request.tool_choice
        text = request.text or TextConfig()
        return Response(
            id=self.response_id,
            created_at=self.created_at,
            status=status,
            error=error,
            incomplete_details=details,
            instructions=request.instructions,
            max_output_tokens=request.max_output_tokens,
            metadata=request.metadata or {},
            model=request.model,
            output=list(self.output),
            parallel_tool_calls=request.parallel_tool_calls is not False,
            previous_response_id=request.previous_response_id,
            prompt_cache_key=request.prompt_cache_key,
            reasoning=request.reasoning or Reasoning(),
            store=request.wants_store if is_stored is None else is_stored,
            temperature=request.temperature,
            text=msgspec.structs.replace(text, format=text.format or TextFormat(type="text")),
            tool_choice="auto" if choice is None else choice,
            tools=self.tools.raws,
            top_logprobs=request.top_logprobs or 0,
            top_p=request.top_p,
            usage=self.usage if status != "in_progress" else None,
            user=request.user,
        )


def from_chat(completion: ChatCompletion, draft: Draft, *, is_stored: bool) -> Response:
    """Return a whole answer as a response.

    Raises:
        UpstreamMalformedError: the answer has no choice.
    """
    if not completion.choices:
        raise UpstreamMalformedError("the answer has no choices")
    choice, output = completion.choices[0], draft.output
    message = choice.message
    status: ItemStatus = "incomplete" if choice.finish_reason in _INCOMPLETE else "completed"
    thought = message.reasoning_content or message.reasoning
    if thought:
        output.append(draft.reasoning(len(output), thought))
    calls = message.tool_calls or []
    if message.content:
        logprobs = (choice.logprobs.content if choice.logprobs else None) or []
        told = "completed" if calls else status
        output.append(draft.message(len(output), message.content, logprobs, told))
    used: set[str] = set()
    for call in calls:
        call_id = call.id if call.id and call.id not in used else None
        used.add(call.id or "")
        is_last = call is calls[-1]
        arguments = _arguments(call.function)
        name = call.function.name
        told = status if is_last else "completed"
        output.append(draft.call(len(output), name, call_id, arguments, told))
    draft.take_usage(completion.usage)
    return draft.ended(choice.finish_reason, is_stored=is_stored)


def _arguments(function: FunctionCall) -> str:
    if isinstance(function.arguments, dict):
        return msgspec.json.encode(function.arguments).decode()
    return function.arguments or ""


def custom_input(arguments: str) -> str:
    """Return the text that a custom tool is called with; arguments of another form are it."""
    try:
        told = msgspec.json.decode(arguments)
    except (msgspec.DecodeError, RecursionError):
        return arguments
    text = told.get(CUSTOM_INPUT) if isinstance(told, dict) else None
    return text if isinstance(text, str) else arguments


def usage_of(usage: ChatUsage) -> Usage:
    """Return token counts under this dialect's names."""
    prompt, completion = usage.prompt_tokens_details, usage.completion_tokens_details
    return Usage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(
            cached_tokens=(prompt.cached_tokens or 0) if prompt else 0
        ),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(
            reasoning_tokens=(completion.reasoning_tokens or 0) if completion else 0
        ),
        total_tokens=usage.total_tokens or usage.prompt_tokens + usage.completion_tokens,
    )


def error_code(exc: CortexError) -> str:
    """Return the dialect's word for what went wrong; clients tell by it whether to try again."""
    if exc.code in ("context_length_exceeded", "insufficient_quota"):
        return exc.code
    if exc.status == 429:
        return "rate_limit_exceeded"
    return "invalid_prompt" if exc.status < 500 else "server_error"
