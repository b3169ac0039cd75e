"""Text completions of a neuron: by our own engine, and by external ones."""

import os

import pytest

from cortex.core.config import CommandHarness
from cortex.core.openai import read_usage_comment
from tests.support.command_engine import spec
from tests.support.fake_server import requests, write_script
from tests.support.neuron_http import add_chat_model, neuron

PATH = "/v1/completions"
ENVIRONMENT = {"PYTHONPATH": os.environ.get("PYTHONPATH", ".")}


def ask(prompt="once upon a time", model="m", **fields):
    return {"model": model, "prompt": prompt, "max_tokens": 500, **fields}


def text_of(events, index=0):
    choices = [each["choices"][0] for each in events if each != "[DONE]" and each["choices"]]
    return "".join(each["text"] for each in choices if each["index"] == index)


def add_base_model(model_dir, name):
    """Make a model without a chat template."""
    path = add_chat_model(model_dir, name)
    (path / "chat_template.jinja").unlink()


async def test_a_model_without_a_chat_template_goes_on_from_a_text(tmp_path):
    add_base_model(tmp_path / "models", "m")
    async with neuron(tmp_path) as api:
        await api.load("m")
        # The fake engine's answer is its own prompt.
        answer = await api.post(PATH, ask())
        assert answer.status == 200
        assert answer.json["object"] == "text_completion"
        assert answer.json["id"].startswith("cmpl-")
        assert answer.json["model"] == "m"
        (choice,) = answer.json["choices"]
        assert choice == {
            "index": 0,
            "text": "once upon a time",
            "logprobs": None,
            "finish_reason": "stop",
        }
        usage = answer.json["usage"]
        assert usage["completion_tokens"] == usage["prompt_tokens"] > 0
        chat = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
        refused = await api.post("/v1/chat/completions", chat)
        assert refused.status == 400
        assert "no chat template" in refused.error["message"]


async def test_prompts_come_as_texts_or_as_tokens_one_or_several(tmp_path):
    add_chat_model(tmp_path / "models", "m")
    async with neuron(tmp_path) as api:
        await api.load("m")
        counted = {"model": "m", "prompt": "hello there", "return_tokens": True}
        ids = (await api.post("/v1/tokenize", counted)).json["tokens"]
        for prompt in ("hello there", ids, ["hello there"], [ids]):
            answer = await api.post(PATH, ask(prompt))
            assert [each["text"] for each in answer.json["choices"]] == ["hello there"]
            assert answer.json["usage"]["prompt_tokens"] == len(ids)
        both = (await api.post(PATH, ask(["hello", "there"], n=2, echo=True))).json
        assert [(each["index"], each["text"]) for each in both["choices"]] == [
            (0, "hellohello"),
            (1, "hellohello"),
            (2, "therethere"),
            (3, "therethere"),
        ]
        default = ask("one two three " * 20)
        del default["max_tokens"]
        answer = (await api.post(PATH, default)).json
        assert answer["usage"]["completion_tokens"] == 16
        assert answer["choices"][0]["finish_reason"] == "length"


async def test_a_stream_has_every_choice_and_ends_with_usage_and_done(tmp_path):
    add_chat_model(tmp_path / "models", "m")
    async with neuron(tmp_path) as api:
        await api.load("m")
        body = ask(["hello there", "good bye"], stream=True, stream_options={"include_usage": True})
        answer = await api.post(PATH, body)
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        told = [read_usage_comment(each) for each in answer.body.split(b"\n\n")]
        assert next(each for each in told if each is not None).prompt_tokens > 0
        events = answer.events
        assert [text_of(events, at) for at in (0, 1)] == ["hello there", "good bye"]
        finished = [
            choice["index"]
            for each in events[:-1]
            for choice in each["choices"]
            if choice["finish_reason"] == "stop"
        ]
        assert sorted(finished) == [0, 1]
        usage = events[-2]["usage"]
        assert usage["completion_tokens"] == usage["prompt_tokens"] > 0
        assert events[-1] == "[DONE]"


async def test_more_sequences_than_the_engine_has_slots_are_answered_in_turn(tmp_path):
    add_chat_model(tmp_path / "models", "m")
    async with neuron(tmp_path) as api:
        await api.load("m")
        answer = await api.post(PATH, ask([f"word {at}" for at in range(20)]))
        texts = [each["text"] for each in answer.json["choices"]]
        assert texts == [f"word {at}" for at in range(20)]


async def test_what_is_refused_names_its_field(tmp_path):
    add_chat_model(tmp_path / "models", "m")
    async with neuron(tmp_path) as api:
        await api.load("m")
        for fields, param, code in (
            ({"suffix": "x"}, "suffix", "unsupported_field"),
            ({"echo": True, "logprobs": 1}, "echo", "unsupported_field"),
            ({"prompt": []}, "prompt", "invalid_request"),
            ({"prompt": [1 << 40]}, "prompt", "invalid_request"),
            ({"prompt": ""}, "prompt", "invalid_request"),
            ({"prompt": "word " * 5000}, "prompt", "context_length_exceeded"),
            ({"logit_bias": {"999999": 1}}, "logit_bias", "invalid_request"),
            ({"best_of": 0}, "best_of", "invalid_request"),
        ):
            for stream in (False, True):
                answer = await api.post(PATH, {**ask(), **fields, "stream": stream})
                error = answer.error
                assert (answer.status, error["param"], error["code"]) == (400, param, code), fields


@pytest.mark.parametrize("usage_in", ["own", "last"])
async def test_an_external_engine_is_asked_at_its_own_route(tmp_path, usage_in):
    write_script(tmp_path / "fake", name="its/own-name", usage_in=usage_in)
    command = CommandHarness(models={"org/m": spec(tmp_path / "fake", env=ENVIRONMENT)})
    async with neuron(tmp_path, command=command) as api:
        await api.load("org/m")
        answer = await api.post(PATH, ask("one two three", "org/m", suffix="kept", best_of=1))
        assert answer.status == 200
        assert answer.json["model"] == "org/m"
        assert answer.json["object"] == "text_completion"
        assert answer.json["choices"][0]["text"] == "one two three"
        sent = requests(tmp_path / "fake")[0]
        assert (sent["model"], sent["prompt"], sent["suffix"]) == (
            "its/own-name",
            "one two three",
            "kept",
        )
        answer = await api.post(PATH, ask("one two", "org/m", stream=True))
        assert text_of(answer.events) == "one two "
        assert {each["model"] for each in answer.events[:-1]} == {"org/m"}
        assert answer.events[-1] == "[DONE]"
        lines = (await api.get("/metrics")).body.decode().splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        assert values['cortex_neuron_completion_tokens_total{model="org/m"}'] == "5.0"
        seconds = 'cortex_neuron_time_to_first_token_seconds_count{model="org/m"}'
        assert values[seconds] == "1.0"
