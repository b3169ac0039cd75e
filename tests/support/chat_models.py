"""Small chat models: a byte-level BPE tokenizer, templates with the features of real ones."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from hypothesis import HealthCheck, settings
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from cortex.core.openai import ChatRequest, Tool
from cortex.neuron.chat.callparts import CallStart, CallText
from cortex.neuron.chat.callreader import CallReader
from cortex.neuron.chat.formats import SYNTAXES, CallSyntax
from cortex.neuron.chat.model import ChatModel
from cortex.neuron.chat.schema import ToolTable
from cortex.neuron.chat.template import ChatTemplate
from cortex.neuron.chat.tokenizer import ChatTokenizer

# Machines that run the tests may be busy: no property has a deadline.
PROPERTY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MARKERS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
END_ID = 2

# Own text with the features that Qwen3.5's uses: a macro over parts, a namespace, loop
# neighbours, slices, items, tojson, mapping tests, raised errors, an open or closed thought.
HYBRID_TEMPLATE = """\
{%- macro words(content) %}
    {%- if content is string %}
        {{- content }}
    {%- elif content is iterable and content is not mapping %}
        {%- for item in content %}
            {%- if 'text' in item %}
                {{- item.text }}
            {%- else %}
                {{- raise_exception('Unexpected item.') }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- if not messages %}{{ raise_exception('No messages.') }}{% endif %}
{%- set ns = namespace(last_query=-1) %}
{%- for message in messages[::-1] %}
    {%- if ns.last_query < 0 and message.role == 'user' %}
        {%- set ns.last_query = messages|length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- if ns.last_query < 0 %}{{ raise_exception('No user query found.') }}{% endif %}
{%- if tools and tools is iterable %}
    {{- '<|im_start|>system\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{% endfor %}
    {{- '\\n</tools>' }}
    {%- if messages[0].role == 'system' %}{{- '\\n\\n' + words(messages[0].content) }}{% endif %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + words(messages[0].content) + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- if not loop.first %}{{ raise_exception('System must be first.') }}{% endif %}
        {%- continue %}
    {%- elif message.role == 'user' %}
        {{- '<|im_start|>user\\n' + words(message.content) + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if message.reasoning_content is string and loop.index0 > ns.last_query %}
            {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
        {%- endif %}
        {%- generation %}{{- words(message.content) }}{% endgeneration %}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>\\n<function=' + call.function.name + '>\\n' }}
            {%- for key, value in call.function.arguments|items %}
                {{- '<parameter=' + key + '>\\n' }}
                {{- value | tojson if value is mapping else value | string }}
                {{- '\\n</parameter>\\n' }}
            {%- endfor %}
            {{- '</function>\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.previtem is undefined or loop.previtem.role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + words(message.content) + '\\n</tool_response>' }}
        {%- if loop.nextitem is undefined or loop.nextitem.role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- else %}
        {{- raise_exception('Unexpected message role.') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n<think>\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

JSON_CALL_TEMPLATE = (
    PLAIN_TEMPLATE + "{# <think> #}{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}"
)


def train_tokenizer(*, markers: list[str] = MARKERS) -> Tokenizer:
    """Return a byte-level BPE of a few hundred tokens; 0 to 2 are special, markers are not."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    text = (
        '<function=weather>\n<parameter=city>\nthe sky is blue\n</parameter>\n</function>\n{"a": 1}'
    )
    tokenizer.train_from_iterator([text] * 4, trainer)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in markers])
    return tokenizer


def write_checkpoint(
    directory: Path,
    *,
    template: str | None = HYBRID_TEMPLATE,
    template_in_config: bool = False,
    generation_config: dict[str, Any] | None = None,
    markers: list[str] = MARKERS,
) -> Path:
    """Write a checkpoint's small files (no weights) and return the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    train_tokenizer(markers=markers).save(str(directory / "tokenizer.json"))
    tokenizer_config: dict[str, Any] = {"eos_token": "<|im_end|>", "bos_token": None}
    if template is not None and template_in_config:
        tokenizer_config["chat_template"] = template
    elif template is not None:
        (directory / "chat_template.jinja").write_text(template)
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    text_config = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "max_position_embeddings": 4096,
    }
    config = {"model_type": "qwen3_5", "text_config": text_config}
    (directory / "config.json").write_text(json.dumps(config))
    if generation_config is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation_config))
    return directory


def template_text(family: str) -> str:
    """Return one of the templates in `tests/support/templates`."""
    return (Path(__file__).parent / "templates" / f"{family}.jinja").read_text()


def make_tokenizer(
    directory: Path, *, markers: list[str] = MARKERS, special_markers: Sequence[str] = ()
) -> ChatTokenizer:
    """Return a tokenizer whose tokenizer.json lies in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "tokenizer.json"
    tokenizer = train_tokenizer(markers=markers)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special_markers])
    tokenizer.save(str(path))
    return ChatTokenizer(tokenizer, path=str(path), eos_token="<|im_end|>")


def make_chat_model(
    directory: Path,
    *,
    template: str | None = HYBRID_TEMPLATE,
    max_model_len: int = 4096,
    markers: list[str] = MARKERS,
) -> ChatModel:
    """Return a chat model named `test-model` that needs no checkpoint."""
    tokenizer = make_tokenizer(directory, markers=markers)
    return ChatModel(
        model_id="test-model",
        tokenizer=tokenizer,
        template=ChatTemplate(template, model_id="test-model") if template else None,
        max_model_len=max_model_len,
    )


def chat_request(**fields: Any) -> ChatRequest:
    """Return a request; without `messages` it asks one question."""
    body = {"model": "test-model", "messages": [{"role": "user", "content": "Hi"}], **fields}
    return msgspec.convert(body, ChatRequest)


def parse_call(
    body: str, table: ToolTable, *, is_closed: bool = True, syntax: CallSyntax = SYNTAXES["hermes"]
) -> tuple[str, str] | None:
    """Return name and arguments of the call in a block's text, or None if it is none."""
    reader = CallReader(syntax, table, is_certain=False)
    events = reader.feed(body + (syntax.closing if is_closed else ""))
    events += [] if reader.is_done or reader.is_failed else reader.end()
    if reader.is_failed:
        return None
    (start,) = [event for event in events if isinstance(event, CallStart)]
    return start.name, "".join(event.text for event in events if isinstance(event, CallText))


def tool(name: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a tool as it stands in a request."""
    function: dict[str, Any] = {"name": name}
    if parameters is not None:
        function["parameters"] = parameters
    return {"type": "function", "function": function}


def tools(*entries: dict[str, Any]) -> list[Tool]:
    """Return decoded tools."""
    return msgspec.convert(list(entries), list[Tool])


WEATHER = tool(
    "weather",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer", "minimum": 1},
            "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            "detailed": {"type": "boolean"},
            "areas": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["city"],
    },
)
