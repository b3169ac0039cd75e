import jinja2
import pytest

from cortex.bundled.recipe import render

TEMPLATE = render.load_template()
TOOL = {
    "type": "function",
    "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}},
}


def show(messages, tools=None, **options):
    return render.render(TEMPLATE, messages, tools, **options)


def test_a_prompt_without_thinking_closes_the_think_block():
    text = show([{"role": "user", "content": "Hi"}], add_generation_prompt=True)

    assert text == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def test_a_prompt_with_thinking_leaves_the_think_block_open():
    text = show(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, enable_thinking=True
    )

    assert text.endswith("<|im_start|>assistant\n<think>\n")


def test_tools_are_json_lines_after_the_system_text():
    text = show(
        [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}], [TOOL]
    )

    assert text == (
        "<|im_start|>system\nBe kind.\n\nTools:\n<tools>\n"
        '{"type": "function", "function": {"name": "get_time", '
        '"parameters": {"type": "object", "properties": {}}}}\n'
        "</tools><|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    )


def test_a_tool_call_is_rendered_as_xml_and_its_results_share_a_user_turn():
    call = {"function": {"name": "set", "arguments": {"city": "Oslo", "days": 3, "loud": True}}}
    text = show(
        [
            {"role": "user", "content": "Set it"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "done"},
            {"role": "tool", "content": [{"type": "text", "text": "twice"}]},
        ]
    )

    assert text == (
        "<|im_start|>user\nSet it<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
        "<tool_call>\n<function=set>\n<parameter=city>\nOslo\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n<parameter=loud>\ntrue\n</parameter>\n"
        "</function>\n</tool_call><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\ndone\n</tool_response>\n"
        "<tool_response>\ntwice\n</tool_response><|im_end|>\n"
    )


def test_a_history_renders_as_it_was_generated():
    asked = [{"role": "user", "content": "Hi"}]
    prompt = show(asked, add_generation_prompt=True)
    whole = show([*asked, {"role": "assistant", "content": "Hello!"}])

    assert whole == prompt + "Hello!<|im_end|>\n"


def test_a_later_system_turn_is_rendered_in_place():
    text = show([{"role": "user", "content": "Hi"}, {"role": "system", "content": "Now be brief."}])

    assert text.endswith("<|im_start|>system\nNow be brief.<|im_end|>\n")


def test_an_image_is_refused():
    with pytest.raises(jinja2.TemplateError, match="text only"):
        show([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])


def test_an_unknown_role_is_refused():
    with pytest.raises(jinja2.TemplateError, match="unknown role critic"):
        show([{"role": "critic", "content": "no"}])
