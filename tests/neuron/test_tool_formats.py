"""How a model's tool calls are read, over HTTP: told by its template, or named by its load."""

import json

from cortex.core.config import CommandHarness
from tests.support.command_engine import spec
from tests.support.neuron_http import add_chat_model, neuron

PATH = "/v1/chat/completions"
LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
HERMES = '<tool_call>\n{"name": "look", "arguments": {"city": "Rome and Paris"}}\n</tool_call>'
LIST = '[TOOL_CALLS] [{"name": "look", "arguments": {"city": "Rome"}}]'


def add_model(model_dir, template):
    """Make a model that repeats the last turn, since the fake engine answers with its prompt."""
    path = add_chat_model(model_dir, "m")
    (path / "chat_template.jinja").unlink()
    (path / "chat_template.jinja").write_text(template + "{{ messages[-1].content }}")


def ask(content, **fields):
    messages = [{"role": "user", "content": content}]
    return {"model": "m", "messages": messages, "max_tokens": 500, "tools": [LOOK], **fields}


def pieces(answer):
    """The pieces of tool calls in a stream."""
    deltas = [each["choices"][0]["delta"] for each in answer.events if each != "[DONE]"]
    return [call["function"] for delta in deltas for call in delta.get("tool_calls", ())]


async def test_a_load_names_the_format_that_a_template_does_not_tell(tmp_path):
    add_model(tmp_path / "models", "{# tools #}")
    async with neuron(tmp_path) as api:
        await api.load("m")
        refused = await api.post(PATH, ask(LIST))
        assert refused.status == 400
        assert "set its `tool_format`" in refused.error["message"]
        # A load of what is loaded sets it, too.
        assert (await api.load("m", tool_format="mistral_list")).status == 200
        (choice,) = (await api.post(PATH, ask(LIST))).json["choices"]
        assert choice["finish_reason"] == "tool_calls"
        (call,) = choice["message"]["tool_calls"]
        assert call["function"]["name"] == "look"
        assert json.loads(call["function"]["arguments"]) == {"city": "Rome"}
        assert len(call["id"]) == 9
        unknown = await api.load("m", tool_format="morse")
        assert unknown.status == 400


async def test_a_load_takes_the_grammar_off_a_model_s_calls(tmp_path):
    add_model(tmp_path / "models", "{# tools <tool_call> #}")
    async with neuron(tmp_path) as api:
        await api.load("m")
        held = pieces(await api.post(PATH, ask(HERMES, stream=True)))
        assert len(held) > 1
        await api.load("m", constrain_tools=False)
        free = pieces(await api.post(PATH, ask(HERMES, stream=True)))
        assert len(free) == 1
        for told in (held, free):
            text = "".join(each["arguments"] for each in told)
            assert json.loads(text) == {"city": "Rome and Paris"}
            assert told[0]["name"] == "look"


async def test_an_external_engine_reads_calls_itself(tmp_path):
    async with neuron(tmp_path, command=CommandHarness(models={"x": spec(tmp_path)})) as api:
        for option in ({"tool_format": "hermes"}, {"constrain_tools": False}):
            refused = await api.load("x", **option)
            assert refused.status == 400
            assert refused.error["param"] == next(iter(option))
