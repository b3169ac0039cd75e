"""A chat request to what the engine needs: prompt ids, sampling, limits, grammar."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from cortex.core.errors import (
    BadRequestError,
    ContextLengthExceededError,
    UnsupportedFieldError,
)
from cortex.core.openai import (
    ChatRequest,
    GenerationRequest,
    JsonSchemaFormat,
    Tool,
)
from cortex.core.tool_choice import AllowedToolsChoice, NamedToolChoice
from cortex.neuron.chat.formats import SYNTAXES, CallSyntax
from cortex.neuron.chat.grammar import (
    Markers,
    Thinking,
    forced_calls,
    json_answer,
    optional_calls,
)
from cortex.neuron.chat.images import ImageData, OpenedImage, expand, find_images, spans_of
from cortex.neuron.chat.model import ChatModel
from cortex.neuron.chat.output import OutputSpec
from cortex.neuron.chat.schema import ToolTable
from cortex.neuron.chat.template import ChatTemplate
from cortex.neuron.chat.tokenizer import ChatTokenizer
from cortex.neuron.engine.protocol import Constraint, ImageSpan, Sampling, Submit, ThinkBudget

# OpenAI's documented default, for checkpoints that do not say how they want to be sampled.
DEFAULT_TEMPERATURE = 1.0

_NOTHING: Mapping[str, ImageData] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A request that is ready for the engine, and how its output is to be read.

    Attributes:
        num_choices: sequences to submit (`n`).
        logprobs: whether the answer carries log probabilities.
        context_ids: the tokens that the output's text goes on from; none where it begins anew.
        spans, pixels: of the images; who hands the pixels on may clear them.
    """

    tokenizer: ChatTokenizer
    prompt_ids: list[int]
    max_tokens: int
    stop_ids: tuple[int, ...]
    sampling: Sampling
    constraint: Constraint | None
    output: OutputSpec
    num_choices: int
    stream: bool
    include_usage: bool
    logprobs: bool
    context_ids: Sequence[int] = ()
    spans: Sequence[ImageSpan] = ()
    pixels: list[bytes] = field(default_factory=list)

    def submit(self, request_id: int, choice_idx: int = 0) -> Submit:
        """Return the engine's command for one choice; with a seed, choices still differ."""
        sampling = self.sampling
        if sampling.seed is not None and choice_idx > 0:
            sampling = _reseeded(sampling, choice_idx)
        return Submit(
            request_id=request_id,
            prompt_ids=self.prompt_ids,
            max_tokens=self.max_tokens,
            stop_ids=list(self.stop_ids),
            sampling=sampling,
            constraint=self.constraint,
            images=list(self.spans),
        )


def prepare(
    request: ChatRequest, model: ChatModel, fetched: Mapping[str, ImageData] = _NOTHING
) -> Prepared:
    """Return what the engine and the reply need of a request.

    Takes tens of milliseconds for a prompt of an agent and for each image, so call it from a
    thread.

    Args:
        fetched: the images that are elsewhere, by address.

    Raises:
        InvalidImageError: an image cannot be read or is over a bound.
        UnsupportedFieldError: the request asks for what this model or server cannot do.
        TemplateRenderError: the chat template refused the messages.
        ContextLengthExceededError: the prompt leaves no room for an answer.
        BadRequestError: fields contradict each other.
    """
    offered = _active_tools(request)
    tools = _callable_tools(request, offered)
    template = _template_of(model, has_tools=bool(offered))
    syntax = _syntax_of(model, offered)
    text = _render(request, template, offered)
    check_length(text, model, "messages")
    prompt_ids, opened, starts = _encode(text, request, model, fetched)
    check_room(prompt_ids, model, "messages")
    # Nothing is decoded before all of it is known to be within the bounds.
    images = [each.decode() for each in opened]
    asked_tokens = request.max_completion_tokens or request.max_tokens or model.default_max_tokens
    thinking = _thinking_after(text, template, model.tokenizer)
    markers = Markers.of(
        model.tokenizer,
        syntax=syntax,
        thinking=thinking,
        think=template.think,
        has_call_ids=template.has_call_ids,
    )
    is_single = (
        request.parallel_tool_calls is False
        or isinstance(request.tool_choice, NamedToolChoice)
        or template.is_single_call
    )
    constraint = _constraint(
        request, tools, markers, is_single=is_single, holds_optional=model.constrain_tools
    )
    return Prepared(
        tokenizer=model.tokenizer,
        prompt_ids=prompt_ids,
        max_tokens=min(asked_tokens, model.max_model_len - len(prompt_ids)),
        stop_ids=model.tokenizer.eos_ids,
        sampling=msgspec.structs.replace(
            sampling_of(request, model, (request.top_logprobs or 0) if request.logprobs else None),
            think=_think_budget(request, markers),
        ),
        constraint=constraint,
        output=OutputSpec(
            knows_thinking=(
                template.supports_thinking or markers.ids[template.think.opening] is not None
            ),
            starts_thinking=thinking == "open",
            think=template.think,
            tools=ToolTable(tools) if tools else None,
            syntax=syntax,
            is_forced=constraint is not None and constraint.trigger_id is None,
            is_single_call=is_single,
            stops=request.stops,
        ),
        num_choices=request.num_choices,
        stream=bool(request.stream),
        include_usage=request.include_usage,
        logprobs=bool(request.logprobs),
        spans=spans_of(images, starts),
        pixels=[each.pixels for each in images],
    )


