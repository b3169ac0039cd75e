"""Chat templates: what they are given, what they render, how they refuse."""

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from cortex.core.errors import (
    BadRequestError,
    CheckpointError,
    TemplateRenderError,
    UnsupportedFieldError,
)
from cortex.core.openai import Message
from cortex.neuron.chat import template as template_module
from cortex.neuron.chat.template import (
    ChatTemplate,
)
from tests.support.chat_models import (
    HYBRID_TEMPLATE,
    JSON_CALL_TEMPLATE,
    PLAIN_TEMPLATE,
    WEATHER,
    tool,
    tools,
)

USER = {"role": "user", "content": "Hi"}
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
    "Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def turns(*entries: dict[str, Any]) -> list[Message]:
    return msgspec.convert(list(entries), list[Message])


def compiled(source: str = HYBRID_TEMPLATE) -> ChatTemplate:
    return ChatTemplate(source, model_id="test-model", bos_token="<s>", eos_token="</s>")


def render(*entries: dict[str, Any], source: str = HYBRID_TEMPLATE, **kwargs: Any) -> str:
    return compiled(source).render(turns(*entries), template_kwargs=kwargs)


def test_a_question_opens_a_thought_by_default() -> None:
    assert render(USER) == ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n")


def test_thinking_can_be_switched_off_by_template_kwargs() -> None:
    assert render(USER, enable_thinking=False).endswith("<think>\n\n</think>\n\n")


def test_without_generation_prompt_the_text_ends_with_the_last_turn() -> None:
    text = compiled().render(turns(USER), add_generation_prompt=False)
    assert text == "<|im_start|>user\nHi<|im_end|>\n"


def test_smollm2_s_own_template_adds_its_system_turn() -> None:
    assert render(USER, source=SMOLLM2) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_developer_reads_as_system_and_function_as_tool() -> None:
    text = render(
        {"role": "developer", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": "?"},
        {"role": "function", "name": "f", "content": "42"},
    )
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    assert "<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>" in text


def test_a_whole_tool_turn_renders_with_arguments_as_an_object() -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {
            "name": "weather",
            "arguments": '{"city": "Rome", "opts": {"a": "ä"}, "n": 2}',
        },
    }
    text = compiled().render(
        turns(
            USER,
            {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
            {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "x"}]},
        ),
        tools(tool("weather", {"type": "object", "properties": {"city": {"enum": ["<ä>"]}}})),
    )
    assert text == (
        "<|im_start|>system\n<tools>\n"
        '{"type": "function", "function": {"name": "weather", "parameters": '
        '{"type": "object", "properties": {"city": {"enum": ["<ä>"]}}}}}\n'
        "</tools><|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nhm\n</think>\n\n"
        "<tool_call>\n<function=weather>\n"
        "<parameter=city>\nRome\n</parameter>\n"
        '<parameter=opts>\n{"a": "ä"}\n</parameter>\n'
        "<parameter=n>\n2\n</parameter>\n"
        "</function>\n</tool_call><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nsunny\n</tool_response>\n"
        "<tool_response>\nx\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n"
    )


@pytest.mark.parametrize("arguments", ["", None, "{}", {}])
def test_a_call_without_arguments_renders_without_parameters(arguments: Any) -> None:
    call = {"function": {"name": "now", "arguments": arguments}}
    text = render(USER, {"role": "assistant", "content": "", "tool_calls": [call]}, USER)
    assert "<function=now>\n</function>" in text


def test_arguments_that_are_no_json_are_the_template_s_to_refuse() -> None:
    call = {"function": {"name": "now", "arguments": "{oops"}}
    with pytest.raises(TemplateRenderError, match="test-model"):
        render(USER, {"role": "assistant", "content": "", "tool_calls": [call]}, USER)


def test_parts_are_joined_by_lines_where_the_template_wants_strings() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    text = render({"role": "user", "content": parts}, source=PLAIN_TEMPLATE)
    assert text.startswith("<|im_start|>user\na\nb<|im_end|>\n")


def test_parts_go_to_the_template_where_it_reads_them_itself() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    text = render({"role": "user", "content": parts})
    assert text.startswith("<|im_start|>user\nab<|im_end|>\n")


def test_a_string_becomes_a_part_where_the_template_only_reads_parts() -> None:
    parts = "{% for p in m['content'] %}[{{ p['text'] }}]{% endfor %}"
    source = "{% for m in messages %}" + parts + "{% endfor %}"
    assert render(USER, source=source) == "[Hi]"


