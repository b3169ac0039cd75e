"""Templates with the features of known families: prompts, calls and thoughts, there and back."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cortex.core.errors import TemplateRenderError, UnsupportedFieldError
from cortex.core.openai import Message
from cortex.neuron.chat.model import ChatModel
from cortex.neuron.chat.prepare import prepare, prompt_text
from cortex.neuron.chat.stream import ChatCollector, ChatStream
from cortex.neuron.chat.template import ChatTemplate
from cortex.neuron.engine.protocol import TokenEvent
from tests.support.call_texts import written
from tests.support.chat_models import (
    END_ID,
    chat_request,
    make_tokenizer,
    template_text,
    tool,
    tools,
)

FAMILIES = ["llama3", "mistral_list", "mistral", "qwen3", "hermes", "text_arguments"]
LOOK = tool("look", {"type": "object", "properties": {"city": {"type": "string"}}})
LOOK_TEXT = (
    '{"type": "function", "function": {"name": "look", "parameters": '
    '{"type": "object", "properties": {"city": {"type": "string"}}}}}'
)
TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Rome?"},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "hm",
        "tool_calls": [
            {"id": "call_12", "function": {"name": "look", "arguments": '{"city": "Rome"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "call_12", "content": "sunny"},
]
# The call's id as nine letters and digits, made from the client's own.
SHORT_ID = "WmltaTBuc"
MARKERS = ["<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]"]


def compiled(family: str) -> ChatTemplate:
    return ChatTemplate(
        template_text(family),
        model_id="test-model",
        bos_token="<s>",
        eos_token="</s>",
        now=lambda: datetime(2026, 11, 23, tzinfo=UTC),
    )


def messages(turns: list[dict[str, Any]]) -> list[Message]:
    return msgspec.convert(turns, list[Message])


PROMPTS = {
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n"
        "Today: 23 Nov 2026\n\nBe kind.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        f'Call as {{"name": function name, "parameters": its arguments}}.\n\n{LOOK_TEXT}\n'
        "Rome?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        '{"name": "look", "parameters": {"city": "Rome"}}<|eot_id|>'
        "<|start_header_id|>ipython<|end_header_id|>\n\nsunny<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "mistral_list": (
        f"<s>[AVAILABLE_TOOLS] [{LOOK_TEXT}][/AVAILABLE_TOOLS][INST] Rome?[/INST]"
        '[TOOL_CALLS] [{"name": "look", "arguments": {"city": "Rome"}, '
        f'"id": "{SHORT_ID}"}}]</s>'
        f'[TOOL_RESULTS] {{"content": sunny, "call_id": "{SHORT_ID}"}}[/TOOL_RESULTS]'
    ),
    "mistral": (
        f"<s>[AVAILABLE_TOOLS][{LOOK_TEXT}][/AVAILABLE_TOOLS]"
        "[SYSTEM_PROMPT]Think between [THINK] and [/THINK]. Be kind.[/SYSTEM_PROMPT]"
        '[INST]Rome?[/INST][THINK]hm[/THINK][TOOL_CALLS]look[ARGS]{"city": "Rome"}</s>'
        "[TOOL_RESULTS]sunny[/TOOL_RESULTS]"
    ),
    "qwen3": (
        f"<|im_start|>system\nBe kind.\n\n<tools>\n{LOOK_TEXT}\n</tools>\n"
        'Answer with <tool_call>\n{"name": .., "arguments": ..}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\nRome?<|im_end|>\n<|im_start|>assistant\n<think>\nhm\n</think>\n\n"
        '<tool_call>\n{"name": "look", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    "hermes": (
        "<s><|im_start|>system\nFunctions:\nlook(city: str)\n"
        'Call one as <tool_call>{"name": .., "arguments": ..}</tool_call><|im_end|>\n'
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nRome?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "look", "arguments": {"city": "Rome"}}\n'
        "</tool_call><|im_end|>\n<|im_start|>tool\nsunny<|im_end|>\n<|im_start|>assistant\n"
    ),
    "text_arguments": (
        '<s><system>Be kind.<user>Rome?<call>look\n{"city": "Rome"}</call><tool>sunny'
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tool_round_trip_renders(family: str) -> None:
    offered = [] if family == "text_arguments" else tools(LOOK)
    assert compiled(family).render(messages(TURNS), offered) == PROMPTS[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_renders_the_same(family: str) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    offered = [] if family == "text_arguments" else [LOOK]
    turns: Any = json.loads(json.dumps(TURNS))
    arguments = '{"city": "Rome"}' if family == "text_arguments" else {"city": "Rome"}
    turns[2]["content"] = ""
    turns[2]["tool_calls"][0]["function"]["arguments"] = arguments
    turns[2]["tool_calls"][0]["id"] = turns[3]["tool_call_id"] = SHORT_ID
    text = utils._compile_jinja_template(template_text(family)).render(
        messages=turns,
        tools=offered or None,
        documents=None,
        add_generation_prompt=True,
        bos_token="<s>",
        eos_token="</s>",
        date_string="23 Nov 2026",
    )
    assert text == PROMPTS[family]


@pytest.mark.parametrize(
    ("family", "facts"),
    [
        ("llama3", ("llama3", "<think>", False, True)),
        ("mistral_list", ("mistral_list", "<think>", False, False)),
        ("mistral", ("mistral", "[THINK]", True, False)),
        ("qwen3", ("hermes", "<think>", True, False)),
        ("hermes", ("hermes", "<think>", False, False)),
        ("text_arguments", (None, "<think>", False, False)),
    ],
)
def test_what_a_family_s_template_tells(family: str, facts: Any) -> None:
    template = compiled(family)
    assert facts == (
        template.tool_format,
        template.think.opening,
        template.supports_thinking,
        template.is_single_call,
    )


def test_users_in_a_row_are_joined_where_the_template_wants_turns_to_alternate() -> None:
    asked = messages([TURNS[1], {"role": "user", "content": "And Paris?"}])
    assert compiled("mistral_list").render(asked) == "<s>[INST] Rome?\n\nAnd Paris?[/INST]"
    assert "user\nRome?<|im_end|>\n<|im_start|>user\nAnd Paris?" in compiled("qwen3").render(asked)


def test_turns_that_do_not_alternate_otherwise_are_the_template_s_to_refuse() -> None:
    asked = messages([{"role": "assistant", "content": "Hi"}, TURNS[1]])
    with pytest.raises(TemplateRenderError, match="Turns must alternate"):
        compiled("mistral_list").render(asked)


def test_several_calls_in_a_turn_are_a_template_s_to_refuse() -> None:
    call = TURNS[2]["tool_calls"][0]
    several = [TURNS[1], {**TURNS[2], "tool_calls": [call, {**call, "id": "b"}]}]
    with pytest.raises(TemplateRenderError, match="One call at a time"):
        compiled("llama3").render(messages(several))


def test_an_id_of_nine_letters_and_digits_is_kept() -> None:
    turns = json.loads(json.dumps(TURNS).replace("call_12", "a1B2c3D4e"))
    assert '"id": "a1B2c3D4e"' in compiled("mistral_list").render(messages(turns))


def test_old_thoughts_in_a_text_are_the_template_s_to_drop() -> None:
    turns = [
        TURNS[1],
        {"role": "assistant", "content": "<think>\nold\n</think>\n\nSunny."},
        {"role": "user", "content": "Sure?"},
    ]
    assert "assistant\nSunny.<|im_end|>" in compiled("qwen3").render(messages(turns))


def chat_model(tmp_path: Path, family: str, **fields: Any) -> ChatModel:
    """Return a model whose markers are special tokens, as those of Llama and Mistral are."""
    return ChatModel(
        model_id="test-model",
        tokenizer=make_tokenizer(tmp_path, special_markers=MARKERS),
        template=compiled(family),
        max_model_len=4096,
        **fields,
    )


CALLS = [("look", {"city": 'New\n"York" é'})]


@pytest.mark.parametrize("family", ["llama3", "mistral_list", "mistral", "qwen3", "hermes"])
def test_what_a_family_writes_is_read_as_it_is_generated(tmp_path: Path, family: str) -> None:
    model = chat_model(tmp_path, family)
    request = chat_request(tools=[LOOK], stream=True)
    prepared = prepare(request, model)
    assert prepared.constraint is not None
    syntax = model.call_syntax
    assert syntax is not None
    text = written(syntax.name, CALLS)
    thought = "[THINK]hm[/THINK]" if family == "mistral" else ""
    ids = model.tokenizer.encode(thought + text)
    events = [TokenEvent(request_id=1, token_ids=[at]) for at in ids]
    events.append(TokenEvent(request_id=1, token_ids=[END_ID], finish="stop"))
    stream = ChatStream(prepared, completion_id="c", created=1, model="m")
    collector = ChatCollector(prepared, completion_id="c", created=1, model="m")
    data = b""
    for event in events:
        data += stream.feed(0, event)
        collector.feed(0, event)
    chunks = [json.loads(line[6:]) for line in data.decode().split("\n") if line[:6] == "data: "]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    pieces = [call["function"] for delta in deltas for call in delta.get("tool_calls", ())]
    assert pieces[0]["name"] == "look"
    assert json.loads("".join(each["arguments"] for each in pieces)) == CALLS[0][1]
    assert "".join(delta.get("content", "") for delta in deltas) == ""
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == thought[7:9]
    # Told piece by piece where a grammar holds from a marker on; Llama's calls have none.
    assert len(pieces) > 5 or family == "llama3"
    (choice,) = collector.completion().choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert json.loads(str(call.function.arguments)) == CALLS[0][1]
    assert choice.message.content is None


def test_markers_are_hidden_as_ever_where_no_tools_are_offered(tmp_path: Path) -> None:
    model = chat_model(tmp_path, "mistral_list")
    prepared = prepare(chat_request(), model)
    collector = ChatCollector(prepared, completion_id="c", created=1, model="m")
    ids = model.tokenizer.encode("[TOOL_CALLS]Hello")
    collector.feed(0, TokenEvent(request_id=1, token_ids=[*ids, END_ID], finish="stop"))
    assert collector.completion().choices[0].message.content == "Hello"


def test_llama_s_single_call_ends_the_answer(tmp_path: Path) -> None:
    prepared = prepare(chat_request(tools=[LOOK]), chat_model(tmp_path, "llama3"))
    assert prepared.output.is_single_call


def test_a_format_that_nobody_names_is_asked_for(tmp_path: Path) -> None:
    text = template_text("text_arguments") + "{{ tools }}"
    template = ChatTemplate(text, model_id="test-model")
    model = ChatModel(
        model_id="test-model",
        tokenizer=make_tokenizer(tmp_path),
        template=template,
        max_model_len=4096,
    )
    with pytest.raises(UnsupportedFieldError, match="set its `tool_format`"):
        prepare(chat_request(tools=[LOOK]), model)
    told = replace(model, tool_format="hermes")
    assert prepare(chat_request(tools=[LOOK]), told).output.syntax.name == "hermes"


def test_a_template_of_its_own_renders_requests_with_tools(tmp_path: Path) -> None:
    model = chat_model(tmp_path, "text_arguments", tool_template=compiled("hermes"))
    assert model.supports_tools
    assert prompt_text(chat_request(), model) == "<s><user>Hi"
    assert "Functions:\nlook(city: str)" in prompt_text(chat_request(tools=[LOOK]), model)