def prompt_text(request: ChatRequest, model: ChatModel) -> str:
    """Return the prompt's text alone, for counting; raises as `prepare`, but not on length."""
    tools = _active_tools(request)
    return _render(request, _template_of(model, has_tools=bool(tools)), tools)


def prompt_ids(
    request: ChatRequest, model: ChatModel, fetched: Mapping[str, ImageData] = _NOTHING
) -> list[int]:
    """Return the ids of a prompt with images, for counting; raises as `prompt_text`.

    Of an image no more than its size is read.
    """
    return _encode(prompt_text(request, model), request, model, fetched)[0]


def _template_of(model: ChatModel, *, has_tools: bool) -> ChatTemplate:
    template = model.template_for(has_tools=has_tools)
    if template is None:
        raise BadRequestError(
            f"model {model.model_id!r} has no chat template, so it cannot chat; "
            "choose a model that was made for chat",
            param="model",
        )
    return template


def _syntax_of(model: ChatModel, tools: list[Tool]) -> CallSyntax:
    syntax = model.call_syntax
    if syntax is None and tools:
        raise UnsupportedFieldError(
            f"model {model.model_id!r} cannot use tools: its chat template does not say how it "
            "writes calls; set its `tool_format`, leave `tools` out or choose another model",
            param="tools",
        )
    return syntax or SYNTAXES["hermes"]


def _active_tools(request: ChatRequest) -> list[Tool]:
    """Return the tools the model may call."""
    names: set[str] = set()
    for at, tool in enumerate(request.tools or ()):
        if tool.type != "function" or tool.function is None:
            raise UnsupportedFieldError(
                f"tools of type {tool.type!r} are not supported, only complete functions are",
                param=f"tools[{at}]",
            )
        if tool.function.name in names:
            raise BadRequestError(
                f"tools declares {tool.function.name!r} twice", param=f"tools[{at}].function.name"
            )
        names.add(tool.function.name)
    choice = request.tool_choice
    if isinstance(choice, NamedToolChoice) and choice.function.name not in names:
        raise BadRequestError(
            f"tool_choice names {choice.function.name!r}, which tools does not declare",
            param="tool_choice",
        )
    return [] if choice == "none" else list(request.tools or ())


def _callable_tools(request: ChatRequest, tools: list[Tool]) -> list[Tool]:
    """Return those of the tools in the prompt that the choice leaves to the model."""
    choice = request.tool_choice
    if not isinstance(choice, AllowedToolsChoice):
        return tools
    declared = {tool.function.name: tool for tool in tools if tool.function is not None}
    allowed: dict[str, Tool] = {}
    for at, each in enumerate(choice.allowed_tools.tools):
        name = each.function.name if each.function is not None else None
        if name is None or name not in declared:
            what = f"{name!r}" if name is not None else f"a tool of type {each.type!r}"
            raise BadRequestError(
                f"tool_choice allows {what}, which tools does not declare",
                param=f"tool_choice.allowed_tools.tools[{at}]",
            )
        allowed[name] = declared[name]
    return list(allowed.values())


def _is_forced(request: ChatRequest) -> bool:
    choice = request.tool_choice
    if isinstance(choice, AllowedToolsChoice):
        return choice.allowed_tools.mode == "required"
    return choice == "required"


def _render(request: ChatRequest, template: ChatTemplate, tools: list[Tool]) -> str:
    kwargs: dict[str, Any] = {}
    if request.verbosity is not None:
        kwargs["verbosity"] = request.verbosity
    if request.thinking_budget is not None:
        kwargs["thinking_budget"] = request.thinking_budget
    if request.reasoning_effort is not None:
        kwargs["reasoning_effort"] = request.reasoning_effort
        kwargs["enable_thinking"] = request.reasoning_effort != "none"
    kwargs |= request.chat_template_kwargs or {}
    if "enable_thinking" in kwargs:
        # Templates know the same switch by either name.
        kwargs.setdefault("thinking", kwargs["enable_thinking"])
    return template.render(request.messages, tools, template_kwargs=kwargs)


def _encode(
    text: str, request: ChatRequest, model: ChatModel, fetched: Mapping[str, ImageData]
) -> tuple[list[int], list[OpenedImage], list[int]]:
    """Return the prompt, its images, and the index of each one's first token."""
    ids = model.tokenizer.encode(text)
    refs = find_images(request.messages)
    if not refs:
        return ids, [], []
    assert model.images is not None, "a template took images for a model without eyes"
    opened = model.images.open(refs, fetched)
    counts = [each.num_tokens for each in opened]
    expanded, starts = expand(ids, counts, model.images.image_token_id, model.model_id)
    return expanded, opened, starts