def test_null_content_reads_as_empty_text() -> None:
    text = render({"role": "assistant", "content": None}, source=PLAIN_TEMPLATE)
    assert text.startswith("<|im_start|>assistant\n<|im_end|>\n")


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, "images"),
        ({"type": "input_audio", "input_audio": {}}, "sound"),
        ({"type": "file", "file": {}}, "files"),
    ],
)
def test_what_is_not_text_is_refused_by_its_place(part: dict[str, Any], kind: str) -> None:
    with pytest.raises(UnsupportedFieldError, match=kind) as caught:
        render(USER, {"role": "user", "content": [{"type": "text", "text": "a"}, part]})
    assert caught.value.param == "messages[1].content[1]"
    assert "'test-model'" in caught.value.message


def test_a_refusal_by_the_template_is_quoted() -> None:
    with pytest.raises(TemplateRenderError, match=r"No user query found\.") as caught:
        render({"role": "assistant", "content": "a"})
    assert (caught.value.status, caught.value.param) == (400, "messages")


def test_a_system_turn_in_the_middle_is_the_template_s_to_refuse() -> None:
    with pytest.raises(TemplateRenderError, match=r"System must be first\."):
        render(USER, {"role": "system", "content": "late"})


def test_leading_system_turns_are_joined_only_where_the_template_refuses_two() -> None:
    system = [{"role": "system", "content": "one"}, {"role": "developer", "content": "two"}]
    assert render(*system, USER).startswith("<|im_start|>system\none\n\ntwo<|im_end|>\n")
    assert render(*system, USER, source=PLAIN_TEMPLATE).startswith(
        "<|im_start|>system\none<|im_end|>\n<|im_start|>system\ntwo<|im_end|>\n"
    )


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[9].role }}",
        "{{ 1 // 0 }}",
        "{{ messages + 1 }}",
        "{{ nothing.at.all }}",
        "{{ range(1000000) | list }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
    ],
)
def test_any_fault_in_a_template_is_a_400(source: str) -> None:
    with pytest.raises(TemplateRenderError):
        render(USER, source=source)


def test_a_prompt_without_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_module, "MAX_PROMPT_CHARS", 1000)
    with pytest.raises(BadRequestError, match="over 1000 characters"):
        render(USER, source="{% for i in range(99999) %}xxxxxxxxxx{% endfor %}")


def test_tools_without_a_place_in_the_template_are_refused() -> None:
    with pytest.raises(UnsupportedFieldError, match="'test-model' cannot use tools") as caught:
        compiled(PLAIN_TEMPLATE).render(turns(USER), tools(WEATHER))
    assert caught.value.param == "tools"


def test_template_kwargs_must_not_replace_the_messages() -> None:
    with pytest.raises(BadRequestError, match="must not set 'messages'"):
        render(USER, messages=[])


def test_what_the_source_tells() -> None:
    facts = [
        (t.takes_tools, t.supports_thinking, t.tool_format)
        for t in map(compiled, (HYBRID_TEMPLATE, PLAIN_TEMPLATE, JSON_CALL_TEMPLATE))
    ]
    assert facts == [(True, True, "qwen_xml"), (False, False, None), (True, True, "hermes")]


def test_tokens_and_the_date_are_at_hand() -> None:
    template = ChatTemplate(
        "{{ bos_token }}{{ strftime_now('%d %b %Y') }}{{ eos_token }}",
        model_id="m",
        bos_token="<s>",
        eos_token="</s>",
        now=lambda: datetime(2026, 11, 23, tzinfo=UTC),
    )
    assert template.render(turns(USER)) == "<s>23 Nov 2026</s>"


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ("tojson", '{"b": "<&\'ä>", "a": [1, true, null]}'),
        ("tojson(ensure_ascii=True)", '{"b": "<&\'\\u00e4>", "a": [1, true, null]}'),
        ("tojson(separators=(',', ':'))", '{"b":"<&\'ä>","a":[1,true,null]}'),
        ("tojson(sort_keys=True)", '{"a": [1, true, null], "b": "<&\'ä>"}'),
        ("tojson(indent=1)", '{\n "b": "<&\'ä>",\n "a": [\n  1,\n  true,\n  null\n ]\n}'),
    ],
)
def test_tojson_writes_as_python_does_and_escapes_nothing(call: str, text: str) -> None:
    value = {"b": "<&'ä>", "a": [1, True, None]}
    assert render(USER, source=f"{{{{ x | {call} }}}}", x=value) == text


def test_a_template_that_does_not_compile_is_refused_at_load() -> None:
    with pytest.raises(CheckpointError, match="'test-model' is not valid"):
        compiled("{% for %}")
    with pytest.raises(CheckpointError, match="is over"):
        compiled("x" * (1 << 20) + "x")