def check_length(text: str, model: ChatModel, param: str) -> None:
    """Refuse a text that is too long for any tokenization, before one is tried.

    Args:
        param: the field that holds it.

    Raises:
        ContextLengthExceededError: it is.
    """
    limit = model.max_model_len
    if len(text) > limit * model.tokenizer.max_token_chars:
        num_tokens = len(text) // model.tokenizer.max_token_chars
        raise _context_exceeded(limit, num_tokens, param, "at least ")


def check_room(ids: list[int], model: ChatModel, param: str) -> None:
    """Refuse a prompt that leaves no room for an answer; as `check_length`."""
    if len(ids) >= model.max_model_len:
        raise _context_exceeded(model.max_model_len, len(ids), param)


def _context_exceeded(
    limit: int, num_tokens: int, param: str, about: str = ""
) -> ContextLengthExceededError:
    verb = "have" if param == "messages" else "has"
    return ContextLengthExceededError(
        f"This model's maximum context length is {limit} tokens, but the {param} {verb} "
        f"{about}{num_tokens} tokens; shorten the {param}.",
        param=param,
        extras={"max": limit, "prompt_len": num_tokens},
    )


def sampling_of(request: GenerationRequest, model: ChatModel, num_logprobs: int | None) -> Sampling:
    """Return how tokens are drawn: as asked, else as the checkpoint says.

    Raises:
        BadRequestError: `logit_bias` names a token that the model has not.
    """
    defaults = model.defaults
    bias = request.logit_bias or {}
    unknown = [at for at in bias if not 0 <= at < model.tokenizer.vocab_size]
    if unknown:
        raise BadRequestError(
            f"logit_bias names token {unknown[0]}; this model's tokens are "
            f"0 to {model.tokenizer.vocab_size - 1}",
            param="logit_bias",
        )
    return Sampling(
        temperature=_first(request.temperature, defaults.temperature, DEFAULT_TEMPERATURE),
        top_k=max(_first(request.top_k, defaults.top_k, 0), 0),
        top_p=_first(request.top_p, defaults.top_p, 1.0),
        min_p=_first(request.min_p, defaults.min_p, 0.0),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=_first(request.repetition_penalty, defaults.repetition_penalty, 1.0),
        logit_bias=bias,
        seed=request.seed,
        num_logprobs=num_logprobs,
    )


_T = TypeVar("_T")


def _first(*values: _T | None) -> _T:
    """Return the first value that is given; the last always is."""
    return next(value for value in values if value is not None)


def _reseeded(sampling: Sampling, choice_idx: int) -> Sampling:
    assert sampling.seed is not None
    wrapped = (sampling.seed + choice_idx + (1 << 63)) % (1 << 64) - (1 << 63)
    return msgspec.structs.replace(sampling, seed=wrapped)


def _thinking_after(text: str, template: ChatTemplate, tokenizer: ChatTokenizer) -> Thinking:
    """Return whether the prompt ends inside a thinking block, or the model may begin one."""
    end = text.rstrip()
    think = template.think
    if end.endswith(think.opening):
        return "open"
    if end.endswith(think.closing) or tokenizer.marker_id(think.opening) is None:
        return "off"
    return "possible" if template.supports_thinking else "off"


def _think_budget(request: ChatRequest, markers: Markers) -> ThinkBudget | None:
    """Return what ends a thought that is too long; None where no single token would."""
    end_id = markers.ids[markers.think.closing]
    if request.thinking_budget is None or markers.thinking == "off" or end_id is None:
        return None
    is_open = markers.thinking == "open"
    return ThinkBudget(
        max_tokens=request.thinking_budget,
        begin_id=None if is_open else markers.ids[markers.think.opening],
        end_id=end_id,
    )


def _constraint(
    request: ChatRequest,
    tools: list[Tool],
    markers: Markers,
    *,
    is_single: bool,
    holds_optional: bool,
) -> Constraint | None:
    answer = _json_format(request)
    choice = request.tool_choice
    if isinstance(choice, NamedToolChoice):
        name = choice.function.name
        named = [tool for tool in tools if tool.function and tool.function.name == name]
        return forced_calls(named, markers, is_single=True)
    if tools and _is_forced(request):
        return forced_calls(tools, markers, is_single=is_single)
    if answer is not None:
        if tools:
            return forced_calls(tools, markers, is_single=is_single, or_json=answer)
        return json_answer(answer, markers)
    if tools and holds_optional:
        return optional_calls(tools, markers, is_single=is_single)
    return None


def _json_format(request: ChatRequest) -> JsonSchemaFormat | None:
    response_format = request.response_format
    if response_format is None or response_format.type == "text":
        return None
    if response_format.type == "json_object":
        return JsonSchemaFormat()
    return response_format.json_schema
